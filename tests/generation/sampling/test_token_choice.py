"""`choose_tokens` equals transformers' logits processors, and draws as it must."""

import keras
import numpy as np
import pytest
import torch
import transformers
from keras import ops, tree
from scipy import stats

from keras_openllama import SamplingConfig
from keras_openllama.backend.arrays import to_numpy
from keras_openllama.generation.sampling.arrays import sampling_arrays, uniform_numbers
from keras_openllama.generation.sampling.token_choice import (
    adjust_logits,
    choose_tokens,
    count_tokens,
    first_maximum,
    invert_cumulative,
    token_weights,
)

VOCABULARY, BATCH, STOP_IDS = 300, 6, [2, 7]


def on_device(arrays):
    return tree.map_structure(ops.convert_to_tensor, arrays)


def random_config(random, **options):
    """Each control is at its default half of the time."""

    def maybe(name, value):
        return {name: value} if random.random() < 0.5 else {}

    ids = random.permutation(VOCABULARY)
    return SamplingConfig(
        **{
            **maybe("temperature", random.uniform(0.2, 3)),
            **maybe("top_k", int(random.integers(1, 60))),
            **maybe("top_p", random.uniform(0.05, 0.99)),
            **maybe("min_p", random.uniform(0, 0.3)),
            **maybe("repetition_penalty", random.uniform(0.5, 2)),
            **maybe("logit_bias", {ids[0]: 5.0, ids[1]: -4.0, ids[2]: 0.5}),
            **maybe("banned_tokens", ids[2:9]),
            **maybe("min_new_tokens", int(random.integers(0, 6))),
            **options,
        }
    )


def random_batch(seed, **options):
    random = np.random.default_rng(seed)
    configs = [random_config(random, **options) for _ in range(BATCH)]
    prompts = random.integers(3, VOCABULARY, (BATCH, 10)).tolist()
    new = random.integers(3, VOCABULARY, (BATCH, 4)).tolist()
    logits = random.normal(scale=3, size=(BATCH, VOCABULARY)).astype("float32")
    return configs, prompts, new, logits


def counts_of(sequences):
    counts = np.stack([np.bincount(ids, minlength=VOCABULARY) for ids in sequences])
    return counts.astype("int32")


def transformers_processors(config, prompt_length):
    """The processors that `generate` of transformers makes, in its order."""
    processors = transformers.LogitsProcessorList()
    if config.logit_bias:
        biases = {(token,): bias for token, bias in config.logit_bias.items()}
        processors.append(transformers.SequenceBiasLogitsProcessor(biases))
    processors += [
        transformers.RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
        transformers.MinNewTokensLengthLogitsProcessor(
            prompt_length, config.min_new_tokens, STOP_IDS
        ),
        transformers.SuppressTokensLogitsProcessor(list(config.banned_tokens)),
        transformers.TemperatureLogitsWarper(config.temperature),
    ]
    if config.top_k is not None:
        processors.append(transformers.TopKLogitsWarper(config.top_k))
    processors.append(transformers.TopPLogitsWarper(config.top_p))
    processors.append(transformers.MinPLogitsWarper(config.min_p))
    return processors


def probabilities(configs, prompts, new, logits):
    arrays = on_device(sampling_arrays(configs, prompts, VOCABULARY, STOP_IDS))
    logits, counts = on_device((logits, counts_of(new)))
    scores = adjust_logits(logits, arrays, counts, step=len(new[0]))
    weights = to_numpy(token_weights(scores, arrays)).astype("float64")
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(20))
def test_probabilities_equal_those_of_the_processors_of_transformers(seed):
    configs, prompts, new, logits = random_batch(seed)
    found = probabilities(configs, prompts, new, logits)
    for row, config in enumerate(configs):
        ids = torch.tensor([prompts[row] + new[row]])
        processors = transformers_processors(config, len(prompts[row]))
        scores = processors(ids, torch.tensor(logits[row : row + 1]))
        expected = torch.softmax(scores.double(), dim=-1)[0].numpy()
        np.testing.assert_array_equal(found[row] > 0, expected > 0)
        np.testing.assert_allclose(found[row], expected, rtol=2e-5)


def test_presence_and_frequency_penalties_count_new_tokens_only():
    options = dict(presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.3)
    configs = [SamplingConfig(**options), SamplingConfig()]
    prompts, new = [[1, 5, 6], [1]], [[6, 8, 8], [6, 8, 8]]
    logits = np.zeros((2, VOCABULARY), "float32")
    logits[:, [5, 6, 8]] = [1.3, 2.6, -2.0]
    arrays = on_device(sampling_arrays(configs, prompts, VOCABULARY))
    logits, counts = on_device((logits, counts_of(new)))
    found = to_numpy(adjust_logits(logits, arrays, counts, step=3))
    np.testing.assert_allclose(
        found[0, [4, 5, 6, 8]],
        [0, 1.3 / 1.3, 2.6 / 1.3 - 0.7 - 0.4, -2.0 * 1.3 - 0.7 - 2 * 0.4],
        rtol=1e-6,
        atol=1e-7,
    )
    np.testing.assert_array_equal(found[1], to_numpy(logits)[1])


def test_top_k_keeps_equal_logits_as_transformers_does():
    logits = np.array([[3.0, 1.0, 2.0, 2.0, 0.0, 2.0]], "float32")
    arrays = on_device(sampling_arrays([SamplingConfig(top_k=2)], [[1]], 6))
    weights = to_numpy(token_weights(ops.convert_to_tensor(logits), arrays))
    expected = transformers.TopKLogitsWarper(2)(None, torch.tensor(logits))
    np.testing.assert_array_equal(weights > 0, np.isfinite(expected.numpy()))


def test_controls_that_exclude_no_token_keep_all():
    """Cumulative probabilities may exceed 1 by rounding."""
    size = 32_000
    logits = np.random.default_rng(0).normal(size=(1, size)).astype("float32")
    for top_k, expected in ((None, size), (10**6, size), (size - 1, size - 1)):
        # The second row makes both truncations run.
        configs = [SamplingConfig(top_k=top_k), SamplingConfig(top_k=3, top_p=0.5)]
        arrays = on_device(sampling_arrays(configs, [[1], [1]], size))
        scores = ops.convert_to_tensor(np.repeat(logits, 2, axis=0))
        kept = (to_numpy(token_weights(scores, arrays)) > 0).sum(axis=1)
        assert kept[0] == expected and kept[1] <= 3


def choose(configs, prompts, logits, uniforms, num_top_logprobs=None, new=None):
    arrays = on_device(sampling_arrays(configs, prompts, logits.shape[1]))
    counts = counts_of(new) if new else np.zeros(logits.shape, "int32")
    logits, counts, uniforms = on_device(
        (logits, counts, np.asarray(uniforms, "float32"))
    )
    step = len(new[0]) if new else 0
    chosen = choose_tokens(logits, arrays, counts, uniforms, step, num_top_logprobs)
    return tree.map_structure(to_numpy, chosen)


def test_draws_of_uniform_numbers_have_the_distribution_of_the_weights():
    """A chi-square test for each row; the seeds are fixed."""
    batch = random_batch(3, temperature=1.5, top_p=0.9)
    draws = 4000
    for row, expected in enumerate(draws * probabilities(*batch)):
        weights = np.repeat(expected[None].astype("float32"), draws, axis=0)
        numbers = uniform_numbers(row, 0, draws)
        tokens = to_numpy(invert_cumulative(*on_device((weights, numbers))))
        observed = np.bincount(tokens, minlength=VOCABULARY)
        assert not observed[expected == 0].any()
        # The rare tokens are one class.
        is_class = expected >= 5
        observed = np.append(observed[is_class], observed[~is_class].sum())
        expected = np.append(expected[is_class], expected[~is_class].sum() + 1e-9)
        statistic = ((observed - expected) ** 2 / expected).sum()
        assert 0.001 < stats.chi2.sf(statistic, len(expected) - 1) < 0.999


def test_choose_tokens_of_a_row_does_not_depend_on_other_rows():
    configs, prompts, new, logits = random_batch(5, presence_penalty=0.3)
    configs[2] = SamplingConfig(temperature=0)
    uniforms = [uniform_numbers(9, row, 1)[0] for row in range(BATCH)]
    together = choose(configs, prompts, logits, uniforms, 3, new)
    for row in range(BATCH):
        part = slice(row, row + 1)
        alone = choose(
            *(configs[part], prompts[part], logits[part], uniforms[part], 3),
            new[part],
        )
        for found, expected in zip(alone, together, strict=True):
            np.testing.assert_allclose(found[0], expected[row], rtol=1e-6)
    assert together.tokens.dtype == np.int32


def test_choose_tokens_is_the_inverse_of_the_cumulative_distribution():
    logits = np.log(np.array([[0.1, 0.2, 0.0, 0.4, 0.3]], "float32") + 1e-30)
    configs = [SamplingConfig(banned_tokens=[2])]
    for uniform, token in ((0.0, 0), (0.0999, 0), (0.1001, 1), (0.299, 1), (0.301, 3)):
        assert choose(configs, [[1]], logits, [uniform]).tokens == [token]
    assert choose(configs, [[1]], logits, [1 - 2**-24]).tokens == [4]


@pytest.mark.parametrize("size", [1, 127, 128, 129, 32_000])
def test_invert_cumulative_never_chooses_a_token_of_weight_0(size):
    random = np.random.default_rng(size)
    weights = random.exponential(size=(200, size)).astype("float32") ** 4
    weights[random.random(weights.shape) < 0.9] = 0
    weights[:, size // 2] = 1e-3
    uniforms = random.random(200).astype("float32")
    uniforms[:50], uniforms[50:100] = 1 - 2**-24, 0
    tokens = to_numpy(invert_cumulative(*on_device((weights, uniforms))))
    assert (weights[np.arange(200), tokens] > 0).all()
    possible = [np.flatnonzero(row)[0] for row in weights]
    assert tokens[50:100].tolist() == possible[50:100]


def test_greedy_rows_choose_the_first_maximum_after_penalties():
    logits = np.array([[0.0, 3, 3, 1], [0, 3, 3, 1]], "float32")
    configs = [
        SamplingConfig(temperature=0),
        SamplingConfig(temperature=1e-9, logit_bias={1: -1.0}),
    ]
    assert choose(configs, [[0], [0]], logits, [0.9, 0.9]).tokens.tolist() == [1, 2]
    assert to_numpy(first_maximum(ops.convert_to_tensor(logits))).tolist() == [1, 1]


def test_logprobs_are_those_of_the_model_before_the_controls():
    configs, prompts, new, logits = random_batch(1)
    configs[0] = SamplingConfig(temperature=0, banned_tokens=[int(logits[0].argmax())])
    chosen = choose(configs, prompts, logits, [0.4] * BATCH, 5, new)
    expected = torch.log_softmax(torch.tensor(logits), dim=-1)
    top = torch.topk(expected, 5)
    rows = np.arange(BATCH)
    np.testing.assert_allclose(
        chosen.logprobs, expected.numpy()[rows, chosen.tokens], rtol=1e-5
    )
    np.testing.assert_array_equal(chosen.top_tokens, top.indices.numpy())
    np.testing.assert_allclose(chosen.top_logprobs, top.values.numpy(), rtol=1e-5)
    assert chosen.tokens[0] != chosen.top_tokens[0, 0]
    assert choose(configs, prompts, logits, [0.4] * BATCH).logprobs == ()
    only_chosen = choose(configs, prompts, logits, [0.4] * BATCH, 0, new)
    np.testing.assert_allclose(only_chosen.logprobs, chosen.logprobs, rtol=1e-6)
    assert only_chosen.top_tokens == ()


def test_count_tokens_adds_one_per_sequence():
    counts = ops.convert_to_tensor(np.ones((2, 4), "int32"))
    counts = count_tokens(counts, ops.convert_to_tensor(np.array([3, 0], "int32")))
    assert to_numpy(counts).tolist() == [[1, 1, 1, 2], [2, 1, 1, 1]]


@pytest.mark.skipif(keras.config.backend() != "jax", reason="counts traces of JAX")
def test_choose_tokens_compiles_once_for_all_values():
    import jax

    traces = []

    def program(*arguments):
        traces.append(1)
        return choose_tokens(*arguments, num_top_logprobs=2)

    compiled = jax.jit(program)
    for seed in range(4):
        configs, prompts, new, logits = random_batch(seed, frequency_penalty=seed / 2)
        arrays = sampling_arrays(configs, prompts, VOCABULARY, STOP_IDS)
        uniforms = np.full(BATCH, 0.3, "float32")
        step = np.int32(seed)
        compiled(logits, arrays, counts_of(new), uniforms, step)
    assert len(traces) == 1
