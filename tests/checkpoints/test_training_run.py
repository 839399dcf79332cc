"""Models load from training runs on every backend; damaged checkpoints are detected."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
import transformers
from checkout import ROOT
from fake_devices import run_on_eight_devices
from tiny_models import SHAPES, assert_close, batch
from tokenizer_models import trained_model

from keras_openllama import (
    OpenLlamaBackbone,
    OpenLlamaCausalLM,
    OpenLlamaCausalLMPreprocessor,
    OpenLlamaTokenizer,
)
from keras_openllama.__main__ import main
from keras_openllama.checkpoints import training_run
from keras_openllama.checkpoints.seal import MARKER
from keras_openllama.checkpoints.training_run import TrainingRun
from keras_openllama.convert import convert, easylm

SHAPE = SHAPES[2]  # With grouped-query attention.
VOCABULARY = 512
ARCHITECTURE = {
    "vocabulary_size": VOCABULARY,
    "num_layers": SHAPE.num_layers,
    "num_query_heads": SHAPE.num_query_heads,
    "num_key_value_heads": SHAPE.num_key_value_heads,
    "head_dim": SHAPE.head_dim,
    "hidden_dim": SHAPE.hidden_dim,
    "intermediate_dim": SHAPE.intermediate_dim,
    "max_sequence_length": SHAPE.context,
}
STEPS = (90, 100, 200)  # Sorted as strings, 90 would be the newest.
TEXT = "The import statement"

# Writes the files of a pretraining run: on one device, and on all of them.
PROGRAM = """
import contextlib, json, sys
from pathlib import Path
import jax
import numpy as np
from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM
from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.optimizers import AdamW
from keras_openllama.runs import jax_train_program, run_directory
from keras_openllama.runs.checkpoint_manager import CheckpointManager

directory, arguments, *steps = sys.argv[1:]
directory, arguments = Path(directory), json.loads(arguments)
random = np.random.default_rng(0)


def write(name, steps, scope):
    with scope:
        lm = OpenLlamaCausalLM(OpenLlamaBackbone(**arguments), None, compile=False)
        lm.compile(optimizer=AdamW())
        lm.optimizer.build(lm.trainable_variables)
    run = {"preset": "open_llama_nano", "recipe": {}, "data": {}}
    run["architecture"] = arguments
    checkpoints = CheckpointManager(str(directory / name), keep_last=len(steps))
    proto = (directory / "proto").read_bytes()
    run_directory.write_run(str(directory / name), run, proto)
    for step in steps:
        values = {}
        state = jax_train_program.initial_state(lm)
        arrays = jax_train_program.state_to_dict(lm, state)
        for path, value in arrays["model"].items():
            values[path] = 0.1 * random.standard_normal(value.shape, "float32")
            arrays["model"][path] = jax.device_put(values[path], value.sharding)
        # As in a model with dropout.
        arrays["model"]["dropout/seed_generator_state"] = np.zeros(2, "uint32")
        checkpoints.save(int(step), arrays, {"tokens": 1000 * int(step)})
        flat = {path.replace("/", "|"): value for path, value in values.items()}
        np.savez(directory / f"{name}-{step}.npz", **flat)
    checkpoints.close()
    return lm


write("one", steps, contextlib.nullcontext())
mesh = make_mesh(data=2, fsdp=2, model=2)
lm = write("eight", ["7"], OpenLlamaParallel(mesh).scope())
assert len({str(s.index) for s in lm.lm_head.kernel.value.addressable_shards}) == 4
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of the runs "one", with checkpoints of `STEPS`, and "eight"."""
    directory = tmp_path_factory.mktemp("runs")
    (directory / "proto").write_bytes(trained_model(True, VOCABULARY))
    run_on_eight_devices(PROGRAM, directory, json.dumps(ARCHITECTURE), *STEPS)
    return directory


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the run "one" that a test may damage."""
    return shutil.copytree(runs / "one", tmp_path / "run")


def checkpoint(run, step):
    return run / "checkpoints" / str(step)


def assert_values(model, file):
    """Asserts that the model has exactly the weights of a file."""
    expected = np.load(file)
    weights = {w.path: keras.ops.convert_to_numpy(w.value) for w in model.weights}
    for path, value in weights.items():
        assert value.dtype == np.float32
        assert np.array_equal(value, expected[path.replace("/", "|")]), path
    assert weights
    return len(expected) - len(weights)


# ----- Loading


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("name, step", [("one", 200), ("eight", 7)])
def test_from_preset_of_a_run_loads_its_newest_checkpoint(runs, name, step):
    lm = OpenLlamaCausalLM.from_preset(str(runs / name))
    assert assert_values(lm, runs / f"{name}-{step}.npz") == 0
    assert lm.loaded_from == f"the training run {name} at step {step}"


@pytest.mark.slow_on_tensorflow
def test_from_preset_loads_a_chosen_checkpoint(runs):
    lm = OpenLlamaCausalLM.from_preset(str(checkpoint(runs / "one", 100)))
    assert_values(lm, runs / "one-100.npz")
    assert lm.loaded_from == "the training run one at step 100"
    assert lm.preprocessor.sequence_length == SHAPE.context


@pytest.mark.slow_on_tensorflow
def test_from_preset_of_a_run_loads_each_class(runs):
    run = str(runs / "one")
    backbone = OpenLlamaBackbone.from_preset(run)
    assert assert_values(backbone, runs / "one-200.npz") == 1  # Without the head.
    proto = trained_model(True, VOCABULARY)
    tokenizer = OpenLlamaTokenizer.from_preset(run)
    assert tokenizer(TEXT) == OpenLlamaTokenizer(proto)(TEXT)
    preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(run)
    assert preprocessor.sequence_length == SHAPE.context
    assert preprocessor.tokenizer.proto == proto


@pytest.mark.slow_on_tensorflow
def test_export_of_a_run_computes_the_same_logits_in_transformers(runs, tmp_path):
    convert(runs / "one", tmp_path / "converted", "transformers")
    lm = OpenLlamaCausalLM.from_preset(str(checkpoint(runs / "one", 200)))
    lm.export_to_transformers(tmp_path / "exported")
    files = [tmp_path / name for name in ("converted", "exported")]
    assert len({(f / "model.safetensors").read_bytes() for f in files}) == 1
    assert len({(f / "README.md").read_text() for f in files}) == 1
    assert (
        "from the training run one at step 200." in (files[0] / "README.md").read_text()
    )
    assert str(runs) not in (files[0] / "README.md").read_text()
    ids = batch(SHAPE)
    model = transformers.LlamaForCausalLM.from_pretrained(files[0], dtype="float32")
    with torch.no_grad():
        expected = model.eval()(torch.tensor(ids, dtype=torch.long)).logits
    assert_close(lm.score(ids), expected)


@pytest.mark.slow_on_tensorflow
def test_commands_accept_a_run_as_preset(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", keras.config.backend())
    run = str(runs / "one")
    assert main(["generate", TEXT, "--preset", run, "--max-new-tokens", "3"]) == 0
    assert TEXT in capsys.readouterr().out
    for to in ("easylm", "keras"):
        assert main(["convert", run, str(tmp_path / to), "--to", to]) == 0
    for lm in (
        # The run is the source of architecture and tokenizer.
        easylm.load(tmp_path / "easylm", preset=run),
        OpenLlamaCausalLM.from_preset(str(tmp_path / "keras")),
    ):
        assert_values(lm, runs / "one-200.npz")


@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="it is TensorFlow")
def test_from_preset_of_a_run_imports_neither_tensorflow_nor_training_code(runs):
    script = (
        "import sys\n"
        "from keras_openllama import OpenLlamaCausalLM\n"
        "OpenLlamaCausalLM.from_preset(sys.argv[1])\n"
        "unwanted = 'tensorflow', 'keras_openllama.runs'\n"
        "print('imported:', [name for name in unwanted if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(runs / "eight")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.check_output(command, text=True, env=environment)
    assert out.splitlines()[-1] == "imported: []"


@pytest.mark.backend_free
def test_from_preset_of_a_run_without_checkpoints_needs_load_weights_false(run):
    shutil.rmtree(run / "checkpoints")
    lm = OpenLlamaCausalLM.from_preset(str(run), load_weights=False)
    assert lm.loaded_from is None
    assert lm.backbone.hidden_dim == SHAPE.hidden_dim
    with pytest.raises(FileNotFoundError, match=r"no checkpoint yet.*load_weights"):
        OpenLlamaCausalLM.from_preset(str(run))


@pytest.mark.backend_free
def test_from_preset_prefers_config_json_to_run_json(runs, tmp_path):
    convert(checkpoint(runs / "one", 90), tmp_path / "out", "transformers")
    (tmp_path / "out" / "run.json").write_text("{}")
    lm = OpenLlamaCausalLM.from_preset(str(tmp_path / "out"))
    assert lm.loaded_from == "the directory out"


# ----- Damaged runs


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.mark.backend_free
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_checkpoint_warns_of_a_damaged_checkpoint_and_returns_an_older_one(run, damage):
    newest = checkpoint(run, 200)
    backup = shutil.copytree(newest, run / "backup")
    names = [file.relative_to(newest) for file in files_of(newest)]
    assert len(names) > 5
    for name in names:
        if not (newest / name).stat().st_size:  # Orbax's commit_success.txt
            continue
        damage(newest / name)
        if damage is Path.unlink and name.name == MARKER:
            # Like a checkpoint that is being written, which is not damage.
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert TrainingRun.open(run).checkpoint().step == 100
        else:
            with pytest.warns(UserWarning, match="step 200 .*damaged.*100") as caught:
                assert TrainingRun.open(run).checkpoint().step == 100
            assert str(newest / name) in str(caught[0].message)
        shutil.rmtree(newest)
        shutil.copytree(backup, newest)
    assert TrainingRun.open(run).checkpoint().step == 200


@pytest.mark.slow_on_tensorflow
def test_from_preset_loads_the_checkpoint_before_a_damaged_one(run, runs):
    largest = max(files_of(checkpoint(run, 200)), key=lambda file: file.stat().st_size)
    flip(largest)
    with pytest.warns(UserWarning, match=rf"step 200 .*damaged.*{largest.name}"):
        lm = OpenLlamaCausalLM.from_preset(str(run))
    assert_values(lm, runs / "one-100.npz")
    assert lm.loaded_from == "the training run run at step 100"


@pytest.mark.backend_free
def test_checkpoint_raises_if_all_checkpoints_are_damaged(run):
    for step in STEPS:
        flip(checkpoint(run, step) / MARKER)
    with pytest.raises(ValueError, match=r"All .*damaged\. Step 200: .* Step 90: "):
        TrainingRun.open(run).checkpoint()


@pytest.mark.backend_free
def test_from_preset_rejects_a_chosen_checkpoint_that_is_damaged(run):
    path = checkpoint(run, 200)
    truncate(path / "arrays" / "manifest.ocdbt")
    with pytest.raises(ValueError, match=r"200 is damaged: .*manifest\.ocdbt has "):
        OpenLlamaCausalLM.from_preset(str(path))
    (path / MARKER).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {MARKER}: it is incomplete"):
        OpenLlamaCausalLM.from_preset(str(path))


@pytest.mark.backend_free
def test_from_preset_rejects_a_checkpoint_outside_of_its_run(run, tmp_path):
    shutil.move(checkpoint(run, 200), tmp_path / "200")
    with pytest.raises(
        FileNotFoundError, match=r"run\.json, which describes .*RUN/check"
    ):
        OpenLlamaCausalLM.from_preset(str(tmp_path / "200"))


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "change, match",
    [
        ({"format": 2}, r"run\.json has format 2, and this version reads 1"),
        ({"architecture": None}, r"run\.json has no 'architecture'"),
    ],
)
def test_from_preset_rejects_an_invalid_run_json(run, change, match):
    file = run / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=match):
        OpenLlamaCausalLM.from_preset(str(run))


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "change, match",
    [
        ({"num_layers": 1}, "unexpected: transformer_layer_1/"),
        ({"num_layers": 3}, "missing: transformer_layer_2/"),
        ({"intermediate_dim": 95}, "wrong shape: .*gate/kernel has"),
    ],
)
def test_from_preset_rejects_weights_of_another_architecture(run, change, match):
    with pytest.raises(ValueError, match=match):
        OpenLlamaBackbone.from_preset(str(run), **change)


@pytest.mark.backend_free
def test_from_preset_names_a_missing_tokenizer(run):
    (run / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model .*preprocessor="):
        OpenLlamaCausalLM.from_preset(str(run))
    lm = OpenLlamaCausalLM.from_preset(str(run), preprocessor=None)
    assert lm.preprocessor is None


@pytest.mark.backend_free
def test_from_preset_names_the_extra_that_provides_tensorstore(
    runs, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    run = str(runs / "one")
    with pytest.raises(ImportError, match=r"pip install 'keras-openllama\[train\]'"):
        OpenLlamaCausalLM.from_preset(run)
    monkeypatch.setenv("KERAS_BACKEND", keras.config.backend())
    assert main(["generate", TEXT, "--preset", run]) == 2
    error = capsys.readouterr().err
    assert "keras-openllama[train]" in error and error.count("\n") == 1


# ----- Runs in progress


@pytest.mark.backend_free
def test_checkpoint_returns_the_newest_if_another_is_removed_while_it_is_verified(
    run, monkeypatch
):
    newer = shutil.move(checkpoint(run, 200), run / "newer")
    check_file = training_run.check_file

    def check_removed_file(file, *arguments):
        if checkpoint(run, 100) in file.parents:
            shutil.rmtree(checkpoint(run, 100))
            shutil.move(newer, checkpoint(run, 200))
        check_file(file, *arguments)

    monkeypatch.setattr(training_run, "check_file", check_removed_file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TrainingRun.open(run).checkpoint().step == 200


@pytest.mark.backend_free
def test_array_raises_if_the_checkpoint_was_removed(run):
    checkpoint = TrainingRun.open(run).checkpoint()
    tensors = list(
        checkpoint.read_tensors(TrainingRun.open(run).architecture()).values()
    )
    assert tensors[0].array().any()
    path = Path(checkpoint.path)
    # A run removes the marker first, then the other files in any order.
    (path / MARKER).rename(run / MARKER)
    with pytest.raises(FileNotFoundError, match=r"was removed .*load the run again"):
        tensors[1].array()
    (run / MARKER).rename(path / MARKER)
    assert tensors[1].array().any()
    shutil.rmtree(path / "arrays")
    with pytest.raises(OSError, match="200 cannot be read: "):
        tensors[2].array()
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match=r"was removed .*load the run again"):
        tensors[3].array()
