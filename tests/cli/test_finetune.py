"""`keras-openllama finetune`: output, resuming and errors."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from checkout import ROOT
from fake_devices import xla_flags
from keras import ops
from pretraining_runs import (
    checkpoints,
    copy_without_last_checkpoint,
    digests,
    results_of,
)
from tensorflow_marks import first_on_tensorflow

from keras_openllama import OpenLlamaCausalLM, presets
from keras_openllama.cli.finetune_options import make_config, parse_arguments
from keras_openllama.planning.finetune_memory import estimate_memory
from keras_openllama.runs import finetuning, metrics_log
from keras_openllama.runs.step_reporter import StepReporter

SCRIPT = ROOT / "train" / "finetune.py"
RUNS_0_1 = ROOT / "tests" / "fixtures" / "finetuning_runs_0_1"
OPPOSITES = [("hot", "cold"), ("up", "down"), ("big", "small"), ("day", "night")]
OPPOSITES += [("good", "bad"), ("rich", "poor"), ("old", "young"), ("high", "low")]


def finetune():
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """Restores the variable that `--backend` sets."""
    monkeypatch.setenv("KERAS_BACKEND", keras.config.backend())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "opposites.jsonl"
    lines = [
        {"prompt": template.format(a), "response": f" {b}."}
        for a, b in OPPOSITES
        for template in ("The opposite of {} is", "Not {} but")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def arguments(small):
    """Flags of a short run of the small model; later flags override earlier ones."""

    def arguments(data, output, *more):
        short = ["--sequence-length", "24", "--batch-size", "4"]
        short += ["--max-new-tokens", "4"]
        return [
            *("--preset", str(small), "--data", str(data), "--output", str(output)),
            *("--learning-rate", "5e-3", *short, *map(str, more)),
        ]

    return arguments


def logits_of(lm):
    ids = np.array([[1, 5, 9, 20]])
    lm.preprocessor = None
    return ops.convert_to_numpy(lm.score(ids))


# ----- Output


@pytest.mark.slow_on_tensorflow
def test_finetune_trains_and_exports_adapters_and_a_merged_model(
    arguments, data, tmp_path, capsys
):
    output = tmp_path / "run"
    more = ("--preset", "nano", "--lora-rank", 4, "--epochs", 6)
    more = (*more, "--validation-fraction", 0.2)
    assert finetune().main(arguments(data, output, *more)) == 0
    losses = [record["loss"] for record in metrics_log.read_metrics(output)]
    assert np.mean(losses[-4:]) < 0.5 * losses[0]
    before, *_, after = metrics_log.read_validation(output)
    assert after["bits_per_byte"] < 0.8 * before["bits_per_byte"]
    samples = (output / "samples.txt").read_text()
    assert "sample 1, before" in samples and "sample 1, after" in samples
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    merged = OpenLlamaCausalLM.from_preset(str(output / "model"))
    adapted = OpenLlamaCausalLM.from_preset("open_llama_nano")
    plain = logits_of(OpenLlamaCausalLM.from_preset("open_llama_nano"))
    adapted.load_adapters(output / "adapters")
    found = logits_of(adapted)
    np.testing.assert_allclose(logits_of(merged), found, atol=1e-3)
    assert np.abs(found - plain).max() > 0.1
    assert str(output / "model") in capsys.readouterr().out
    # A complete run: nothing is left to do.
    assert finetune().main(arguments(data, output, *more)) == 0
    assert len(metrics_log.read_metrics(output)) == len(losses)


@pytest.mark.slow_on_tensorflow
def test_finetune_trains_all_weights_on_packed_examples(arguments, data, tmp_path):
    more = ("--epochs", 3, "--pack", "--learning-rate", 1e-3, "--export", "model")
    assert finetune().main(arguments(data, tmp_path, *more)) == 0
    assert not (tmp_path / "adapters").exists()
    first, *_, last = metrics_log.read_validation(tmp_path)
    assert last["loss"] < first["loss"]


@pytest.mark.slow_on_tensorflow
def test_finetune_on_quantized_weights_exports_what_was_trained(
    small, arguments, data, tmp_path
):
    more = ("--lora-rank", 2, "--quantization", "int4", "--epochs", 2)
    assert finetune().main(arguments(data, tmp_path, *more)) == 0
    lm = OpenLlamaCausalLM.from_preset(str(small), quantization="int4")
    plain = logits_of(lm)
    lm = OpenLlamaCausalLM.from_preset(str(small), quantization="int4")
    lm.load_adapters(tmp_path / "adapters")
    trained = logits_of(lm)
    merged = logits_of(OpenLlamaCausalLM.from_preset(str(tmp_path / "model")))
    np.testing.assert_allclose(merged, trained, atol=1e-4)
    assert np.abs(trained - plain).max() > 1e-3


@pytest.mark.backend_free
@pytest.mark.parametrize("source", ["keras", "gguf"])
def test_finetune_trains_adapters_on_weights_that_files_have_quantized(
    source, small, arguments, data, tmp_path, capsys
):
    lm = OpenLlamaCausalLM.from_preset(str(small), quantization="int8")
    if source == "keras":
        preset = tmp_path / "int8"
        lm.save_to_preset(preset)
    else:
        preset = tmp_path / "int8.gguf"
        lm.export_to_gguf(preset, quantization="q8_0")
    more = ("--preset", preset, "--epochs", 1, "--export", "none")
    flags = arguments(data, tmp_path / "run", *more)
    assert "Quantized weights cannot be trained" in error_of(capsys, *flags)
    assert not (tmp_path / "run").exists()
    assert finetune().main([*flags, "--lora-rank", "2"]) == 0


# ----- Resuming


def start(arguments, **environment):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env={
            **os.environ,
            **{"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_of(output):
    path = Path(output, "metrics.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


LONG = ("--lora-rank", 4, "--epochs", 15, "--save-every", 5, "--export", "none")


@pytest.fixture(scope="module")
def uninterrupted(arguments, data, tmp_path_factory):
    """The directory of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert finetune().main(arguments(data, directory, *LONG)) == 0
    return directory


@pytest.mark.backend_free
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "end", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_finetune_resumes_bit_exactly_after_a_signal(
    end, arguments, data, uninterrupted, tmp_path, capsys
):
    stopped = start(arguments(data, tmp_path / "stopped", *LONG))
    deadline = time.monotonic() + 200
    while steps_of(tmp_path / "stopped") < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    stopped.send_signal(end)
    code = stopped.wait(120)
    assert code == (75 if end == signal.SIGTERM else -signal.SIGKILL)
    assert 12 <= steps_of(tmp_path / "stopped") < steps_of(uninterrupted), (
        "it was complete"
    )
    assert finetune().main(arguments(data, tmp_path / "stopped", *LONG)) == 0
    assert "Resuming from the checkpoint of step" in capsys.readouterr().out
    for read in (metrics_log.read_metrics, metrics_log.read_validation):
        expected, found = read(uninterrupted), read(tmp_path / "stopped")
        assert [(r["step"], r["loss"]) for r in found] == [
            (r["step"], r["loss"]) for r in expected
        ]
    (*_, last), _ = checkpoints(uninterrupted)
    assert digests(tmp_path / "stopped", last) == digests(uninterrupted, last)
    samples = [
        (d / "samples.txt").read_text() for d in (uninterrupted, tmp_path / "stopped")
    ]
    assert samples[0] == samples[1] and "sample 1, after" in samples[0]


# ----- Errors


def error_of(capsys, *arguments):
    try:
        code = finetune().main(list(arguments))
    except SystemExit as error:
        code = error.code
    assert code == 2
    return capsys.readouterr().err


SHORT = ("--lora-rank", 2, "--epochs", 0.5, "--export", "none", "--save-every", 1)


@pytest.fixture(scope="module")
def short_run(arguments, data, tmp_path_factory):
    """The directory of a complete run of `SHORT`, which tests copy."""
    directory = tmp_path_factory.mktemp("short") / "run"
    assert finetune().main(arguments(data, directory, *SHORT)) == 0
    return directory


@pytest.mark.backend_free
def test_finetune_rejects_changed_settings_of_a_run(
    short_run, arguments, data, tmp_path, capsys
):
    output = shutil.copytree(short_run, tmp_path / "run")
    changed = arguments(data, output, "--lora-rank", 3, *SHORT[2:])
    assert "lora_rank was 2 and is 3" in error_of(capsys, *changed)
    run = json.loads((output / "run.json").read_text())
    run["recipe"]["int8"] = {"value": True}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text(json.dumps(run))
    flags = arguments(data, tmp_path / "old", *SHORT, "--quantization", "int8")
    message = "quantization was int8 of version 0.2 and is int8"
    assert message in error_of(capsys, *flags)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("cold", "warm"))
    assert "data was {'examples'" in error_of(capsys, *arguments(other, output, *SHORT))


@pytest.mark.backend_free
def test_finetune_falls_back_from_a_damaged_checkpoint(
    short_run, arguments, data, tmp_path, caplog, capsys
):
    output = shutil.copytree(short_run, tmp_path / "run")
    before, last = checkpoints(output)[1]
    newest = output / "checkpoints" / str(last)
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert finetune().main(arguments(data, output, *SHORT)) == 0
    assert f"checkpoint of step {last} is damaged" in caplog.text
    assert f"Resuming from the checkpoint of step {before}" in capsys.readouterr().out
    found, expected = map(metrics_log.read_metrics, (output, short_run))
    assert [r["loss"] for r in found] == [r["loss"] for r in expected]


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data", "missing.jsonl"), "--data: the file missing.jsonl does not exist"),
        (("--quantization", "int8"), "--quantization needs adapters"),
        (("--int8",), "--quantization needs adapters"),
        (("--lora-targets", "key"), "--lora-targets needs adapters"),
        (("--export", "adapters"), "--export adapters needs adapters"),
        (("--dtype", "bfloat16"), "Use --dtype mixed_bfloat16"),
        *(
            (("--backend", "torch", *more), f"{more[0]} needs the JAX backend")
            for more in [
                ("--micro-batches", 2),
                ("--rematerialize", "full"),
                ("--mesh", "fsdp=2"),
                ("--profile", "1:2"),
            ]
        ),
        (("--prompt", "Q: {}"), "keys in braces"),
        (("--learning-rate", 0), "--learning-rate must be a positive"),
        (("--micro-batches", 3), "must divide --batch-size"),
        (("--learning-rate", 1e300), "--learning-rate must be a positive number"),
        *(
            (("--epochs", value), "--epochs must be a positive number")
            for value in (0, "nan", 1e300)
        ),
        (
            ("--validation-fraction", 1),
            "--validation-fraction must be a number in [0, 1)",
        ),
        (("--warmup", 100), "--warmup must be in [0, 1), a fraction of all steps."),
        (("--warmup", -0.5), "--warmup must be in [0, 1)"),
        (("--weight-decay", -1), "--weight-decay must be a non-negative number"),
        (("--seed", -1), "--seed must be a non-negative integer"),
        (("--max-new-tokens", 0), "--max-new-tokens must be a positive integer"),
        (("--sequence-length", 2), "(--data) have no target tokens"),
        (
            ("--lora-rank", 2, "--lora-alpha", -1),
            "--lora-alpha must be a positive number",
        ),
        (("--lora-rank", 10**8), "--lora-rank must be at most 96"),
        (("--prompt", "{"), "--prompt: Single '{'"),
        (("--sample-prompt", ""), "--sample-prompt must not be empty"),
        (("--data", "."), "--data: . is a directory. Name a file."),
        (("--chat-template", "none"), "--chat-template: the file none does not exist"),
        (("--validation", "."), "--validation: . is a directory"),
        (("--sequence-length", 0), "--sequence-length must be a positive integer"),
        (("--preset", "nanno"), "Did you mean"),
        (("--lora-targets", "querry"), "querry"),
        (("--response", " {answer}"), "does not have 'answer'"),
        (("--mesh", "fsdp=3"), "--mesh: the product of the sizes must be 1"),
        (("--preset", "nano", "--sequence-length", 5000), "the context length of nano"),
        (("--preset", "hf://nobody/nothing"), "'hf://nobody/nothing' is unavailable"),
        # Checked before any download.
        (("--preset", "13b", "--batch-size", 512), "Training needs about"),
    ],
)
def test_finetune_rejects_invalid_arguments(
    more, message, arguments, data, tmp_path, capsys
):
    assert message in error_of(capsys, *arguments(data, tmp_path / "run", *more))
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sample-prompt", "word " * 600), "--sample-prompt has a prompt of"),
        (("--sequence-length", 513), "the context length of"),
    ],
)
def test_finetune_checks_prompts_and_lengths_before_it_loads_weights(
    more, message, arguments, data, tmp_path, capsys, monkeypatch
):
    def load(*_, **__):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr(finetuning, "load_task", load)
    assert message in error_of(capsys, *arguments(data, tmp_path / "run", *more))


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("USER: {content}", "is not valid JSON: "),
        ("USER: {content}", "It must map roles to texts with {content}, such as {"),
        ('["user", "assistant"]', 'a dict of strings with the role "assistant"'),
        ("null", 'a dict of strings with the role "assistant"'),
        ('{"assistant": "BOT:"}', "{content} exactly once"),
    ],
)
def test_finetune_names_the_file_of_an_invalid_chat_template(
    text, message, arguments, data, tmp_path, capsys
):
    path = tmp_path / "template.json"
    path.write_text(text)
    more = ("--chat-template", path)
    error = error_of(capsys, *arguments(data, tmp_path / "run", *more))
    assert f"--chat-template: {path}" in error and message in error


@pytest.mark.backend_free
def test_finetune_names_the_extra_of_a_backend_that_is_not_installed(
    arguments, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = arguments(data, tmp_path / "run", "--backend", "torch")
    from keras_openllama.cli.finetune import main

    assert main(command) == 2
    assert "pip install 'keras-openllama[torch]'" in capsys.readouterr().err


@pytest.mark.backend_free
def test_finetune_names_the_flag_of_a_missing_file(arguments, data, tmp_path, capsys):
    command = arguments(data, tmp_path / "run", "--validation", "missing.jsonl")
    message = "error: --validation: the file missing.jsonl does not exist"
    assert message in error_of(capsys, *command)


@pytest.mark.backend_free
def test_parse_arguments_accepts_renamed_flags(capsys):
    old = ["--length", "8", "--validation-share", "0.1", "--question", "Who?"]
    _, options = parse_arguments(old, "finetune")
    values = options.sequence_length, options.validation_fraction
    assert (*values, options.sample_prompt) == (8, 0.1, ["Who?"])
    assert capsys.readouterr().err.count("was renamed to") == 3


@pytest.mark.backend_free
def test_estimate_needs_neither_preset_nor_data(capsys):
    assert finetune().main(["--estimate", "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "open_llama_13b" in printed and "2 sequences of 512 tokens" in printed


@pytest.mark.backend_free
@pytest.mark.parametrize(("preset", "length"), [("nano", 256), ("3b_v2", 512)])
def test_default_sequence_length_fits_the_context(preset, length):
    command = ["--preset", preset, "--lora-rank", "2", "--data", "pairs.jsonl"]
    _, options = parse_arguments(command, "finetune")
    assert make_config(options).sequence_length == length


@pytest.mark.backend_free
def test_estimate_of_a_preset_is_that_of_its_run(capsys):
    def estimate(*more):
        command = ["--estimate", "--preset", "nano", "--sequence-length", 64, *more]
        assert finetune().main(list(map(str, command))) == 0
        return capsys.readouterr().out

    config = presets.find("nano").config
    options = dict(sequence_length=64, lora_rank=4, targets=["key"])
    expected = estimate_memory(config, "bfloat16", **options, micro_batches=2)
    flags = ("--lora-rank", 4, "--lora-targets", "key", "--dtype", "bfloat16")
    assert expected.table() in estimate(*flags, "--micro-batches", 2)
    assert estimate(*flags) != estimate(*flags, "--quantization", "int8")
    assert estimate(*flags, "--int8") == estimate(*flags, "--quantization", "int8")


@pytest.mark.backend_free
def test_estimate_of_a_preset_that_does_not_fit_fails(capsys):
    command = ["--estimate", "--preset", "13b", "--batch-size", "512"]
    assert "Training needs about" in error_of(capsys, *command)


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "more",
    [
        ("--lora-rank", "64"),
        ("--lora-targets", "key"),
        ("--quantization", "int8"),
        ("--dtype", "float32"),
        ("--micro-batches", "2"),
        ("--mesh", "fsdp=4"),
    ],
)
def test_estimate_of_all_presets_rejects_flags_of_one_run(more, capsys):
    message = f"{more[0]} applies to the estimate of one run: add --preset"
    assert message in error_of(capsys, "--estimate", *more)


@pytest.mark.backend_free
def test_finetune_ends_if_the_loss_diverges(arguments, data, tmp_path, capsys):
    more = ("--lora-rank", 2, "--epochs", 30, "--learning-rate", 3e38)
    assert finetune().main(arguments(data, tmp_path, *more)) == 70
    error = capsys.readouterr().err
    assert "not finite" in error and "--learning-rate" in error
    assert any(record["skipped"] for record in metrics_log.read_metrics(tmp_path))
    assert not checkpoints(tmp_path)[1]


@pytest.mark.slow_on_tensorflow
def test_finetune_restarts_a_run_without_checkpoints(
    arguments, data, tmp_path, monkeypatch
):
    more = ("--lora-rank", 2, "--epochs", 0.5, "--export", "none")
    with monkeypatch.context() as patch:
        # After the validation and the samples before the first step.
        patch.setattr(StepReporter, "add", lambda *_: 1 / 0)
        assert finetune().main(arguments(data, tmp_path, *more)) == 1
    assert len(metrics_log.read_validation(tmp_path)) == 1
    assert finetune().main(arguments(data, tmp_path, *more)) == 0
    assert (tmp_path / "samples.txt").read_text().count("sample 1, before") == 1


@pytest.mark.slow_on_tensorflow
def test_finetune_resumes_after_an_error_in_the_last_samples(
    arguments, data, tmp_path, monkeypatch
):
    more = ("--lora-rank", 2, "--epochs", 0.5, "--export", "none")
    text = StepReporter.log_sample

    def broken(self, tag, *rest, **options):
        if "after" in tag:
            raise UnicodeError("the terminal cannot encode the text")
        text(self, tag, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StepReporter, "log_sample", broken)
        assert finetune().main(arguments(data, tmp_path, *more)) == 1
    losses = [r["loss"] for r in metrics_log.read_metrics(tmp_path)]
    assert finetune().main(arguments(data, tmp_path, *more)) == 0
    assert [r["loss"] for r in metrics_log.read_metrics(tmp_path)] == losses
    assert "sample 1, after" in (tmp_path / "samples.txt").read_text()


@first_on_tensorflow(
    "weights",
    [
        pytest.param(
            (),
            marks=pytest.mark.skipif(
                keras.config.backend() == "jax",
                reason="JAX resumes such a run after a signal, above.",
            ),
        ),
        ("--quantization", "int4"),
    ],
    ids=len,
)
def test_finetune_resumes_bit_exactly_on_every_backend(
    weights, arguments, data, tmp_path
):
    more = ("--lora-rank", 2, "--epochs", 0.7, "--export", "none", "--save-every", 1)
    more = (*more, *weights)
    complete = tmp_path / "complete"
    assert finetune().main(arguments(data, complete, *more)) == 0
    resumed = copy_without_last_checkpoint(complete, tmp_path / "resumed")
    assert finetune().main(arguments(data, resumed, *more)) == 0
    assert results_of(resumed) == results_of(complete)


@pytest.mark.backend_free
def test_finetune_on_a_mesh_equals_one_device(arguments, data, tmp_path):
    more = ("--lora-rank", 2, "--epochs", 1, "--export", "none")
    assert finetune().main(arguments(data, tmp_path / "one", *more)) == 0
    flags = xla_flags(devices=4)
    more = (*more, "--mesh", "data=2,fsdp=2", "--profile", "2:3")
    process = start(arguments(data, tmp_path / "four", *more), XLA_FLAGS=flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    losses = [
        [r["loss"] for r in metrics_log.read_metrics(tmp_path / n)]
        for n in ("one", "four")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert list((tmp_path / "four" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow_on_tensorflow
def test_finetune_reports_validation_by_file(arguments, data, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("opposite", "contrary"))
    output = tmp_path / "run"
    more = ("--epochs", 0.5, "--validation-fraction", 0.5, "--export", "none")
    command = arguments(data, output, *more)
    command.insert(command.index(str(data)), str(other))
    assert finetune().main(command) == 0
    last = metrics_log.read_validation(output)[-1]
    assert {*last["sources"]} == {"opposites", "other"}
    losses = [source["loss"] for source in last["sources"].values()]
    assert min(losses) <= last["loss"] <= max(losses)


@pytest.mark.slow_on_tensorflow
def test_from_preset_loads_full_finetuning_runs_and_explains_lora_runs(
    arguments, data, small, tmp_path
):
    preset = shutil.copytree(small, tmp_path / "preset")
    task = json.loads((preset / "task.json").read_text())
    task["config"]["end_token_ids"] = [77]
    (preset / "task.json").write_text(json.dumps(task))
    more = ("--epochs", 0.5, "--preset", preset)
    assert finetune().main(arguments(data, tmp_path / "all", *more)) == 0
    found = OpenLlamaCausalLM.from_preset(str(tmp_path / "all"))
    expected = OpenLlamaCausalLM.from_preset(str(tmp_path / "all" / "model"))
    # That of the model, and that of the examples.
    assert sorted(found.end_token_ids) == sorted(expected.end_token_ids) == [2, 77]
    np.testing.assert_allclose(logits_of(found), logits_of(expected), atol=1e-5)
    more = (*more, "--lora-rank", 2, "--export", "none")
    assert finetune().main(arguments(data, tmp_path / "lora", *more)) == 0
    with pytest.raises(ValueError, match=r"fine-tuning run .*lora/model"):
        OpenLlamaCausalLM.from_preset(str(tmp_path / "lora"))


@pytest.mark.parametrize("kind", ["lora", "all"])
def test_finetune_rejects_runs_of_version_0_1(kind, arguments, data, tmp_path, capsys):
    run = shutil.copytree(RUNS_0_1 / kind, tmp_path / "run")
    assert "fine-tuning run of a version before 0.2.0" in error_of(
        capsys, *arguments(data, run, "--lora-rank", 2)
    )
    with pytest.raises(ValueError, match=r"fine-tuning run .*run/model"):
        OpenLlamaCausalLM.from_preset(str(run))
