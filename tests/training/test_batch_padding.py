"""Batches of any size on a mesh of devices: padded, with the results of one device."""

import json

import numpy as np
import pytest
from fake_devices import run_on_eight_devices

from keras_openllama.training.batch_padding import PaddedInputs, pad_batch

CONTAINERS = ["PyDataset", "generator", "tf.data", "Grain"]
# Batches of 8 and 2 sequences, on a mesh of 8 devices.
PROGRAM = """
import json, sys, warnings
import keras, numpy as np
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model
from keras_openllama.distribution import OpenLlamaParallel, make_mesh

warnings.simplefilter("ignore")
shape = TinyShape("tiny", 8, 8, 16, 64, 64, num_layers=1, context=64)
texts = [f"Text number {i}" + ", longer" * (i % 3) for i in range(10)]


class Batches(keras.utils.PyDataset):
    num_batches = 2

    def __getitem__(self, index):
        return texts[8 * index : 8 * index + 8]


def generator():
    yield from (texts[:8], texts[8:])


def tf_dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(texts).batch(8)


def grain_dataset():
    import grain

    return grain.MapDataset.source(texts).batch(8)


containers = {
    "PyDataset": Batches, "generator": generator, "tf.data": tf_dataset,
    "Grain": grain_dataset,
}


def results():
    lm = random_lm(shape, trained_model(True))
    lm.preprocessor.sequence_length = 16
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    kernel = next(v for v in lm.weights if v.path.endswith("query/kernel"))
    found = {
        "generate": lm.generate(texts[:3], max_new_tokens=3),
        "predict 3": lm.predict(texts[:3], verbose=0),
        "predict, batch size 4": lm.predict(texts, batch_size=4, verbose=0),
        "evaluate 3": lm.evaluate(texts[:3], verbose=0),
        "evaluate, batch size 4": lm.evaluate(texts, batch_size=4, verbose=0),
        "fit, batch size 4": lm.fit(
            texts[:3], validation_data=texts, validation_batch_size=4, verbose=0
        ).history["val_loss"],
        "evaluate generator": lm.evaluate(generator(), verbose=0),
    }
    for name in sys.argv[2:]:
        batches = containers[name]
        found[f"predict {name}"] = lm.predict(batches(), verbose=0)
        history = lm.fit(batches(), validation_data=batches(), verbose=0).history
        found[f"fit {name}"] = history["loss"] + history["val_loss"]
    batch = lm.preprocess_samples(texts[:3])
    found["predict_on_batch"] = np.asarray(lm.predict_on_batch(batch[0]))
    for method in ("train_on_batch", "test_on_batch"):
        lm.reset_metrics()
        found[method] = np.array(getattr(lm, method)(*batch), "float64")
    return found


expected = results()
if sys.argv[1] == "OpenLlamaParallel":
    distribution = OpenLlamaParallel(make_mesh(data=2, fsdp=4))
else:
    distribution = keras.distribution.DataParallel()
keras.distribution.set_distribution(distribution)
found = results()
assert found.pop("generate") == expected["generate"]
for name, values in found.items():
    np.testing.assert_allclose(
        values, expected[name], rtol=1e-4, atol=1e-5, err_msg=name
    )
print(json.dumps([*found]))
"""


@pytest.mark.backend_free
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("distribution", "containers"),
    [
        ("OpenLlamaParallel", ["Grain"]),
        *(
            pytest.param(distribution, CONTAINERS, marks=pytest.mark.slow)
            for distribution in ("OpenLlamaParallel", "DataParallel")
        ),
    ],
)
def test_batches_of_any_size_have_the_results_of_one_device(distribution, containers):
    pytest.importorskip("tensorflow")
    pytest.importorskip("grain")
    found = json.loads(run_on_eight_devices(PROGRAM, distribution, *containers))
    assert len(found) == 9 + 2 * len(containers)


def test_pad_batch_appends_sequences_with_zero_weight():
    x = {"token_ids": np.arange(6).reshape(3, 2)}
    padded, y, weights = pad_batch((x, np.ones((3, 2)), np.full(3, 0.5)), 4)
    assert padded["token_ids"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert y.shape == (4, 2)
    assert weights.tolist() == [0.5, 0.5, 0.5, 0]
    assert pad_batch((x,), 3) == (x,)


def test_padded_inputs_remove_the_padding_of_each_batch():
    batches = [np.arange(3), np.arange(1), np.arange(2)]
    inputs = PaddedInputs(iter(batches), multiple=2)
    outputs = np.concatenate([x for (x,) in inputs.generate()])
    assert len(outputs) == 8
    assert inputs.remove_padding(outputs).tolist() == [0, 1, 2, 0, 0, 1]
    # `predict` may have stopped earlier.
    assert inputs.remove_padding(outputs[:4]).tolist() == [0, 1, 2]
