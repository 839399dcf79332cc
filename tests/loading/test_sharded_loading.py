"""`from_preset` under a `keras.distribution` creates sharded variables."""

import numpy as np
import pytest
from fake_devices import run_on_eight_devices
from tiny_models import TinyShape, as_ours, in_transformers

pytestmark = pytest.mark.backend_free  # ModelParallel exists on JAX only.

SHAPE = TinyShape("sharded", 4, 4, 16, hidden_dim=64, vocabulary_size=160)
PROGRAM = """
import sys
import jax
import keras
import numpy as np
from keras_openllama import OpenLlamaCausalLM
from keras_openllama.loading import casting

directory, kind, dtype = sys.argv[1:]
casting._SMALL = 0  # To test the jitted casts, too.
devices = keras.distribution.list_devices()
assert len(devices) == 8
if kind == "model":
    mesh = keras.distribution.DeviceMesh((2, 4), ("data", "model"), devices)
    rules = keras.distribution.LayoutMap(mesh)
    rules[".*(query|key|value|gate|up|lm_head)/kernel"] = ("model", "data")
    rules[".*(output|down)/kernel"] = ("data", "model")
    rules["token_embedding/embeddings"] = ("model", None)
    distribution = keras.distribution.ModelParallel(
        layout_map=rules, batch_dim_name="data"
    )
else:
    distribution = keras.distribution.DataParallel(devices=devices)
with distribution.scope():
    lm = OpenLlamaCausalLM.from_preset(directory, preprocessor=None, dtype=dtype)
    for weight in lm.weights:
        layout = distribution.get_variable_layout(weight).backend_layout
        assert weight.value.sharding.is_equivalent_to(layout, weight.ndim), weight.path
        assert len(weight.value.devices()) == 8
        parts = {shard.data.shape for shard in weight.value.addressable_shards}
        assert parts == {layout.shard_shape(weight.shape)}
    if kind == "model":
        kernel = lm.lm_head.kernel.value
        assert kernel.addressable_shards[0].data.shape == (40, 32)
np.savez(
    directory + "/loaded.npz",
    **{w.path.replace("/", "|"): np.asarray(w.value, "float32") for w in lm.weights},
)
"""


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("model", "bfloat16"),
        pytest.param("data", "float32", marks=pytest.mark.slow),
    ],
)
def test_from_preset_gives_each_device_its_shard(tmp_path, kind, dtype):
    ours = as_ours(in_transformers(SHAPE), tmp_path, dtype=dtype)
    run_on_eight_devices(PROGRAM, tmp_path, kind, dtype)
    loaded = np.load(tmp_path / "loaded.npz")
    assert len(loaded) == len(ours.weights)
    for weight in ours.weights:
        np.testing.assert_array_equal(
            loaded[weight.path.replace("/", "|")], np.asarray(weight.value, "float32")
        )
