"""`generate` and `stream` with a `SamplingConfig`: each sequence has its own."""

import json

import keras
import keras_hub
import numpy as np
import pytest
import tiny_models
import torch
import transformers
from tensorflow_marks import first_on_tensorflow
from tokenizer_models import trained_model

from keras_openllama import SamplingConfig
from keras_openllama.backend.arrays import to_numpy
from keras_openllama.evaluation.samplers import use_sampler
from keras_openllama.generation.sampling import state as sampling_state
from keras_openllama.generation.sampling.arrays import uniform_numbers
from keras_openllama.generation.sampling.options import SamplingOptions

PROMPTS = ["the sea", "a ship of", "it"]
# Without two sizes of the batch, fewer programs are compiled.
CONFIGS = [
    SamplingConfig(temperature=0.9, top_k=40, seed=5),
    SamplingConfig(temperature=0),
    SamplingConfig(1.3, top_p=0.9, min_p=0.02, presence_penalty=0.4, seed=6),
]
LIMITS = dict(max_new_tokens=12, stop_token_ids=None)


@pytest.fixture(scope="module")
def lm():
    shape = tiny_models.SHAPES[2]
    return tiny_models.random_lm(shape, trained_model(True), initializer_std=0.15)


def as_arrays(prompts):
    width = max(map(len, prompts))
    ids = np.array([row + [0] * (width - len(row)) for row in prompts])
    return {
        "token_ids": ids,
        "padding_mask": tiny_models.right_padding(list(map(len, prompts)), width),
    }


@first_on_tensorflow("shape", tiny_models.SHAPES[1:3], ids=str)
def test_greedy_decoding_with_controls_equals_transformers(shape, tmp_path):
    theirs = tiny_models.in_transformers(shape)
    lm = tiny_models.as_ours(theirs, tmp_path)
    prompts = [row.tolist() for row in tiny_models.batch(shape, 3, 8)]
    prompts = [prompts[0], prompts[1][:3], prompts[2][:6]]
    free = lm.generate(as_arrays(prompts), **LIMITS)["token_ids"]
    likely = [int(free[i, len(row)]) for i, row in enumerate(prompts)]
    controls = [
        dict(repetition_penalty=1.7, logit_bias={likely[0]: -1.5, 9: 0.8}),
        dict(banned_tokens=[likely[1], 40, 41], min_new_tokens=4),
        dict(repetition_penalty=0.8, logit_bias={2: 9.0}, min_new_tokens=5),
    ]
    found = lm.generate(
        as_arrays(prompts),
        max_new_tokens=12,
        stop_token_ids=[2],
        sampling=[SamplingConfig(temperature=0, **options) for options in controls],
    )
    for row, (prompt, options) in enumerate(zip(prompts, controls, strict=True)):
        bias = options.pop("logit_bias", {})
        expected = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=2,
            suppress_tokens=options.pop("banned_tokens", None),
            sequence_bias={(i,): value for i, value in bias.items()} or None,
            **options,
        )[0].tolist()
        length = found["padding_mask"][row].sum()
        assert found["token_ids"][row, :length].tolist() == expected
        assert expected != free[row, : len(expected)].tolist()


@pytest.mark.slow_on_tensorflow
def test_a_request_gives_the_same_text_alone_and_in_a_batch(lm):
    together = lm.generate(PROMPTS, sampling=CONFIGS, **LIMITS)
    backwards = lm.generate(PROMPTS[::-1], sampling=CONFIGS[::-1], **LIMITS)
    assert backwards[::-1] == together
    for prompt, config, text in zip(PROMPTS, CONFIGS, together, strict=True):
        assert lm.generate(prompt, sampling=config, **LIMITS) == text
        assert prompt + "".join(lm.stream(prompt, sampling=config, **LIMITS)) == text
    assert together[1] == lm.generate(PROMPTS[1], **LIMITS)
    other = [SamplingConfig(temperature=0.9, top_k=40, seed=7)] * 3
    assert lm.generate(PROMPTS, sampling=other, **LIMITS)[0] != together[0]


@pytest.mark.slow_on_tensorflow
def test_num_samples_draws_different_texts_of_one_seed(lm):
    config = SamplingConfig(seed=1)
    samples = lm.generate(PROMPTS[0], sampling=config, num_samples=3, **LIMITS)
    assert len(set(samples)) == 3
    assert lm.generate(PROMPTS[0], sampling=config, **LIMITS) == samples[0]
    options = dict(sampling=config, num_samples=2, **LIMITS)
    first, second = lm.generate(PROMPTS[:2], **options)
    assert first == samples[:2] and len(second) == 2
    stripped = lm.generate(PROMPTS[0], strip_prompt=True, **options)
    assert [PROMPTS[0] + text for text in stripped] == first
    without_seed = [
        lm.generate(PROMPTS[0], sampling=SamplingConfig(), **LIMITS) for _ in range(2)
    ]
    assert without_seed[0] != without_seed[1]


def test_tokens_are_drawn_from_the_distribution_of_the_controls(lm):
    """Each token follows from the logits before it and from its random number."""
    config = SamplingConfig(
        *(1.4, 50, 0.97),
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        seed=11,
    )
    result = lm.generate(PROMPTS[1], sampling=config, logprobs=4, **LIMITS)
    [prompt] = lm.preprocessor.prompt_ids([PROMPTS[1]])
    ids = prompt + result.token_ids
    logits = to_numpy(lm.score(np.array([ids])))[0].astype("float64")
    uniforms = uniform_numbers(config.seed, 0, len(result.token_ids))
    processors = transformers.LogitsProcessorList(
        [
            transformers.TemperatureLogitsWarper(config.temperature),
            transformers.TopKLogitsWarper(config.top_k),
            transformers.TopPLogitsWarper(config.top_p),
        ]
    )
    repetition = transformers.RepetitionPenaltyLogitsProcessor(1.2)
    for step, token in enumerate(result.token_ids):
        scores = torch.tensor(logits[len(prompt) + step - 1 :][:1])
        logprobs = torch.log_softmax(scores, dim=-1)[0].numpy()
        assert result.logprobs[step] == pytest.approx(logprobs[token], abs=1e-4)
        top = result.top_logprobs[step]
        assert list(top) == logprobs.argsort()[::-1][:4].tolist()
        np.testing.assert_allclose([*top.values()], logprobs[list(top)], atol=1e-4)
        scores = repetition(torch.tensor([ids[: len(prompt) + step]]), scores)
        counts = np.bincount(result.token_ids[:step], minlength=scores.shape[1])
        scores -= torch.tensor(0.5 * (counts > 0) + 0.3 * counts)
        scores = processors(torch.tensor([ids]), scores)
        cumulative = torch.softmax(scores, dim=-1)[0].cumsum(0).numpy()
        assert token == np.searchsorted(cumulative, uniforms[step], side="right")


def test_generation_ends_with_the_stop_string_or_id(lm):
    free = lm.generate("it", logprobs=1, strip_prompt=True, **LIMITS)
    assert free.finish_reason == "length" and len(free.token_ids) == 12
    assert [len(top) for top in free.top_logprobs] == [1] * 12
    stop = free.text[4:6]
    cut = lm.generate("it", logprobs=1, strip_prompt=True, stop=stop, **LIMITS)
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    n = len(cut.token_ids)
    assert 0 < n < 12 and cut.token_ids == free.token_ids[:n]
    tokenizer = lm.preprocessor.tokenizer
    assert stop in tokenizer.detokenize(cut.token_ids)
    assert stop not in tokenizer.detokenize(cut.token_ids[:-1])
    np.testing.assert_allclose(cut.logprobs, free.logprobs[:n], rtol=1e-5)
    ids = [free.token_ids[5]]
    cut = lm.generate("it", logprobs=1, max_new_tokens=12, stop_token_ids=ids)
    n = free.token_ids.index(ids[0]) + 1
    assert cut.token_ids == free.token_ids[:n] and cut.finish_reason == "stop"


@pytest.mark.slow_on_tensorflow
def test_arrays_have_a_row_for_each_sample(lm):
    prompts = lm.preprocessor.prompt_ids(PROMPTS)
    options = dict(sampling=SamplingConfig(seed=2), **LIMITS)
    rows = lm.generate(as_arrays(prompts[:2]), num_samples=2, **options)
    single = lm.generate(as_arrays(prompts[:2]), **options)
    assert rows["token_ids"].shape[0] == 4
    np.testing.assert_array_equal(rows["token_ids"][::2], single["token_ids"])
    results = lm.generate(as_arrays(prompts[:2]), logprobs=1, **options)
    assert [result.text for result in results] == [None, None]
    for row, prompt, result in zip(single["token_ids"], prompts, results, strict=False):
        assert row[len(prompt) :][:12].tolist() == result.token_ids


def test_generate_compiles_once_for_all_values(lm, monkeypatch):
    if keras.config.backend() == "torch":
        pytest.skip("PyTorch runs eagerly")
    traces = []
    original = sampling_state.choose_tokens

    def counted(*arguments):
        traces.append(1)
        return original(*arguments)

    monkeypatch.setattr(sampling_state, "choose_tokens", counted)
    for seed, config in enumerate(CONFIGS):
        configs = [config, SamplingConfig(banned_tokens=range(seed)), CONFIGS[seed - 1]]
        lm.generate(PROMPTS, sampling=configs, max_new_tokens=13 + seed)
    assert len(traces) <= 2  # None, if an earlier test has compiled the program.


def test_plain_greedy_decoding_is_left_to_the_greedy_sampler(lm):
    def resolved(*arguments, **options):
        return SamplingOptions(*arguments, **options).resolve(lm, 2)

    greedy = SamplingConfig(temperature=0)
    assert resolved() is None and resolved(greedy) is None
    assert resolved(greedy, num_samples=2) is None
    assert resolved([greedy, SamplingConfig()]) is not None
    assert resolved(logprobs=0).configs == [greedy, greedy]


@pytest.mark.parametrize(
    "sampler, options, message",
    [
        ("beam", {"sampling": SamplingConfig()}, "BeamSampler, which runs a search"),
        ("beam", {"logprobs": 1}, "BeamSampler, which runs a search"),
        ("top_k", {"logprobs": 1}, "TopKSampler. Pass `sampling`"),
        ("greedy", {"sampling": CONFIGS[:2]}, "2 for 3 prompts"),
        ("greedy", {"sampling": "greedy"}, "`sampling` must be"),
        ("greedy", {"sampling": [None] * 3}, "`sampling` must be"),
        ("greedy", {"num_samples": 0}, "`num_samples` must be"),
        ("greedy", {"logprobs": -1}, "`logprobs` must be"),
        ("greedy", {"logprobs": 513}, "`logprobs` must be"),
        (
            "greedy",
            {"sampling": SamplingConfig(banned_tokens=[512])},
            "`banned_tokens` must be an integer from 0 to 511",
        ),
    ],
)
def test_sampling_options_that_do_not_apply(lm, sampler, options, message):
    lm.compile(sampler=keras_hub.samplers.get(sampler))
    try:
        with pytest.raises(ValueError, match=message):
            lm.generate(PROMPTS, max_new_tokens=2, **options)
    finally:
        lm.compile(sampler="greedy")


def test_stream_checks_sampling_immediately(lm):
    with pytest.raises(ValueError, match="1 prompts"):
        lm.stream("it", sampling=CONFIGS)
    with pytest.raises(ValueError, match="`banned_tokens`"):
        lm.stream("it", sampling=SamplingConfig(banned_tokens=[512]))


@pytest.mark.slow_on_tensorflow
def test_a_quantized_model_samples_each_sequence_by_itself():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0], initializer_std=0.15)
    lm.quantize("int4")
    prompts = [[1, 5, 9], [1, 7], [1, 8, 4, 3]]
    options = dict(sampling=CONFIGS, **LIMITS)
    together = lm.generate(as_arrays(prompts), logprobs=0, **options)
    for prompt, config, expected in zip(prompts, CONFIGS, together, strict=True):
        options = dict(sampling=[config], logprobs=0, **LIMITS)
        [alone] = lm.generate(as_arrays([prompt]), **options)
        assert alone.token_ids == expected.token_ids
        np.testing.assert_allclose(alone.logprobs, expected.logprobs, atol=1e-4)
        assert alone.top_logprobs == [{}] * 12


@pytest.mark.slow_on_tensorflow
def test_compile_takes_a_sampling_config_as_the_default_of_generate(lm, tmp_path):
    config = SamplingConfig(temperature=0.9, top_k=40, logit_bias={9: 0.5}, seed=5)
    prompt, greedy = PROMPTS[0], SamplingConfig(temperature=0)
    expected = [lm.generate(prompt, sampling=s, **LIMITS) for s in (config, greedy)]
    assert expected[0] != expected[1]
    lm.compile(sampler=config)
    try:
        assert lm.generate(prompt, **LIMITS) == expected[0]
        assert prompt + "".join(lm.stream(prompt, **LIMITS)) == expected[0]
        assert lm.generate(prompt, sampling=greedy, **LIMITS) == expected[1]
        with use_sampler(lm, temperature=0):
            assert lm.generate(prompt, **LIMITS) == expected[1]
        saved = json.loads(json.dumps(lm.get_compile_config()))
        lm.compile()
        lm.compile_from_config(saved)
        assert lm.default_sampling == config
    finally:
        lm.compile()
    assert lm.generate(prompt, **LIMITS) == expected[1]
