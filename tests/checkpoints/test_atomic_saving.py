"""Models, tokenizers and preprocessors are saved whole or not at all."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from checkout import ROOT
from small_disk import small_disk
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.checkpoints import atomic_saving

SHAPE = TinyShape("tiny", 4, 2, 12, 48, 64, num_layers=1, context=64)
# Saves in every way, in a process that would crash if HDF5 could not close its files.
PROGRAM = """
import os, resource, sys
from pathlib import Path
from test_atomic_saving import SHAPE
from tiny_models import random_lm
from tokenizer_models import trained_model
from keras_openllama.convert import easylm

disk, limit, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
lm = random_lm(SHAPE, trained_model(True))
if kind == "int8":
    lm.quantize("int8")
lm.backbone.enable_lora(2)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
existing = disk / "existing"
saves = [
    lambda: lm.save_to_preset(disk / "preset"),
    lambda: lm.save_to_preset(existing),
    lambda: lm.save_to_preset(disk / "shards", max_shard_size=1e-4),
    lambda: lm.backbone.save_to_preset(disk / "new" / "backbone"),
    lambda: lm.preprocessor.save_to_preset(disk / "preprocessor"),
    lambda: lm.preprocessor.tokenizer.save_to_preset(disk / "tokenizer"),
    lambda: lm.save_weights(disk / "lm.weights.h5"),
    lambda: lm.backbone.save_weights(disk / "backbone.weights.h5"),
    lambda: lm.save(disk / "lm.keras"),
    lambda: lm.save_adapters(disk / "adapters"),
]
if kind == "float":
    saves += [
        lambda: lm.export_to_transformers(disk / "transformers"),
        lambda: easylm.save(lm, disk / "easylm.msgpack"),
    ]
for save in saves:
    try:
        save()
    except OSError as error:
        assert str(disk) in str(error) or "disk space" in str(error), error
    else:
        raise AssertionError("it was saved")
    found = [path.relative_to(disk) for path in disk.rglob("*")]
    assert sorted(map(str, found)) == ["existing", "existing/mine.txt"], found
"""


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize(
    ("kilobytes", "limit", "kind"),
    [
        pytest.param(4, -1, "float", id="full disk"),
        pytest.param(
            *(900, 1000, "int8"),
            id="file size limit, int8",
            marks=pytest.mark.backend_free,
        ),
        pytest.param(900, 1000, "float", id="file size limit", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_of_what_cannot_be_saved(tmp_path, kilobytes, limit, kind):
    with small_disk(tmp_path / "disk") as mount:
        disk = mount(kilobytes)
        (disk / "existing").mkdir()
        (disk / "existing" / "mine.txt").touch()
        paths = [ROOT, ROOT / "tests" / "support", ROOT / "tests" / "checkpoints"]
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(disk), str(limit), kind],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr


@contextlib.contextmanager
def limited_file_size(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_save_weights_that_fail_in_between_keep_the_earlier_file(tmp_path):
    lm = random_lm(SHAPE)
    path = tmp_path / "lm.weights.h5"
    lm.save_weights(path)
    before = path.read_bytes()
    with limited_file_size(len(before) // 2):
        with pytest.raises(OSError, match=r"lm.weights.h5 cannot be written: File too"):
            lm.save_weights(path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


@pytest.fixture
def expected():
    token_ids = np.arange(3, 15)[None]
    lm = random_lm(SHAPE, trained_model(True))
    return lm, token_ids, np.asarray(lm.predict_on_batch(inputs(token_ids)))


def inputs(token_ids):
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


def test_save_to_preset_replaces_shards_of_an_earlier_model(tmp_path, expected):
    lm, token_ids, logits = expected
    other = random_lm(SHAPE, trained_model(True), seed=1)
    other.save_to_preset(tmp_path, max_shard_size=1e-4)
    (tmp_path / "mine.txt").touch()
    lm.save_to_preset(tmp_path)
    loaded = OpenLlamaCausalLM.from_preset(str(tmp_path))
    found = np.asarray(loaded.predict_on_batch(inputs(token_ids)))
    np.testing.assert_array_equal(found, logits)
    assert (tmp_path / "mine.txt").exists()
    assert not [*tmp_path.glob(".*")]


def test_save_to_preset_that_fails_at_the_end_keeps_the_earlier_preset(
    tmp_path, monkeypatch
):
    lm = random_lm(SHAPE)
    lm.save_to_preset(tmp_path)
    before = (tmp_path / "metadata.json").read_bytes()
    assert json.loads(before)["tasks"] == ["CausalLM"]

    def fail(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_saving, "correct_metadata", fail)
    with pytest.raises(OSError, match="No space left"):
        lm.save_to_preset(tmp_path)
    assert (tmp_path / "metadata.json").read_bytes() == before
