"""`sampling_arrays` checks ids; `uniform_numbers` depend on the seed alone."""

import numpy as np
import pytest
from seeding import set_random_seed

from keras_openllama import SamplingConfig
from keras_openllama.generation.sampling.arrays import (
    resolve_seed,
    sampling_arrays,
    uniform_numbers,
)

pytestmark = pytest.mark.backend_free


def test_sampling_arrays_names_ids_outside_of_the_vocabulary():
    for name, value in (("banned_tokens", [300]), ("logit_bias", {300: 1.0})):
        with pytest.raises(ValueError, match=f"`{name}` must be .* 0 to 299"):
            sampling_arrays([SamplingConfig(**{name: value})], [[1]], 300)


def test_sampling_arrays_must_leave_a_token():
    config = SamplingConfig(banned_tokens=range(3))
    sampling_arrays([config], [[1]], 4)
    with pytest.raises(ValueError, match="`banned_tokens`"):
        sampling_arrays([config], [[1]], 3)
    config = SamplingConfig(banned_tokens=range(3), min_new_tokens=1)
    with pytest.raises(ValueError, match="min_new_tokens=1"):
        sampling_arrays([config], [[1]], 4, stop_token_ids=[3])


def test_uniform_numbers_depend_on_seed_and_sample_alone():
    numbers = uniform_numbers(1, 0, 1000)
    assert numbers.dtype == np.float32
    assert 0 <= numbers.min() and numbers.max() < 1
    np.testing.assert_array_equal(uniform_numbers(1, 0, 10), numbers[:10])
    for seed, sample in ((2, 0), (1, 1), (-1, 0), (2**64 - 2, 0)):
        assert not np.isin(uniform_numbers(seed, sample, 10), numbers).any()
    # The numbers of a seed are part of the interface.
    np.testing.assert_array_equal(
        numbers[:2], np.float32([0.3035680055618286, 0.8487087488174438])
    )


def test_resolve_seed_follows_the_global_seed_of_keras():
    set_random_seed(3)
    first, second = resolve_seed(None), resolve_seed(None)
    assert first != second
    set_random_seed(3)
    assert resolve_seed(None) == first and resolve_seed(0) == 0
