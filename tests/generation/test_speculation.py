"""Speculative decoding: the text is that without a draft, in fewer steps."""

import dataclasses

import keras_hub
import numpy as np
import pytest
import tiny_models
from tensorflow_marks import first_on_tensorflow
from tokenizer_models import trained_model

from keras_openllama import DraftModel, PromptLookup, SamplingConfig
from keras_openllama.generation.drafting import NgramIndex, common_prefix
from keras_openllama.generation.speculation import LONGEST_PAUSE, ProposalWindow

pytestmark = pytest.mark.usefixtures("compile_fast")
# Likely tokens, so that a random model repeats itself now and then.
SAMPLED = SamplingConfig(
    *(0.6, 12, 0.95), repetition_penalty=0.8, frequency_penalty=0.05, seed=3
)
SAMPLING = [None, SAMPLED]
PROMPT = "the sea, the sea, the"


@pytest.fixture(scope="module")
def lm():
    """Heads of 100 elements, which queries share."""
    shape = dataclasses.replace(tiny_models.SHAPES[3], num_layers=2)
    return tiny_models.random_lm(shape, trained_model(True))


class Oracle:
    """A draft that knows what comes next, up to an error in each `period` tokens."""

    def __init__(self, ids, period=None, max_tokens=15):
        self.ids, self.period, self.max_tokens = ids, period, max_tokens
        self.stats = PromptLookup().stats

    def check(self, model):
        pass

    def proposals(self, options):
        position = 0
        new_ids, number = yield []
        while True:
            position += len(new_ids)
            assert self.ids[:position][-len(new_ids) :] == new_ids or not new_ids
            ids = [
                (token + 1) % 512 if self.period and i % self.period == 0 else token
                for i, token in enumerate(self.ids)
            ]
            new_ids, number = yield ids[position : position + number]


def generate(lm, prompt=PROMPT, new=40, **options):
    options = {"max_new_tokens": new, "stop_token_ids": None, **options}
    return lm.generate(prompt, strip_prompt=True, **options)


def new_ids(lm, **options):
    return generate(lm, logprobs=0, **options).token_ids


@pytest.fixture
def oracle(lm):
    """A function that generates with an `Oracle`, and returns it and the result."""

    def run(period=None, max_tokens=15, **options):
        sampling = options.get("sampling")
        oracle = Oracle(new_ids(lm, sampling=sampling), period, max_tokens)
        return oracle, generate(lm, draft=oracle, **options)

    return run


@first_on_tensorflow("sampling", SAMPLING)
@first_on_tensorflow("draft", ["prompt_lookup", "same model", "other model"])
def test_generate_with_a_draft_gives_the_text_without(lm, draft, sampling):
    if draft != "prompt_lookup":
        other = tiny_models.random_lm(tiny_models.SHAPES[0], trained_model(True))
        draft = DraftModel(lm if draft == "same model" else other)
    expected = generate(lm, sampling=sampling)
    assert generate(lm, sampling=sampling, draft=draft) == expected
    pieces = lm.stream(
        PROMPT, max_new_tokens=40, stop_token_ids=None, sampling=sampling, draft=draft
    )
    assert "".join(pieces) == expected


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("period", [None, 2, 5, 11])
@pytest.mark.slow_on_tensorflow
def test_rejected_proposals_do_not_change_the_text(lm, oracle, sampling, period):
    draft, text = oracle(period, sampling=sampling)
    assert text == generate(lm, sampling=sampling)
    assert draft.stats.tokens == 40
    assert draft.stats.tokens == draft.stats.accepted + draft.stats.steps
    if period is None:
        assert draft.stats.acceptance_rate == 1
        assert draft.stats.steps == 4  # Of 4, 8 and 16 tokens, and the rest.


@pytest.mark.slow_on_tensorflow
def test_a_quantized_model_verifies_proposals(oracle):
    lm = tiny_models.random_lm(tiny_models.SHAPES[1], initializer_std=0.15)
    lm.quantize("int8")
    ids = np.array([[5, 6, 7, 5, 6, 7, 5]])
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    for sampling in SAMPLING:
        options = dict(max_new_tokens=24, stop_token_ids=None, sampling=sampling)
        expected = lm.generate(inputs, **options)["token_ids"]
        for draft in (PromptLookup(), DraftModel(lm, num_tokens=7)):
            found = lm.generate(inputs, draft=draft, **options)["token_ids"]
            np.testing.assert_array_equal(found, expected)
        assert draft.stats.acceptance_rate == 1


@first_on_tensorflow("sampling", SAMPLING)
def test_a_draft_model_equal_to_the_model_is_always_right(lm, sampling):
    draft = DraftModel(lm, num_tokens=6)
    generate(lm, sampling=sampling, draft=draft)
    assert draft.stats.acceptance_rate == 1
    assert draft.stats.tokens_per_step > 5


@pytest.mark.slow_on_tensorflow
def test_logprobs_are_those_without_a_draft(lm, oracle):
    options = dict(sampling=SAMPLED, logprobs=3)
    expected = generate(lm, **options)
    _, found = oracle(7, **options)
    assert found.token_ids == expected.token_ids
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    for ours, theirs in zip(found.top_logprobs, expected.top_logprobs, strict=True):
        assert list(ours) == list(theirs)


@pytest.mark.slow_on_tensorflow
def test_a_stop_id_ends_an_accepted_run(lm, oracle):
    ids = new_ids(lm, sampling=SAMPLED)
    stop = next(ids[i] for i in range(5, 30) if ids[i] not in ids[:i])
    expected = generate(lm, sampling=SAMPLED, logprobs=0, stop_token_ids=[stop])
    draft, found = oracle(sampling=SAMPLED, logprobs=0, stop_token_ids=[stop])
    assert found.token_ids == expected.token_ids == ids[: ids.index(stop) + 1]
    assert found.finish_reason == "stop"
    assert draft.stats.tokens == len(found.token_ids)


@pytest.mark.slow_on_tensorflow
def test_a_stop_string_ends_an_accepted_run(lm, oracle):
    text = generate(lm)
    stop = text[len(text) // 2 :][:3]
    expected = generate(lm, stop=stop, logprobs=0)
    assert len(expected.token_ids) < 40
    for draft in (oracle(stop=stop)[0], PromptLookup()):
        found = generate(lm, stop=stop, logprobs=0, draft=draft)
        assert found.text == expected.text == text[: text.index(stop)]
        assert found.token_ids == expected.token_ids


@pytest.mark.parametrize("new", [1, 2, 3, 6])
@pytest.mark.slow_on_tensorflow
def test_the_limit_ends_an_accepted_run(lm, oracle, new):
    draft, found = oracle(new=new, logprobs=0)
    assert found.token_ids == new_ids(lm)[:new]
    assert draft.stats.tokens == new


@pytest.mark.slow_on_tensorflow
def test_a_prompt_of_one_token(lm):
    inputs = {"token_ids": np.array([[9]]), "padding_mask": np.ones((1, 1))}
    options = dict(max_new_tokens=8, stop_token_ids=None)
    expected = lm.generate(inputs, **options)["token_ids"]
    for draft in ("prompt_lookup", lm):
        found = lm.generate(inputs, draft=draft, **options)["token_ids"]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow_on_tensorflow
def test_several_prompts_and_samples_are_generated_one_after_the_other(lm):
    prompts = [PROMPT, "a ship", "it"]
    options = dict(sampling=[SAMPLED, SamplingConfig(seed=8), SAMPLED], num_samples=2)
    expected = generate(lm, prompts, new=9, **options)
    assert generate(lm, prompts, new=9, draft="prompt_lookup", **options) == expected


@pytest.mark.slow_on_tensorflow
def test_streams_with_drafts_do_not_disturb_each_other(lm):
    def start(prompt):
        options = dict(max_new_tokens=9, stop_token_ids=None)
        return lm.stream(prompt, draft="prompt_lookup", **options)

    alone = ["".join(start(prompt)) for prompt in (PROMPT, "a ship")]
    streams = [start(PROMPT), start("a ship")]
    found = ["", ""]
    while any(pieces := [next(stream, "") for stream in streams]):
        found = [text + piece for text, piece in zip(found, pieces, strict=True)]
    assert found == alone


@pytest.mark.slow_on_tensorflow
def test_training_changes_the_text_with_a_draft(lm):
    before = generate(lm, draft="prompt_lookup")
    head = lm.lm_head.kernel
    saved = np.array(head.numpy())
    head.assign(saved[::-1])
    try:
        assert before != generate(lm) == generate(lm, draft="prompt_lookup")
    finally:
        head.assign(saved)


def test_a_draft_model_needs_the_same_vocabulary(lm):
    other = tiny_models.random_lm(tiny_models.SHAPES[0])
    with pytest.raises(ValueError, match=r"vocabulary sizes 199 \(draft\) and 512"):
        generate(lm, draft=other)
    proto = trained_model(False)
    with pytest.raises(ValueError, match="same tokenizer"):
        lm.stream(PROMPT, draft=tiny_models.random_lm(tiny_models.SHAPES[0], proto))


@pytest.mark.parametrize("sampler", ["beam", "top_k"])
def test_a_draft_needs_greedy_decoding_or_a_sampling_config(lm, sampler):
    lm.compile(sampler=keras_hub.samplers.get(sampler))
    try:
        with pytest.raises(ValueError, match="`draft` needs greedy decoding"):
            generate(lm, draft="prompt_lookup")
    finally:
        lm.compile(sampler="greedy")


@pytest.mark.parametrize("draft", [5, PromptLookup, ["prompt_lookup"]])
def test_generate_rejects_other_drafts(lm, draft):
    with pytest.raises(ValueError, match="`draft` must be"):
        generate(lm, draft=draft)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PromptLookup(max_tokens=16), "`max_tokens` must be"),
        (lambda: PromptLookup(max_ngram=2, min_ngram=3), "`min_ngram` must be"),
        (lambda: DraftModel("nano"), "`lm` must be"),
    ],
)
@pytest.mark.backend_free
def test_drafts_validate_their_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.backend_free
def test_ngram_index_prefers_long_and_recent_occurrences():
    index = NgramIndex(1, 3)
    index.append([1, 2, 3, 4, 9, 2, 3, 5, 7, 2, 3])
    assert index.continuation(2) == [5, 7]  # The later one of (2, 3).
    index.append([4, 8, 1, 2, 3])
    assert index.continuation(2) == [4, 9]  # (1, 2, 3) is longer.
    index.append([77])
    assert index.continuation(2) == []
    assert NgramIndex(2, 3).continuation(4) == []


@pytest.mark.backend_free
def test_proposal_window_pauses_longer_after_each_failure():
    window = ProposalWindow(4)
    lengths = []
    for _ in range(200):
        lengths.append(window.length)
        window.update(window.length, 0)
    assert lengths[:2] == [3, 3]
    rest = "".join(map(str, lengths[2:]))
    assert [len(zeros) for zeros in rest.split("3")][:5] == [1, 2, 4, 8, 16]
    assert sum(length > 0 for length in lengths[-100:]) <= 100 / LONGEST_PAUSE
    window = ProposalWindow(4)
    window.update(3, 3)
    assert window.length == 4
    assert ProposalWindow(1).length == 1


@pytest.mark.backend_free
def test_common_prefix_of_equal_tokens():
    assert common_prefix([], [4]) == 0
    assert common_prefix([4, 5], [4, 5, 6]) == 2
    assert common_prefix([4, 5], [4]) == 1
