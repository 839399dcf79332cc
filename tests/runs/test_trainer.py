"""A run within this process: stopped, resumed, poisoned, damaged, changed."""

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
    course,
    digests,
    records,
    rewound,
    small_data,
    small_model,
)

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM, presets
from keras_openllama.data.token_stream import TokenStream
from keras_openllama.distribution import check_hosts
from keras_openllama.runs import interruption, jax_train_program, recipe, run_directory
from keras_openllama.runs.interruption import DataReadError
from keras_openllama.runs.pretraining import PROMPTS, pretrain
from keras_openllama.runs.step_reporter import StepReporter
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
    """Runs, or goes on; returns what `pretrain` does, and the lines it said."""

    def run(output, request=None, **settings):
        resolved = recipe.resolve_recipe(NANO, overrides={**SETTINGS, **settings})
        lines = []
        chosen = {"data": data, **(request or {})}
        tokens = chosen.pop("data")
        options = RunOptions(str(output), report=lines.append, **chosen)
        return pretrain(resolved, tokens, options), lines

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The directory of a run that nothing has disturbed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run(output)[0] is None
    return output


@pytest.fixture
def cut_short(whole, tmp_path):
    """The same run, killed while it wrote its last checkpoint."""
    return rewound(whole, tmp_path / "run")


@pytest.fixture
def stream(data):
    return TokenStream(data, LENGTH, ROWS, seed=0)


# ----- What a run writes


def test_the_log_has_a_record_of_each_step(whole, stream):
    found = records(whole)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    assert [r["tokens"] for r in found] == [s * ROWS * LENGTH for s in range(1, 13)]
    for name in ("loss", "grad_norm", "learning_rate", "param_norm"):
        values = [r[name] for r in found]
        # Every bit is there, and not one value all the time.
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


def test_learning_rates_are_those_of_the_recipe(whole):
    rates = [r["learning_rate"] for r in records(whole)]
    peak, last = 3e-3, 3e-4  # Nano's.
    decay = [(1 + np.cos(np.pi * k / 10)) / 2 for k in range(1, 11)]
    wanted = [peak / 2, peak, *(last + (peak - last) * d for d in decay)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-5)


def test_the_first_loss_is_that_of_the_model_that_the_seed_makes(whole, stream):
    keras.utils.set_random_seed(0)
    config = presets.find(NANO).config
    lm = OpenLlamaCausalLM(OpenLlamaBackbone(**config, dtype="float32"), None)
    x, y, weights = stream.batch(0)
    logs = np.asarray(jax.jit(lambda x: jax.nn.log_softmax(lm(x)))(x), "float64")
    chosen = np.take_along_axis(logs, y[..., None], -1)[..., 0]
    loss = -(chosen * weights).sum() / weights.sum()
    assert records(whole)[0]["loss"] == pytest.approx(loss, rel=1e-6)


def test_validation_is_by_source_and_at_the_end(whole):
    lines = (whole / "validation.jsonl").read_text().splitlines()
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


def test_pictures_and_events_are_there(whole):
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    [events] = (whole / "tensorboard").iterdir()
    written = events.read_bytes()
    for tag in (b"train/loss", b"train/grad_norm", b"validation/loss/prose"):
        assert tag in written


def test_the_model_writes_samples_and_is_not_changed_by_it(whole, run, tmp_path):
    run(tmp_path, sample_every=6)
    found, wanted = course(tmp_path), course(whole)
    text = found.pop("samples")
    for step in (6, 12):
        for prompt in PROMPTS:
            assert f"step {step}, {prompt.splitlines()[0]}\n" in text
    assert wanted.pop("samples") == ""
    assert found == wanted


def test_the_newest_checkpoints_are_kept(whole):
    assert checkpoints(whole) == ([9, 12], [9, 12])


def test_milestones_are_kept_whatever_is_saved_beside_them(run, tmp_path):
    run(tmp_path, save_every=5, keep_last=1, milestone_every=4)
    assert checkpoints(tmp_path)[1] == [4, 8, 12]


def test_it_says_what_it_runs_on(run, whole):
    _, lines = run(whole)
    mesh = "data 1, fsdp 1, model 1 (heuristic: one device; FSDP on more)"
    assert f"1 x cpu in 1 process(es): {mesh}" in lines


def test_data_that_cannot_be_read_is_no_matter_of_the_disk(run, cut_short, monkeypatch):
    def broken(self, step):
        raise OSError("shard 7 is gone")

    monkeypatch.setattr(TokenStream, "batch", broken)
    with pytest.raises(DataReadError, match=r"could not be read: .*shard 7 is gone"):
        run(cut_short)


def test_another_seed_is_another_model_and_another_order(whole, run, tmp_path):
    run(tmp_path, seed=1)
    found, before = records(tmp_path)[0], records(whole)[0]
    assert found["batch"] != before["batch"]
    assert found["param_norm"] != before["param_norm"]


# ----- Stopped, and gone on with


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_its_step_and_the_run_goes_on(
    run, whole, tmp_path, monkeypatch, number
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
    assert course(tmp_path) == course(whole)


def test_a_complete_run_says_so_and_stays_as_it_is(whole, run, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    stopped, lines = run(tmp_path / "run")
    assert stopped is None
    assert lines[-1] == f"The run in {tmp_path / 'run'} is complete."
    names = ("metrics.jsonl", "validation.jsonl", "run.json")
    for name in (*names, "checkpoints/12/checkpoint.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_one_process_at_a_time(run, tmp_path):
    with run_directory.lock_directory(tmp_path):
        with pytest.raises(RuntimeError, match="Another process trains in"):
            run(tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_a_run_cut_short_in_a_save_ends_as_one_that_was_not(run, whole, cut_short):
    # What the kill has left of the checkpoint of step 12.
    torn = cut_short / "checkpoints" / "12" / "arrays.orbax-checkpoint-tmp"
    torn.mkdir(parents=True)
    (torn / "part").write_bytes(b"half")
    with open(cut_short / "metrics.jsonl", "a") as log:
        log.write('{"step": 13, "los')
    _, lines = run(cut_short)
    assert "Resuming from the checkpoint of step 9." in lines
    assert course(cut_short) == course(whole)
    assert not torn.exists()


def test_a_run_in_bfloat16_goes_on_to_the_same_bits(run, tmp_path):
    overrides = dict(precision="mixed_bfloat16", rematerialize="products")
    run(tmp_path / "whole", **overrides)
    again = rewound(tmp_path / "whole", tmp_path / "again")
    run(again, **overrides)
    assert course(again) == course(tmp_path / "whole")


def test_a_run_with_muon_goes_on_to_the_same_end(run, tmp_path):
    settings = {"optimizer": "muon", "steps": 6, "save_every": 2}
    run(tmp_path / "whole", **settings)
    again = rewound(tmp_path / "whole", tmp_path / "again")
    _, lines = run(again, **settings)
    assert "Resuming from the checkpoint of step 4." in lines
    assert course(again) == course(tmp_path / "whole")


def test_a_log_that_cannot_be_written_ends_the_run(run, whole, cut_short):
    lines = (cut_short / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    room = len(b"".join(lines[:10])) + 100  # The disk is full amid the next.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            run(cut_short)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints(cut_short) == ([9], [9])
    run(cut_short)
    assert course(cut_short) == course(whole)


def test_finetune_falls_back_from_a_damaged_checkpoint(run, whole, tmp_path, caplog):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    newest = output / "checkpoints" / "12"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    _, lines = run(output)
    [said] = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert "step 12" in said
    assert largest.name in said
    assert "Resuming from the checkpoint of step 9." in lines
    assert course(output) == course(whole)
    assert (output / "checkpoints" / "12.damaged").is_dir()


# ----- Steps that are left out


def poisoned(monkeypatch, stream, faults):
    """Lets steps have faults, functions of the loss and the gradient, by step."""
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
        # In one place of one tensor.
        return loss, [grads[0].at[1, 2].set(value), *grads[1:]]

    return fault


FAULTS = {
    3: _gradient_of(np.nan),
    5: _gradient_of(np.inf),
    6: lambda loss, grads: (loss * np.nan, grads),
    9: lambda loss, grads: (3 * loss, grads),  # A spike.
}


def test_steps_that_are_not_finite_or_a_spike_change_nothing(
    run, tmp_path, monkeypatch, stream
):
    monkeypatch.setattr(jax_train_program, "LOSS_AVERAGE_STEPS", 3)
    poisoned(monkeypatch, stream, FAULTS)
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
        # All of it, the mean of the loss and the count of steps included, or nothing.
        assert changed == (set() if step in FAULTS else {*after})
    skipped = (tmp_path / "skipped.jsonl").read_text().splitlines()
    for step, line in zip(FAULTS, skipped, strict=True):
        record = json.loads(line)
        for name in ("step", "loss", "grad_norm", "batch"):
            assert record[name] == found[step][name]
        assert record["rows"] == json.loads(json.dumps(stream.sequences_read(step - 1)))


def test_the_other_steps_are_as_if_those_had_not_been(
    run, tmp_path, monkeypatch, stream
):
    poisoned(monkeypatch, stream, {3: FAULTS[3]})
    run(tmp_path / "poisoned")
    # The third batch is not there, and those after it come a step earlier.
    batch = TokenStream.batch
    monkeypatch.setattr(TokenStream, "batch", lambda self, n: batch(self, n + (n > 1)))
    run(tmp_path / "without")
    poison, without = records(tmp_path / "poisoned"), records(tmp_path / "without")
    assert [r["step"] for r in poison if r["skipped"]] == [3]
    assert not any(r["skipped"] for r in without)
    for after, same in zip(poison[3:], without[2:-1], strict=True):
        for name in ("loss", "grad_norm", "param_norm", "learning_rate"):
            assert after[name] == same[name]


def test_too_many_in_a_row_end_the_run_and_leave_it_good(
    run, whole, tmp_path, monkeypatch, stream
):
    with monkeypatch.context() as patch:
        poisoned(patch, stream, dict.fromkeys(range(5, STEPS + 1), FAULTS[3]))
        with pytest.raises(
            interruption.DivergedError, match="last 3 steps up to step 7 were"
        ):
            run(tmp_path)
    assert [r["skipped"] for r in records(tmp_path)] == [False] * 4 + [True] * 3
    assert checkpoints(tmp_path) == ([3, 6], [3, 6])
    for step in (3, 6):
        found = arrays(tmp_path, step).values()
        assert all(np.isfinite(array).all() for array in found)
    # The fault is mended, and the same run goes on from before it: at 6 it had skipped.
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    run(tmp_path)
    assert course(tmp_path) == course(whole)


# ----- Refused, or accepted


def test_what_decides_the_tokens_cannot_change(run, cut_short, data):
    for accept in (False, True):
        with pytest.raises(ValueError, match="batch_size was 4 and is 2"):
            run(cut_short, {"accept_changes": accept}, batch_size=2)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        run(cut_short, {"accept_changes": True}, seed=1)
    other = shutil.copytree(data.directory, cut_short.parent / "data")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["created"] = "another day"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="different run: data was"):
        run(cut_short, {"data": data.open(str(other)), "accept_changes": True})
    assert [r["step"] for r in records(cut_short)] == list(range(1, 13))


def test_another_learning_rate_is_to_be_accepted(run, whole, cut_short):
    with pytest.raises(ValueError, match=r"learning_rate was 0\.003 .*accept-changes"):
        run(cut_short, learning_rate=1e-3)
    _, lines = run(cut_short, {"accept_changes": True}, learning_rate=1e-3)
    assert "Changed: learning_rate was 0.003 and is 0.001." in lines
    found, before = records(cut_short), records(whole)
    assert [r["loss"] for r in found[:9]] == [r["loss"] for r in before[:9]]
    for new, old in zip(found[9:11], before[9:11], strict=True):
        assert new["learning_rate"] < old["learning_rate"]
        assert new["batch"] == old["batch"]
    # From now on that is what the run is.
    _, lines = run(cut_short, learning_rate=1e-3)
    assert lines[-1].endswith("is complete.")


def test_another_mixture_counts_from_where_it_was_accepted(run, whole, cut_short):
    file = cut_short.parent / "mixture.json"
    file.write_text(json.dumps({"name": "m", "sources": {"prose": {"weight": 1}}}))
    with pytest.raises(ValueError, match=r"mixture weights .*accept-changes"):
        run(cut_short, mixture=str(file))
    run(cut_short, {"accept_changes": True}, mixture=str(file))
    same = [
        new["batch"] == old["batch"]
        for new, old in zip(records(cut_short), records(whole), strict=True)
    ]
    assert same[:9] == [True] * 9
    assert not all(same[9:])


def test_what_does_not_change_the_course_may_change(run, whole, cut_short):
    run(cut_short, save_every=2, keep_last=3, validate_every=4)
    _, kept = checkpoints(cut_short)
    assert kept == [9, 10, 12]
    assert course(cut_short)["arrays"] == course(whole)["arrays"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("vocabulary_size", 3073, "is 3073, but that of open_llama_nano is 3072"),
        ("vocabulary_size", 500, "is 500, but that of open_llama_nano is 3072"),
        ("keeps_spaces", False, "is False, but that of open_llama_nano is True"),
        ("end_token_id", 3, "is 3, but that of open_llama_nano is 2"),
    ],
)
def test_data_of_another_tokenizer_are_refused(run, data, tmp_path, name, value, says):
    copy = data.open(data.directory)
    copy.manifest["tokenizer"] = {**copy.manifest["tokenizer"], name: value}
    with pytest.raises(ValueError, match=f"{name} {says}"):
        run(tmp_path, {"data": copy})


def test_processes_that_would_share_rows_are_refused():
    def mesh(*processes):
        devices = [types.SimpleNamespace(process_index=p) for p in processes]
        shape = {"data": 2, "fsdp": 1, "model": 2}
        return types.SimpleNamespace(
            devices=np.array(devices).reshape(2, 1, 2), shape=shape
        )

    check_hosts(mesh(0, 0, 1, 1))
    with pytest.raises(ValueError, match=r"model=2, across processes \[0, 1\]"):
        check_hosts(mesh(0, 1, 0, 1))


def test_a_remote_output_is_refused(run):
    with pytest.raises(ValueError, match="gs://bucket/run"):
        run("gs://bucket/run")


def test_a_mesh_that_does_not_fit_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"data \* fsdp = 3 does not divide"):
        run(tmp_path, {"mesh": {"data": 3, "fsdp": 1, "model": 1}})
    with pytest.raises(ValueError, match="must be the number of devices, 1"):
        run(tmp_path, {"mesh": {"data": 2, "fsdp": 1, "model": 1}})
    assert not (tmp_path / "run.json").exists()


# ----- The profiler


@pytest.mark.parametrize(("steps", "logged"), [((8, 10), 9), ((11, 100), STEPS)])
def test_steps_are_recorded_that_are_asked_for_and_there(
    run, cut_short, whole, monkeypatch, steps, logged
):
    # The run goes on from step 9, and that of step 10 is looked at during the next.
    stop, ends = jax.profiler.stop_trace, []

    def noted():
        ends.append(len(records(cut_short)))
        stop()

    monkeypatch.setattr(jax.profiler, "stop_trace", noted)
    run(cut_short, {"profile": steps})
    assert ends == [logged]
    [trace] = Path(cut_short, "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    assert course(cut_short) == course(whole)
