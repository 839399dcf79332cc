"""A wrong name, path or value is reported before Keras and other slow imports."""

import json
import os
import subprocess
import sys

import pytest
from checkout import ROOT

from keras_openllama.__main__ import COMMANDS

pytestmark = pytest.mark.backend_free

SLOW = (
    "jax",
    "keras",
    "tensorflow",
    "torch",
    "transformers",
    "datasets",
    "apache_beam",
)
# Command lines, and what their error names. FILE exists, EMPTY is a directory, and
# CONFIG one with a config.json that is not that of a model.
NO_TEXTS = ("empty.txt", "blank.txt", "EMPTY", "FILE", "a.csv", "no_text.jsonl")
CASES = [
    ("generate hi --preset nono", "--preset"),
    ("generate hi --draft nono", "--draft"),
    ("generate hi --adapters nono", "--adapters"),
    ("generate hi --preset EMPTY/nono.gguf", "nono.gguf"),
    ("generate hi --preset EMPTY", "--preset"),
    ("generate hi --preset CONFIG", "--preset"),
    ("generate hi --preset empty.gguf", "--preset"),
    ("generate hi --preset nano --revision main", "--revision"),
    ("generate hi --adapters EMPTY", "--adapters"),
    ("generate hi --draft EMPTY", "--draft"),
    ("generate hi --dtype float8", "--dtype"),
    ("generate hi --top-k 0", "--top-k"),
    ("chat --preset nono", "--preset"),
    ("chat --adapters nono", "--adapters"),
    ("chat --chat-template nono", "--chat-template"),
    ("chat --preset EMPTY", "--preset"),
    ("chat --adapters EMPTY", "--adapters"),
    ("chat --chat-template empty.txt", "--chat-template"),
    ("serve --preset nono", "--preset"),
    ("serve --adapters nono", "--adapters"),
    ("serve --chat-template nono", "--chat-template"),
    ("serve --preset EMPTY", "--preset"),
    ("serve --adapters EMPTY", "--adapters"),
    ("serve --adapters a=EMPTY", "--adapters"),
    ("serve --chat-template empty.txt", "--chat-template"),
    ("serve --host nono.invalid", "--host"),
    ("convert nono new --to keras", "SOURCE"),
    ("convert nano FILE --to easylm", "FILE"),
    ("convert nano new --to keras --quantization q8_0", "--quantization"),
    ("convert FILE new --to keras --preset nono", "--preset"),
    ("convert EMPTY new --to keras", "SOURCE"),
    ("convert FILE new --to keras --preset EMPTY", "--preset"),
    *(
        (
            f"convert nano new --to keras --quantization int4 --calibration {path}",
            "--calibration",
        )
        for path in (
            "empty.txt",
            "blank.txt",
            "EMPTY",
            "FILE",
            "a.csv",
            "no_text.jsonl",
        )
    ),
    ("presets nono", "nono"),
    ("train-tokenizer --input nono --output new", "nono"),
    ("train-tokenizer --input FILE --output new --mixture nono", "nono"),
    ("prepare-data --source a=nono --tokenizer nano --output new", "nono"),
    ("prepare-data --source a=FILE --tokenizer nono --output new", "--tokenizer"),
    ("prepare-data --source a=FILE --tokenizer a.model --output new", "--tokenizer"),
    ("prepare-data --source a=FILE --tokenizer nano --output new --mixture no", "no"),
    ("inspect-data nono", "DIRECTORY"),
    ("inspect-data EMPTY", "EMPTY"),
    ("pretrain --preset nono", "nono"),
    ("pretrain --preset 3b_v2", "--data"),
    ("pretrain --preset nano --data EMPTY", "--data"),
    ("pretrain --preset nano --mixture nono", "nono"),
    ("finetune --preset nono --data FILE", "--preset"),
    ("finetune --preset nano --data nono", "--data"),
    ("finetune --preset nano --data FILE --lora-targets nono", "--lora-targets"),
    ("finetune --preset nano --data empty.txt", "empty.txt"),
    ("finetune --preset nano --data a.csv", "a.csv"),
    ("finetune --preset nano --data FILE --validation empty.txt", "empty.txt"),
    ("finetune --preset nano --data FILE --chat-template empty.txt", "empty.txt"),
    ("finetune --preset EMPTY --data FILE", "--preset"),
    ("pretrain --preset nano --plan --topology nono", "--topology"),
    ("convert FILE new --to keras", "--preset"),
    ("convert empty.txt new --to keras --preset nano", "empty.txt"),
    ("evaluate --preset nano --perplexity text.txt --context 1 --stride 2", "--stride"),
    ("plot nono", "nono"),
    ("evaluate --preset nono --tasks piqa", "--preset"),
    ("evaluate --preset nano --perplexity nono", "--perplexity"),
    ("evaluate --preset nano --adapters nono --tasks piqa", "--adapters"),
    ("evaluate --preset EMPTY --tasks piqa", "--preset"),
    ("evaluate --preset nano --adapters EMPTY --tasks piqa", "--adapters"),
    ("evaluate --preset nano --tasks piqa nono_task", "nono_task"),
    *((f"evaluate --preset nano --perplexity {p}", "--perplexity") for p in NO_TEXTS),
    ("evaluate --compare nono --output new", "nono"),
    ("lm-eval --model keras_openllama --model_args preset=nono --tasks x", "preset"),
    ("lm-eval run --model_args=dtype=float32,preset=nono", "preset"),
    ("lm-eval run --model_args preset=EMPTY --tasks piqa", "preset"),
    ("lm-eval run --model_args preset=nano,adapters=EMPTY --tasks piqa", "adapters"),
    ("lm-eval run --model_args preset=nano --tasks piqa,nono_task", "nono_task"),
]
PROGRAM = f"""
import contextlib, io, json, sys
from keras_openllama.__main__ import main
for line in json.load(sys.stdin):
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            code = main(line.split())
        except SystemExit as exit:
            code = exit.code
    slow = [name for name in {SLOW} if name in sys.modules]
    print(json.dumps([code, error.getvalue(), slow]))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Runs all command lines in one process; returns `[code, stderr, modules]`."""
    directory = tmp_path_factory.mktemp("errors")
    (directory / "FILE").write_text('{"prompt": "a", "response": "b"}\n')
    (directory / "EMPTY").mkdir()
    (directory / "CONFIG").mkdir()
    (directory / "CONFIG" / "config.json").write_text("{}")
    for name in ("empty.txt", "empty.gguf", "a.csv"):
        (directory / name).touch()
    (directory / "text.txt").write_text("The sea")
    (directory / "blank.txt").write_text(" \n")
    (directory / "no_text.jsonl").write_text('{"prompt": "a"}\n')
    out = subprocess.check_output(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([line for line, _ in CASES]),
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    found = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    return dict(zip((line for line, _ in CASES), found, strict=True))


def test_cases_cover_every_command():
    assert {line.split()[0] for line, _ in CASES} == {*COMMANDS}


@pytest.mark.parametrize(("line", "named"), CASES)
def test_command_reports_an_error_before_slow_imports(reports, line, named):
    code, error, slow = reports[line]
    assert code == 2, error
    assert named in error.splitlines()[-1]
    assert not slow
