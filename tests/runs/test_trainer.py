"""Trainer: logs, resumed runs, skipped steps, damaged checkpoints, changed settings."""

import hashlib
import json
import os
import resource
import shutil
import signal
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from pretraining_runs import (
    arrays,
    cache_directory,
    checkpoints,
    compilation_cached,
    copy_without_last_checkpoint,
    digests,
    records,
    results_of,
    small_data,
    small_model,
)

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM, presets
from keras_openllama.data.token_stream import TokenStream
from keras_openllama.distribution import check_hosts
from keras_openllama.runs import interruption, jax_train_program, recipe, run_directory
from keras_openllama.runs.interruption import DataReadError
from keras_openllama.runs.jax_train_state import JaxTrainState
from keras_openllama.runs.pretraining import PROMPTS, pretrain
from keras_openllama.runs.step_reporter import StepReporter
from keras_openllama.runs.token_data import TokenValidation
from keras_openllama.runs.trainer import RunOptions
from keras_openllama.training import train_step_jax

pytestmark = pytest.mark.backend_free

NANO = "open_llama_nano"
LENGTH, ROWS, STEPS = 32, 4, 12
SETTINGS = {
    "sequence_length": LENGTH,
    "batch_size": ROWS,
    "steps": STEPS,
    "warmup_steps": 2,
    "save_every": 3,
    "validate_every": 6,
    "validation_batches": 1,
    "sample_every": 0,
    "max_skipped_steps": 3,
}


@pytest.fixture(scope="module", autouse=True)
def nano_is_small():
    with small_model():
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    with compilation_cached(cache_directory(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory)


@pytest.fixture(scope="module")
def run(data):
    """Starts or resumes a run; returns the result of `pretrain` and logged lines."""

    def run(output, run_options=None, **settings):
        resolved = recipe.resolve_recipe(NANO, overrides={**SETTINGS, **settings})
        lines = []
        chosen = {"data": data, **(run_options or {})}
        tokens = chosen.pop("data")
        options = RunOptions(str(output), report=lines.append, **chosen)
        return pretrain(resolved, tokens, options), lines

    return run


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """The directory of a run that was never interrupted."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(output)[0] is None
    return output


@pytest.fixture
def interrupted(uninterrupted, tmp_path):
    """The same run, killed while it wrote its last checkpoint."""
    return copy_without_last_checkpoint(uninterrupted, tmp_path / "run")


@pytest.fixture
def stream(data):
    return TokenStream(data, LENGTH, ROWS, seed=0)


# ----- Files of a run


def test_metrics_have_a_record_of_each_step(uninterrupted, stream):
    found = records(uninterrupted)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    assert [r["tokens"] for r in found] == [s * ROWS * LENGTH for s in range(1, 13)]
    for name in ("loss", "grad_norm", "learning_rate", "param_norm"):
        values = [r[name] for r in found]
        # Values have full precision, and vary.
        assert all(float(np.float32(value)) == value for value in values)
        assert len({*values}) > 6
    times = ("data_seconds", "compute_seconds", "checkpoint_seconds")
    assert all(r[name] >= 0 for r in found for name in times)
    for r in found:
        assert r["tokens_per_second"] == r["tokens_per_second_per_chip"] > 0
        assert "mfu" not in r  # The peak of this CPU is not known.
        assert 0 < r["goodput"] <= 1
    assert not any(r["skipped"] for r in found)
    rows = [json.dumps(stream.sequences_read(step)).encode() for step in range(STEPS)]
    assert [r["batch"] for r in found] == [
        hashlib.sha256(text).hexdigest()[:16] for text in rows
    ]


def test_learning_rates_follow_the_schedule_of_the_recipe(uninterrupted):
    rates = [r["learning_rate"] for r in records(uninterrupted)]
    peak, last = 3e-3, 3e-4  # Of the preset nano.
    decay = [(1 + np.cos(np.pi * k / 10)) / 2 for k in range(1, 11)]
    wanted = [peak / 2, peak, *(last + (peak - last) * d for d in decay)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-5)


def test_the_first_loss_is_that_of_the_model_initialized_from_the_seed(
    uninterrupted, stream
):
    keras.utils.set_random_seed(0)
    config = presets.find(NANO).config
    lm = OpenLlamaCausalLM(OpenLlamaBackbone(**config, dtype="float32"), None)
    x, y, weights = stream.batch(0)
    logs = np.asarray(jax.jit(lambda x: jax.nn.log_softmax(lm(x)))(x), "float64")
    chosen = np.take_along_axis(logs, y[..., None], -1)[..., 0]
    loss = -(chosen * weights).sum() / weights.sum()
    assert records(uninterrupted)[0]["loss"] == pytest.approx(loss, rel=1e-6)


def test_validation_is_logged_by_source_and_after_the_last_step(uninterrupted):
    lines = (uninterrupted / "validation.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(r["step"], r["tokens"]) for r in found] == [
        (step, step * ROWS * LENGTH) for step in (6, 12)
    ]
    losses = [r["loss"] for r in found]
    assert losses == sorted(losses, reverse=True)  # It learns.
    assert losses[-1] < 0.95 * np.log(3072)
    for r in found:
        assert {*r["sources"]} == {"prose", "manual"}
        losses = [source["loss"] for source in r["sources"].values()]
        assert min(losses) <= r["loss"] <= max(losses)
        assert r["perplexity"] == pytest.approx(np.exp(r["loss"]))


def test_train_writes_loss_plot_and_tensorboard_events(uninterrupted):
    assert (uninterrupted / "loss.png").read_bytes().startswith(b"\x89PNG")
    [events] = (uninterrupted / "tensorboard").iterdir()
    written = events.read_bytes()
    for tag in (b"train/loss", b"train/grad_norm", b"validation/loss/prose"):
        assert tag in written


def test_samples_do_not_affect_training(uninterrupted, run, tmp_path):
    run(tmp_path, sample_every=6)
    found, wanted = results_of(tmp_path), results_of(uninterrupted)
    text = found.pop("samples")
    for step in (6, 12):
        for prompt in PROMPTS:
            assert f"step {step}, {prompt.splitlines()[0]}\n" in text
    assert wanted.pop("samples") == ""
    assert found == wanted


def test_train_retains_the_newest_checkpoints(uninterrupted):
    assert checkpoints(uninterrupted) == ([9, 12], [9, 12])


def test_train_retains_milestones_between_other_saves(run, tmp_path):
    run(tmp_path, save_every=5, keep_last=1, milestone_every=4)
    assert checkpoints(tmp_path)[1] == [4, 8, 12]


def test_open_run_logs_devices_and_mesh(run, uninterrupted):
    _, lines = run(uninterrupted)
    mesh = "data 1, fsdp 1, model 1 (heuristic: one device; FSDP on more)"
    assert f"1 x cpu in 1 process(es): {mesh}" in lines


def test_train_raises_data_read_error_if_data_cannot_be_read(
    run, interrupted, monkeypatch
):
    def broken(self, step):
        raise OSError("shard 7 is gone")

    monkeypatch.setattr(TokenStream, "batch", broken)
    with pytest.raises(DataReadError, match=r"could not be read: .*shard 7 is gone"):
        run(interrupted)


def test_another_seed_changes_initial_weights_and_data_order(
    uninterrupted, run, tmp_path
):
    run(tmp_path, seed=1)
    found, before = records(tmp_path)[0], records(uninterrupted)[0]
    assert found["batch"] != before["batch"]
    assert found["param_norm"] != before["param_norm"]


# ----- Stopping and resuming


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_stops_the_run_after_the_step_and_it_resumes_bit_exactly(
    run, uninterrupted, tmp_path, monkeypatch, number
):
    add = StepReporter.add

    def signalled(self, step, measures):
        add(self, step, measures)
        if step == 5:
            os.kill(os.getpid(), number)

    def without(*_):
        pass

    before = signal.signal(number, without)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(StepReporter, "add", signalled)
            assert run(tmp_path)[0] == number.name
        assert signal.getsignal(number) is without
    finally:
        signal.signal(number, before)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5]
    assert checkpoints(tmp_path) == ([3, 5], [3, 5])
    stopped, lines = run(tmp_path)
    assert stopped is None
    assert "Resuming from the checkpoint of step 5." in lines
    assert results_of(tmp_path) == results_of(uninterrupted)


def test_train_does_not_change_a_complete_run(uninterrupted, run, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    stopped, lines = run(tmp_path / "run")
    assert stopped is None
    assert lines[-1] == f"The run in {tmp_path / 'run'} is complete."
    names = ("metrics.jsonl", "validation.jsonl", "run.json")
    for name in (*names, "checkpoints/12/checkpoint.json"):
        assert (tmp_path / "run" / name).read_bytes() == (
            uninterrupted / name
        ).read_bytes()


def test_open_run_raises_if_another_process_trains(run, tmp_path):
    with run_directory.lock_directory(tmp_path):
        with pytest.raises(RuntimeError, match="Another process trains in"):
            run(tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_a_run_killed_during_a_save_resumes_bit_exactly(
    run, uninterrupted, interrupted
):
    # The incomplete checkpoint of step 12 that the kill left behind.
    torn = interrupted / "checkpoints" / "12" / "arrays.orbax-checkpoint-tmp"
    torn.mkdir(parents=True)
    (torn / "part").write_bytes(b"half")
    with open(interrupted / "metrics.jsonl", "a") as log:
        log.write('{"step": 13, "los')
    _, lines = run(interrupted)
    assert "Resuming from the checkpoint of step 9." in lines
    assert results_of(interrupted) == results_of(uninterrupted)
    assert not torn.exists()


@pytest.mark.slow
def test_a_run_in_bfloat16_resumes_bit_exactly(run, tmp_path):
    overrides = dict(precision="mixed_bfloat16", rematerialize="products")
    run(tmp_path / "uninterrupted", **overrides)
    again = copy_without_last_checkpoint(tmp_path / "uninterrupted", tmp_path / "again")
    run(again, **overrides)
    assert results_of(again) == results_of(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_a_run_with_muon_resumes_bit_exactly(run, tmp_path):
    settings = {"optimizer": "muon", "steps": 6, "save_every": 2}
    run(tmp_path / "uninterrupted", **settings)
    again = copy_without_last_checkpoint(tmp_path / "uninterrupted", tmp_path / "again")
    _, lines = run(again, **settings)
    assert "Resuming from the checkpoint of step 4." in lines
    assert results_of(again) == results_of(tmp_path / "uninterrupted")


def test_train_raises_if_the_log_cannot_be_written(run, uninterrupted, interrupted):
    lines = (interrupted / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    room = len(b"".join(lines[:10])) + 100  # The disk fills up within the next.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            run(interrupted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints(interrupted) == ([9], [9])
    run(interrupted)
    assert results_of(interrupted) == results_of(uninterrupted)


@pytest.mark.parametrize(
    ("fails", "step"),
    [
        pytest.param("samples", 6, id="samples in between"),
        pytest.param("validation", 12, id="validation at the end"),
        pytest.param("samples", 12, marks=pytest.mark.slow, id="samples at the end"),
        pytest.param(
            "validation", 6, marks=pytest.mark.slow, id="validation in between"
        ),
    ],
)
def test_a_step_is_saved_before_samples_and_validation_that_fail(
    run, uninterrupted, tmp_path, monkeypatch, fails, step
):
    owner, name = {
        "samples": (JaxTrainState, "generate"),
        "validation": (TokenValidation, "measure"),
    }[fails]
    works, calls = getattr(owner, name), []

    def broken(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == step / 6:
            raise MemoryError("no memory left")
        return works(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        with pytest.raises(MemoryError):
            run(tmp_path, sample_every=6)
    assert checkpoints(tmp_path)[1][-1] == step
    _, lines = run(tmp_path, sample_every=6)
    assert f"Resuming from the checkpoint of step {step}." in lines
    found, expected = results_of(tmp_path), results_of(uninterrupted)
    samples, _ = found.pop("samples"), expected.pop("samples")
    assert found == expected
    for prompt in PROMPTS:
        for sampled in (6, 12):
            assert samples.count(f"step {sampled}, {prompt.splitlines()[0]}\n") == 1


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_restored(
    run, uninterrupted, tmp_path, caplog
):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    newest = output / "checkpoints" / "12"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    _, lines = run(output)
    [warning] = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert "step 12" in warning
    assert largest.name in warning
    assert "Resuming from the checkpoint of step 9." in lines
    assert results_of(output) == results_of(uninterrupted)
    assert (output / "checkpoints" / "12.damaged").is_dir()


# ----- Skipped steps


def inject_faults(monkeypatch, stream, faults):
    """Injects faults, functions of loss and gradients, by step."""
    gradients = train_step_jax.compute_gradients
    steps = {}
    for step, fault in faults.items():
        steps.setdefault(fault, []).append(stream.batch(step - 1)[0]["token_ids"])

    def poison(lm, trainable, non_trainable, batch, *options):
        sums, total, grads = gradients(lm, trainable, non_trainable, batch, *options)
        for fault, batches in steps.items():
            same = batch[0]["token_ids"] == np.stack(batches)
            now = same.all(axis=(1, 2)).any()
            loss, bad = fault(sums.loss, grads)
            sums = sums._replace(loss=jnp.where(now, loss, sums.loss))
            pairs = zip(bad, grads, strict=True)
            grads = [jnp.where(now, wrong, right) for wrong, right in pairs]
        return sums, total, grads

    monkeypatch.setattr(train_step_jax, "compute_gradients", poison)


def _gradient_of(value):
    def fault(loss, grads):
        # In a single element of one tensor.
        return loss, [grads[0].at[1, 2].set(value), *grads[1:]]

    return fault


FAULTS = {
    3: _gradient_of(np.nan),
    5: _gradient_of(np.inf),
    6: lambda loss, grads: (loss * np.nan, grads),
    9: lambda loss, grads: (3 * loss, grads),  # A spike.
}


def test_skipped_steps_leave_the_whole_state_unchanged(
    run, tmp_path, monkeypatch, stream
):
    monkeypatch.setattr(jax_train_program, "LOSS_AVERAGE_STEPS", 3)
    inject_faults(monkeypatch, stream, FAULTS)
    run(tmp_path, save_every=1, keep_last=20, spike_threshold=2)
    found = {r["step"]: r for r in records(tmp_path)}
    assert [*found] == list(range(1, STEPS + 1))
    assert [step for step, r in found.items() if r["skipped"]] == [*FAULTS]
    assert np.isfinite(found[3]["loss"])
    assert [found[3]["grad_norm"], found[5]["grad_norm"]] == ["NaN", "Infinity"]
    assert found[6]["loss"] == "NaN"
    for step in range(2, STEPS + 1):
        before, after = digests(tmp_path, step - 1), digests(tmp_path, step)
        changed = {path for path in after if after[path] != before[path]}
        # Either everything changes, including the state of the guard, or nothing.
        assert changed == (set() if step in FAULTS else {*after})
    skipped = (tmp_path / "skipped.jsonl").read_text().splitlines()
    for step, line in zip(FAULTS, skipped, strict=True):
        record = json.loads(line)
        for name in ("step", "loss", "grad_norm", "batch"):
            assert record[name] == found[step][name]
        assert record["sequences"] == json.loads(
            json.dumps(stream.sequences_read(step - 1))
        )


def test_steps_after_a_skipped_one_are_as_if_it_had_not_been_there(
    run, tmp_path, monkeypatch, stream
):
    inject_faults(monkeypatch, stream, {3: FAULTS[3]})
    run(tmp_path / "poisoned")
    # Remove the third batch, so that later ones come a step earlier.
    batch = TokenStream.batch
    monkeypatch.setattr(TokenStream, "batch", lambda self, n: batch(self, n + (n > 1)))
    run(tmp_path / "without")
    poison, without = records(tmp_path / "poisoned"), records(tmp_path / "without")
    assert [r["step"] for r in poison if r["skipped"]] == [3]
    assert not any(r["skipped"] for r in without)
    for after, same in zip(poison[3:], without[2:-1], strict=True):
        for name in ("loss", "grad_norm", "param_norm", "learning_rate"):
            assert after[name] == same[name]


def test_train_raises_after_too_many_skipped_steps_and_the_run_can_resume(
    run, uninterrupted, tmp_path, monkeypatch, stream
):
    with monkeypatch.context() as patch:
        inject_faults(patch, stream, dict.fromkeys(range(5, STEPS + 1), FAULTS[3]))
        with pytest.raises(
            interruption.DivergedError, match="last 3 steps up to step 7 were"
        ):
            run(tmp_path)
    assert [r["skipped"] for r in records(tmp_path)] == [False] * 4 + [True] * 3
    assert checkpoints(tmp_path) == ([3, 6], [3, 6])
    for step in (3, 6):
        found = arrays(tmp_path, step).values()
        assert all(np.isfinite(array).all() for array in found)
    # Without the fault the run resumes from before it; step 6 was skipped.
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    run(tmp_path)
    assert results_of(tmp_path) == results_of(uninterrupted)


def test_train_raises_if_the_validation_loss_is_not_finite(run, tmp_path):
    for _ in range(2):  # Running the command again does not hide it.
        with pytest.raises(
            interruption.DivergedError, match=r"loss of step \d+ is nan"
        ):
            run(tmp_path, learning_rate=1e38, max_skipped_steps=100)


# ----- Changed settings


def test_resuming_rejects_settings_that_change_the_tokens(run, interrupted, data):
    for accept in (False, True):
        with pytest.raises(ValueError, match="batch_size was 4 and is 2"):
            run(interrupted, {"accept_changes": accept}, batch_size=2)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        run(interrupted, {"accept_changes": True}, seed=1)
    other = shutil.copytree(data.directory, interrupted.parent / "data")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["created"] = "another day"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="different run: data was"):
        run(interrupted, {"data": data.open(str(other)), "accept_changes": True})
    assert [r["step"] for r in records(interrupted)] == list(range(1, 13))


def test_resuming_with_another_learning_rate_needs_acceptance(
    run, uninterrupted, interrupted
):
    with pytest.raises(ValueError, match=r"learning_rate was 0\.003 .*accept-changes"):
        run(interrupted, learning_rate=1e-3)
    _, lines = run(interrupted, {"accept_changes": True}, learning_rate=1e-3)
    assert "Changed: learning_rate was 0.003 and is 0.001." in lines
    found, before = records(interrupted), records(uninterrupted)
    assert [r["loss"] for r in found[:9]] == [r["loss"] for r in before[:9]]
    for new, old in zip(found[9:11], before[9:11], strict=True):
        assert new["learning_rate"] < old["learning_rate"]
        assert new["batch"] == old["batch"]
    # The accepted value is now a setting of the run.
    _, lines = run(interrupted, learning_rate=1e-3)
    assert lines[-1].endswith("is complete.")


def test_resuming_with_another_mixture_applies_it_from_the_next_step(
    run, uninterrupted, interrupted
):
    file = interrupted.parent / "mixture.json"
    file.write_text(json.dumps({"name": "m", "sources": {"prose": {"weight": 1}}}))
    with pytest.raises(ValueError, match=r"mixture weights .*accept-changes"):
        run(interrupted, mixture=str(file))
    run(interrupted, {"accept_changes": True}, mixture=str(file))
    same = [
        new["batch"] == old["batch"]
        for new, old in zip(records(interrupted), records(uninterrupted), strict=True)
    ]
    assert same[:9] == [True] * 9
    assert not all(same[9:])


def test_resuming_with_settings_that_do_not_affect_results_needs_no_acceptance(
    run, uninterrupted, interrupted
):
    run(interrupted, save_every=2, keep_last=3, validate_every=4)
    _, complete = checkpoints(interrupted)
    assert complete == [9, 10, 12]
    assert results_of(interrupted)["arrays"] == results_of(uninterrupted)["arrays"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vocabulary_size", 3073, "is 3073, but that of open_llama_nano is 3072"),
        ("vocabulary_size", 500, "is 500, but that of open_llama_nano is 3072"),
        ("keeps_spaces", False, "is False, but that of open_llama_nano is True"),
        ("end_token_id", 3, "is 3, but that of open_llama_nano is 2"),
    ],
)
def test_open_run_rejects_data_of_another_tokenizer(
    run, data, tmp_path, name, value, message
):
    copy = data.open(data.directory)
    copy.manifest["tokenizer"] = {**copy.manifest["tokenizer"], name: value}
    with pytest.raises(ValueError, match=f"{name} {message}"):
        run(tmp_path, {"data": copy})


def test_check_hosts_rejects_processes_that_would_share_sequences():
    def mesh(*processes):
        devices = [types.SimpleNamespace(process_index=p) for p in processes]
        shape = {"data": 2, "fsdp": 1, "model": 2}
        return types.SimpleNamespace(
            devices=np.array(devices).reshape(2, 1, 2), shape=shape
        )

    check_hosts(mesh(0, 0, 1, 1))
    with pytest.raises(ValueError, match=r"model=2 across processes \[0, 1\]"):
        check_hosts(mesh(0, 1, 0, 1))


def test_open_run_rejects_a_remote_output(run):
    with pytest.raises(ValueError, match="gs://bucket/run"):
        run("gs://bucket/run")


def test_open_run_rejects_a_mesh_that_does_not_fit(run, tmp_path):
    with pytest.raises(ValueError, match=r"data \* fsdp = 3 does not divide"):
        run(tmp_path, {"mesh": {"data": 3, "fsdp": 1, "model": 1}})
    with pytest.raises(ValueError, match="must be the number of devices, 1"):
        run(tmp_path, {"mesh": {"data": 2, "fsdp": 1, "model": 1}})
    assert not (tmp_path / "run.json").exists()


# ----- The profiler


@pytest.mark.parametrize(("steps", "logged"), [((8, 10), 9), ((11, 100), STEPS)])
def test_profile_records_the_requested_steps_that_the_run_takes(
    run, interrupted, uninterrupted, monkeypatch, steps, logged
):
    # The run resumes from step 9; step 10 is reported while the next one runs.
    stop, ends = jax.profiler.stop_trace, []

    def noted():
        ends.append(len(records(interrupted)))
        stop()

    monkeypatch.setattr(jax.profiler, "stop_trace", noted)
    run(interrupted, {"profile": steps})
    assert ends == [logged]
    [trace] = Path(interrupted, "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    assert results_of(interrupted) == results_of(uninterrupted)
