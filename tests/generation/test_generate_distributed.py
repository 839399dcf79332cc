"""Generation on a mesh of devices returns the tokens of one device."""

import pytest
from fake_devices import run_on_eight_devices
from tiny_models import TinyShape, as_ours, in_transformers

pytestmark = pytest.mark.backend_free  # ModelParallel exists on JAX only.

SHAPES = (
    TinyShape("multi_head", 8, 8, 16, hidden_dim=64, vocabulary_size=160),
    # Fewer key/value heads than devices, and a head_dim that is no power of two.
    TinyShape("grouped_head_dim_100", 8, 2, 100, hidden_dim=64, vocabulary_size=160),
)
PROGRAM = """
import logging, sys
import jax
import keras
import numpy as np
from keras_openllama import OpenLlamaCausalLM

random = np.random.default_rng(0)
ids = random.integers(3, 160, (3, 40)).astype("int32")
mask = np.arange(40) < np.array([[40], [1], [33]])
compiled = []


class Compilations(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("Compiling jit(_advance)"):
            compiled.append(record)


logging.getLogger("jax").addHandler(Compilations())
jax.config.update("jax_log_compiles", True)


def tokens(kv_cache_dtype=None):
    lm = OpenLlamaCausalLM.from_preset(sys.argv[1], preprocessor=None)
    lm.compile(kv_cache_dtype=kv_cache_dtype)
    compiled.clear()
    outputs = lm.generate(
        {"token_ids": ids, "padding_mask": mask}, max_new_tokens=20, stop_token_ids=None
    )
    # As `stream` does it, a few steps a call.
    rows = [row[m].tolist() for row, m in zip(ids, mask)]
    steps = lm.make_generate_function().generate(rows, [20] * 3, [], stride=7)
    pieces = [sum(row, []) for row in zip(*steps)]
    for row, prompt, piece in zip(outputs["token_ids"], rows, pieces):
        assert row[len(prompt) :][:20].tolist() == piece
    assert len(compiled) == 1, len(compiled)
    return outputs["token_ids"], lm


expected, _ = tokens()
expected_of_int8, _ = tokens("int8")
devices = keras.distribution.list_devices()
assert len(devices) == 8
column = ".*(query|key|value|gate|up|lm_head)/kernel"
row = ".*(output|down)/kernel"
embeddings = "token_embedding/embeddings"
layouts = {
    "tensor-parallel": ((1, 8), ("model", None), (None, "model")),
    "fully sharded": ((8, 1), ("data", None), ("data", None)),
    "both": ((2, 4), ("model", "data"), ("data", "model")),
}
for name in sys.argv[2:]:
    shape, columns, rows = layouts[name]
    mesh = keras.distribution.DeviceMesh(shape, ("data", "model"), devices)
    rules = keras.distribution.LayoutMap(mesh)
    rules[column], rules[row], rules[embeddings] = columns, rows, rows
    distribution = keras.distribution.ModelParallel(
        layout_map=rules, batch_dim_name="data"
    )
    with distribution.scope():
        outputs, lm = tokens()
        kernel = lm.backbone.transformer_layers[0].self_attention.query.kernel.value
        assert not kernel.sharding.is_fully_replicated
        if name == "both":
            outputs_of_int8, _ = tokens("int8")
            np.testing.assert_array_equal(outputs_of_int8, expected_of_int8)
    np.testing.assert_array_equal(outputs, expected, name)
    print(name, "agrees")
"""


EVERY_LAYOUT = ("tensor-parallel", "fully sharded", "both")


@pytest.mark.parametrize(
    ("shape", "layouts"),
    [
        pytest.param(SHAPES[0], EVERY_LAYOUT, marks=pytest.mark.slow),
        (SHAPES[1], ["both"]),
        pytest.param(SHAPES[1], EVERY_LAYOUT, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_generate_on_a_mesh_returns_the_tokens_of_one_device(tmp_path, shape, layouts):
    as_ours(in_transformers(shape), tmp_path)
    printed = run_on_eight_devices(PROGRAM, tmp_path, *layouts)
    assert printed.count("agrees") == len(layouts)
