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
# Command lines, and what their error names. FILE exists, EMPTY is a directory.
CASES = [
    ("generate hi --preset nono", "--preset"),
    ("generate hi --draft nono", "--draft"),
    ("generate hi --adapters nono", "--adapters"),
    ("generate hi --preset EMPTY/nono.gguf", "nono.gguf"),
    ("generate hi --dtype float8", "--dtype"),
    ("generate hi --top-k 0", "--top-k"),
    ("chat --preset nono", "--preset"),
    ("chat --adapters nono", "--adapters"),
    ("chat --chat-template nono", "--chat-template"),
    ("serve --preset nono", "--preset"),
    ("serve --adapters nono", "--adapters"),
    ("serve --chat-template nono", "--chat-template"),
    ("convert nono new --to keras", "SOURCE"),
    ("convert nano FILE --to easylm", "FILE"),
    ("convert nano new --to keras --quantization q8_0", "--quantization"),
    ("convert FILE new --to keras --preset nono", "--preset"),
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
    ("plot nono", "nono"),
    ("evaluate --preset nono --tasks piqa", "--preset"),
    ("evaluate --preset nano --perplexity nono", "--perplexity"),
    ("evaluate --preset nano --adapters nono --tasks piqa", "--adapters"),
    ("evaluate --compare nono --output new", "nono"),
    ("lm-eval --model keras_openllama --model_args preset=nono --tasks x", "preset"),
    ("lm-eval run --model_args=dtype=float32,preset=nono", "preset"),
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
