"""Fine-tuning on a mesh of devices has the losses of one device."""

import json

import numpy as np
import pytest
from fake_devices import run_on_eight_devices

pytestmark = pytest.mark.backend_free  # Only JAX supports distributed models.

PROGRAM = """
import json, sys
import keras, numpy as np
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model
from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.optimizers import AdamW

shape = TinyShape("wide", 8, 4, 16, hidden_dim=64, intermediate_dim=96)
pairs = {
    "prompt": [f"What is {i}?" for i in range(19)],
    "response": [
        f" {i} is {'even' if i % 2 else 'odd'}." * (1 + i % 3)
        for i in range(19)
    ],
}


def train(kind, **options):
    lm = random_lm(shape, trained_model(True))
    lm.preprocessor.sequence_length = 48
    if "int8" in kind:
        lm.backbone.quantize("int8")
    if "adapters" in kind:
        keras.utils.set_random_seed(1)
        lm.backbone.enable_lora(4, ["query", "value", "output", "gate", "down"])
    lm.compile(optimizer=AdamW(3e-3), **options)
    fit = dict(batch_size=16, epochs=4, verbose=0, shuffle=False)
    history = lm.fit(pairs, validation_data=pairs, **fit).history
    return {name: history[name] for name in ("loss", "val_loss", "val_bits_per_byte")}


memory = dict(micro_batches=2, rematerialize="projections")
kind = sys.argv[1]
results = [train(kind)]
for mesh in ((2, 4, 1), (1, 4, 2)):
    with OpenLlamaParallel(make_mesh(*mesh)).scope():
        results.append(train(kind, **memory))
print(json.dumps(results))
"""


# `make test` trains on a mesh in tests/test_distribution.py and tests/cli.
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "kind",
    ["adapters", "full", "adapters on int8"],
)
def test_fit_on_a_mesh_has_the_losses_of_one_device(kind):
    one, *meshes = json.loads(run_on_eight_devices(PROGRAM, kind))
    assert one["val_loss"][-1] < 0.97 * one["val_loss"][0]
    # Inputs that differ in the last bit may be rounded to different int8 values.
    tolerance = 1e-3 if "int8" in kind else 1e-5
    for mesh in meshes:
        for name, values in mesh.items():
            np.testing.assert_allclose(values, one[name], rtol=tolerance, err_msg=name)
