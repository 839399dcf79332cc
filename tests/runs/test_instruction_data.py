"""InstructionData: the examples of each step."""

import numpy as np
import pytest

from keras_openllama.runs.instruction_data import InstructionData

pytestmark = pytest.mark.backend_free


def instruction_data(num_sequences, batch_size=4, seed=0):
    column = np.arange(num_sequences)[:, None]
    x = {"token_ids": column, "padding_mask": column}
    return InstructionData((x, column, column), batch_size, seed)


def sequences_of(data, steps):
    return [data.batch(step - 1)[1][:, 0].tolist() for step in steps]


def test_each_epoch_reads_every_sequence_once_in_a_new_order():
    flat = [
        row
        for batch in sequences_of(instruction_data(10), range(1, 16))
        for row in batch
    ]
    epochs = [flat[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert sequences_of(instruction_data(10, seed=1), [1]) != sequences_of(
        instruction_data(10), [1]
    )


def test_batch_depends_only_on_the_step():
    assert sequences_of(instruction_data(10), [7, 3, 9]) == [
        sequences_of(instruction_data(10), [i])[0] for i in (7, 3, 9)
    ]


def test_steps_covers_the_epochs():
    assert instruction_data(10).steps(1) == 3
    assert instruction_data(10).steps(2) == 5
    assert instruction_data(3, batch_size=8).steps(0.1) == 1
    assert sequences_of(instruction_data(3, batch_size=8), [1])[0][:3] != [0, 0, 0]
