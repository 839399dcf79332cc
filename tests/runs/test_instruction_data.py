"""Which examples a step of fine-tuning sees."""

import numpy as np
import pytest

from keras_openllama.runs.instruction_data import InstructionData

pytestmark = pytest.mark.backend_free


def batches(rows, batch_size=4, seed=0):
    column = np.arange(rows)[:, None]
    x = {"token_ids": column, "padding_mask": column}
    return InstructionData((x, column, column), batch_size, seed)


def seen(batches, steps):
    return [batches.batch(step - 1)[1][:, 0].tolist() for step in steps]


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own():
    flat = [row for batch in seen(batches(10), range(1, 16)) for row in batch]
    epochs = [flat[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert seen(batches(10, seed=1), [1]) != seen(batches(10), [1])


def test_a_step_sees_the_same_wherever_reading_began():
    assert seen(batches(10), [7, 3, 9]) == [
        seen(batches(10), [i])[0] for i in (7, 3, 9)
    ]


def test_steps_cover_the_epochs():
    assert batches(10).steps(1) == 3
    assert batches(10).steps(2) == 5
    assert batches(3, batch_size=8).steps(0.1) == 1
    assert seen(batches(3, batch_size=8), [1])[0][:3] != [0, 0, 0]
