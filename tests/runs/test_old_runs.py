"""Pretraining runs of versions before 0.2.0 load and resume."""

import dataclasses
import shutil

import keras
import numpy as np
import pytest
from checkout import ROOT
from pretraining_runs import arrays, records

from keras_openllama import OpenLlamaCausalLM, presets

OLD = ROOT / "tests" / "fixtures" / "pretraining_run_0_1"
SIZES = {
    "vocabulary_size": 512,
    "num_layers": 2,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_dim": 32,
    "intermediate_dim": 48,
    "max_sequence_length": 64,
}
SETTINGS = {
    "batch_size": 4,
    "sequence_length": 32,
    "save_every": 2,
    "validate_every": 2,
    "validation_batches": 1,
    "sample_every": 0,
    "milestone_every": 0,
    "warmup_steps": 1,
    "keep_last": 1,
}


@pytest.fixture
def tiny_nano(monkeypatch):
    nano = presets.find("open_llama_nano")
    tiny = dataclasses.replace(
        nano,
        config={**nano.config, **SIZES},
        tokenizer={**nano.tokenizer, "keeps_spaces": True},
    )
    monkeypatch.setitem(presets.registry(), nano.name, tiny)


def test_from_preset_loads_a_run_of_the_previous_version():
    lm = OpenLlamaCausalLM.from_preset(str(OLD / "run"))
    kernel = keras.ops.convert_to_numpy(lm.lm_head.kernel)
    stored = arrays(OLD / "run", 4)["['model']['lm_head/kernel']"]
    np.testing.assert_array_equal(kernel, stored)
    assert lm.generate("The import statement", max_new_tokens=4)


@pytest.mark.backend_free
def test_a_run_of_the_previous_version_resumes_like_one_of_this_version(
    tiny_nano, tmp_path
):
    from keras_openllama.data.prepared_data import PreparedData
    from keras_openllama.runs import recipe
    from keras_openllama.runs.pretraining import pretrain
    from keras_openllama.runs.trainer import RunOptions

    # The old run's learning rate decayed over 4 steps; the new run starts likewise.
    for name, stages in {"old": (6,), "new": (4, 6)}.items():
        output = tmp_path / name
        if name == "old":
            shutil.copytree(OLD / "run", output)
        for steps in stages:
            resolved = recipe.resolve_recipe(
                "nano", overrides={**SETTINGS, "steps": steps}
            )
            options = RunOptions(str(output), accept_changes=True, report=lambda _: ())
            data = PreparedData.open(str(OLD / "data"))
            assert pretrain(resolved, data, options) is None
    old, new = records(tmp_path / "old"), records(tmp_path / "new")
    assert [r["step"] for r in old] == [1, 2, 3, 4, 5, 6]
    assert [r["batch"] for r in old] == [r["batch"] for r in new]
    losses = [[r["loss"] for r in run] for run in (old, new)]
    # Bit-exact only if both ran on the same kind of processor.
    np.testing.assert_allclose(*losses, rtol=1e-5)
    found, expected = arrays(tmp_path / "old", 6), arrays(tmp_path / "new", 6)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-5)
