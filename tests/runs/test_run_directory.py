"""A run's directory: description, settings checks, mixture and lock."""

import copy
import importlib.metadata
import json
import os
import subprocess
import sys

import jax
import pytest
from jax.experimental import multihost_utils

from keras_openllama import presets
from keras_openllama.data import mixture as mixtures
from keras_openllama.runs import recipe, run_directory

pytestmark = pytest.mark.backend_free

SECONDS = 60  # Timeout for another process.


def run(preset="nano", mixture=None, **overrides):
    """The description of a run, as process 0 writes it."""
    resolved = recipe.resolve_recipe(preset, overrides=overrides)
    return {
        **resolved.to_json(),
        "architecture": dict(presets.find(preset).config),
        "data": {"manifest_sha256": "0123"},
        "mixture": (mixture or mixtures.load_mixture("v2")).to_json(),
    }


def stored(directory, **options):
    """The same description, written and read again."""
    run_directory.write_run(str(directory), run(**options), b"tokenizer")
    return run_directory.read_run(str(directory))


# --- Reading and writing ---


def test_read_run_returns_what_write_run_wrote_with_versions(tmp_path):
    found = stored(tmp_path)
    versions = found.pop("versions")
    assert found == {"format": 1, **run()}
    assert (tmp_path / "tokenizer.model").read_bytes() == b"tokenizer"
    assert versions == run_directory.installed_versions()
    here = {"python": sys.version.split()[0], "jax": sys.modules["jax"].__version__}
    assert here.items() <= versions.items()
    assert {"keras_openllama", "jaxlib", "orbax-checkpoint", "grain"} <= {*versions}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("changed", [True, False])
def test_write_run_once_synchronizes_processes_and_writes_on_the_first(
    changed, index, tmp_path, monkeypatch
):
    """A process that sees no change waits too."""
    waited = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", waited.append)
    run_directory.write_run_once(
        str(tmp_path), run(), b"tokenizer", run(), ["seed"] * changed, lambda line: None
    )
    assert waited == ["run"]
    assert (tmp_path / "run.json").exists() == (changed and index == 0)


def test_write_run_once_logs_changes_and_writes_new_runs(tmp_path):
    lines = []
    run_directory.write_run_once(str(tmp_path), run(), b"", None, [], lines.append)
    assert (tmp_path / "run.json").exists() and lines == []
    changes = ["seed was 0 and is 1"]
    run_directory.write_run_once(
        str(tmp_path), run(), b"", run(), changes, lines.append
    )
    assert lines == ["Changed: seed was 0 and is 1."]


def test_installed_versions_omits_missing_packages(monkeypatch):
    known = importlib.metadata.version

    def version(name):
        if name == "grain":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = run_directory.installed_versions()
    assert "grain" not in versions and versions["jax"] == known("jax")


def test_read_run_returns_none_without_a_run(tmp_path):
    assert run_directory.read_run(str(tmp_path)) is None
    assert run_directory.read_run(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize("content", ["", '{"format": 1', "[]", "{}", '{"format": 2}'])
def test_read_run_rejects_damaged_files(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        run_directory.read_run(str(tmp_path))


def test_read_run_detects_truncation_at_any_byte(tmp_path):
    stored(tmp_path)
    data = (tmp_path / "run.json").read_bytes()
    for size in range(0, len(data), 97):
        (tmp_path / "run.json").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            run_directory.read_run(str(tmp_path))


# --- check_settings ---


def test_check_settings_accepts_unchanged_settings(tmp_path):
    assert run_directory.check_settings(stored(tmp_path), run()) == []


@pytest.mark.parametrize("accept_changes", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preset", "open_llama_3b"),
        ("architecture", {**presets.find("nano").config, "num_layers": 3}),
        ("data", {"manifest_sha256": "4567"}),
    ],
)
def test_check_settings_rejects_another_model_or_other_data(
    name, value, accept_changes, tmp_path
):
    before, now = stored(tmp_path), {**run(), name: value}
    with pytest.raises(ValueError, match="Choose another output directory") as error:
        run_directory.check_settings(before, now, accept_changes)
    assert f"{name} was {before[name]} and is {value}" in str(error.value)


FIXED = {
    "batch_size": 8,
    "sequence_length": 64,
    "seed": 1,
    "packing": "best_fit",
    "mask_documents": True,
    "optimizer": "muon",
}
NEEDS_ACCEPTANCE = {
    "steps": 123_456,
    "learning_rate": 0.5,
    "final_learning_rate": 1e-9,
    "warmup_steps": 1,
    "beta_1": 0.5,
    "beta_2": 0.5,
    "epsilon": 1e-3,
    "weight_decay": 0.7,
    "clip_norm": 7.0,
    "z_loss": 0.3,
    "spike_threshold": 7.0,
    "precision": "mixed_bfloat16",
}
FREE = {
    "meshes": {"2": {"fsdp": 2}},
    "planned": {"2": {"sequences_per_device": 1, "rematerialize": "full"}},
    "micro_batches": 2,
    "rematerialize": "full",
    "milestone_every": 7,
    "save_every": 7,
    "keep_last": 7,
    "validate_every": 7,
    "validation_batches": 7,
    "sample_every": 7,
    "max_skipped_steps": 7,
}


def changed(name, value):
    """A run with another value for a setting, and the line that reports it."""
    now = run(**{name: value})
    old = run()["recipe"][name]["value"]
    assert now["recipe"][name]["value"] != old
    return now, f"{name} was {old} and is {now['recipe'][name]['value']}"


def test_every_setting_is_fixed_or_affects_results_or_is_free():
    names = [*FIXED, *NEEDS_ACCEPTANCE, *FREE, "mixture"]
    assert sorted(names) == sorted(recipe.SETTINGS)


@pytest.mark.parametrize("accept_changes", [False, True])
@pytest.mark.parametrize("name", FIXED)
def test_check_settings_never_accepts_changes_of_fixed_settings(
    name, accept_changes, tmp_path
):
    now, line = changed(name, FIXED[name])
    with pytest.raises(ValueError, match="Tokens would be repeated") as error:
        run_directory.check_settings(stored(tmp_path), now, accept_changes)
    assert line in str(error.value)


@pytest.mark.parametrize("name", NEEDS_ACCEPTANCE)
def test_check_settings_needs_acceptance_if_results_change(name, tmp_path):
    now, line = changed(name, NEEDS_ACCEPTANCE[name])
    before = stored(tmp_path)
    with pytest.raises(ValueError, match="--accept-changes") as error:
        run_directory.check_settings(before, now)
    assert line in str(error.value)
    assert run_directory.check_settings(before, now, accept_changes=True) == [line]


@pytest.mark.parametrize("name", FREE)
def test_check_settings_reports_changes_of_free_settings(name, tmp_path):
    now, line = changed(name, FREE[name])
    assert run_directory.check_settings(stored(tmp_path), now) == [line]


def test_check_settings_names_all_changes_of_a_kind(tmp_path):
    now = run(weight_decay=0.7, clip_norm=7.0, keep_last=7)
    before = stored(tmp_path)
    with pytest.raises(
        ValueError, match=r"weight_decay was .*; clip_norm was"
    ) as error:
        run_directory.check_settings(before, now)
    assert "keep_last" not in str(error.value)
    assert len(run_directory.check_settings(before, now, True)) == 3


def test_check_settings_ignores_the_source_of_a_value(tmp_path):
    value = run()["recipe"]["batch_size"]["value"]
    now = run(batch_size=value)
    assert now != run()
    assert run_directory.check_settings(stored(tmp_path), now) == []


def test_check_settings_treats_a_setting_newer_than_the_run_as_changed(tmp_path):
    before = stored(tmp_path)
    del before["recipe"]["z_loss"]
    with pytest.raises(ValueError, match="z_loss was None"):
        run_directory.check_settings(before, run())


# --- resumed_mixture ---

EQUAL = mixtures.mixture_from_weights({"web": 1, "code": 1})
OTHER = mixtures.mixture_from_weights({"web": 3, "code": 1})


def test_resumed_mixture_preserves_the_schedule_of_the_run(tmp_path):
    own = EQUAL.with_weights(10, {"web": 3, "code": 1})
    before = stored(tmp_path, mixture=own)
    # The last weights are requested, alone or with the same schedule.
    assert run_directory.resumed_mixture(before, OTHER, 20) == (own, [])
    assert run_directory.resumed_mixture(before, own, 20) == (own, [])


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_resumed_mixture_tolerates_rounding_of_weights(name, tmp_path):
    # Normalization rounds the weights.
    chosen = mixtures.load_mixture(name)
    own, lines = run_directory.resumed_mixture(
        stored(tmp_path, mixture=chosen), chosen, 9
    )
    assert lines == [] and own.names == chosen.names
    assert own.weights_at(9) == pytest.approx(chosen.weights_at(9), rel=1e-12)


def test_resumed_mixture_preserves_the_order_of_sequences(tmp_path):
    names = [f"source {number}" for number in range(8)]
    chosen = mixtures.mixture_from_weights(
        dict(zip(names, (2, 12, 10, 2, 7, 8, 2, 5), strict=True))
    )
    own, _ = run_directory.resumed_mixture(stored(tmp_path, mixture=chosen), chosen, 9)
    before, after = (
        mixtures.Interleaving(mixture.schedule, names).sequences(0, mixtures.PERIOD)[0]
        for mixture in (chosen, own)
    )
    assert (before == after).all()


def test_resumed_mixture_applies_accepted_weights_from_the_next_step(tmp_path):
    before = stored(tmp_path, mixture=EQUAL)
    unchanged = copy.deepcopy(before)
    with pytest.raises(ValueError, match="--accept-changes") as error:
        run_directory.resumed_mixture(before, OTHER, 20)
    assert "0.5" in str(error.value) and "0.75" in str(error.value)
    mixture, [line] = run_directory.resumed_mixture(
        before, OTHER, 20, accept_changes=True
    )
    assert mixture.weights_at(19) == EQUAL.weights_at(0)
    assert mixture.weights_at(20) == OTHER.weights_at(0)
    assert "0.75" in line and "from step 20 on" in line
    assert before == unchanged


@pytest.mark.parametrize(
    "weights", [{"web": 1}, {"web": 1, "code": 1, "books": 1}, {"web": 1, "books": 1}]
)
def test_resumed_mixture_treats_other_sources_as_other_weights(weights, tmp_path):
    before = stored(tmp_path, mixture=EQUAL)
    chosen = mixtures.mixture_from_weights(weights)
    with pytest.raises(ValueError, match="--accept-changes"):
        run_directory.resumed_mixture(before, chosen, 20)


# --- lock_directory ---

HOLDER = """
import sys, time
from keras_openllama.runs import run_directory

with run_directory.lock_directory(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_lock_directory_excludes_a_second_process_until_the_first_ends(tmp_path):
    directory = str(tmp_path / "run")  # Does not exist yet.
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax"},
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(RuntimeError, match=f"Another process trains in {directory}"),
            run_directory.lock_directory(directory),
        ):
            pass
        with run_directory.lock_directory(str(tmp_path / "other")):
            pass
    finally:
        holder.kill()
        holder.communicate(timeout=SECONDS)
    with run_directory.lock_directory(directory):
        pass


def test_lock_directory_is_released_on_errors(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), run_directory.lock_directory(str(tmp_path)):
            with (
                pytest.raises(RuntimeError),
                run_directory.lock_directory(str(tmp_path)),
            ):
                pass
            raise KeyError


def test_write_run_leaves_the_old_run_if_writing_fails(tmp_path, monkeypatch):
    before = stored(tmp_path)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        stored(tmp_path, batch_size=8)
    assert run_directory.read_run(str(tmp_path)) == before
    assert json.loads((tmp_path / "run.json").read_bytes()) == before
