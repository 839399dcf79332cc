"""One validator checks the integers of arguments and settings."""

import numpy as np
import pytest
from keras import ops

from keras_openllama.utils.validation import check_integer

pytestmark = pytest.mark.backend_free


@pytest.mark.parametrize("value", [8, np.int64(8), np.uint8(8), np.array(8)])
def test_check_integer_returns_a_python_int(value):
    assert type(check_integer("batch_size", value)) is int
    assert check_integer("batch_size", value) == 8


def test_check_integer_accepts_an_integer_of_the_backend():
    assert check_integer("batch_size", ops.convert_to_tensor(8, "int32")) == 8


@pytest.mark.parametrize(
    "value", [0, -1, 8.0, np.float32(8), True, np.True_, "8", None, [8], np.array([8])]
)
def test_check_integer_rejects_other_types_and_values_below_one(value):
    with pytest.raises(ValueError) as raised:
        check_integer("batch_size", value)
    assert str(raised.value) == (
        f"`batch_size` must be a positive integer. Received: batch_size={value!r}"
    )


def test_check_integer_states_the_range():
    assert check_integer("seed", 0, least=0) == 0
    assert check_integer("context", 32, least=3, most=32) == 32
    with pytest.raises(ValueError, match="`seed` must be a non-negative integer"):
        check_integer("seed", -1, least=0)
    with pytest.raises(ValueError, match="must be an integer of at least 3"):
        check_integer("context", 2, least=3)
    for value in (2, 33, 4.5):
        with pytest.raises(ValueError, match="must be an integer from 3 to 32"):
            check_integer("context", value, least=3, most=32)
