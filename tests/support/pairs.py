"""Prompts with responses, and a tiny model that is trained on them."""

import keras
import pytest
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model

# Data processing does not depend on the number of layers.
SHAPE = TinyShape("tiny", 4, 2, 12, 48, 64, num_layers=1, context=64)
PAIRS = [
    ("Name a color:", " red"),
    ("Name a number that is not small:", " one thousand and one"),
    ("The opposite of up is", " down"),
    ("import", "ing things"),
]
PROMPTS, RESPONSES = (list(part) for part in zip(*PAIRS, strict=True))
AS_DICT = {"prompt": PROMPTS, "response": RESPONSES}


def make_lm(keep_spaces=True, length=32, **options):
    lm = random_lm(SHAPE, trained_model(keep_spaces), **options)
    lm.preprocessor.sequence_length = length
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    return lm


class Pairs(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = slice(2 * index, 2 * index + 2)
        return {"prompt": PROMPTS[rows], "response": RESPONSES[rows]}


def tf_dataset(elements):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(elements).batch(2)
