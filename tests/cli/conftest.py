"""Models that the tests of several commands use."""

import pytest
from pretraining_runs import TOKENIZER
from tiny_models import SHAPES, random_lm


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The directory of a small random model: a tenth of nano's time."""
    directory = tmp_path_factory.mktemp("small") / "model"
    random_lm(SHAPES[0], TOKENIZER.read_bytes()).save_to_preset(directory)
    return directory
