"""A model with more rows than its tokenizer has tokens generates tokens only."""

import keras_hub
import pytest
import torch
from tensorflow_marks import first_on_tensorflow
from tiny_models import TinyShape, in_transformers
from tokenizer_models import trained_model

from keras_openllama import OpenLlamaCausalLM, SamplingConfig

PROMPTS = ["the sea", "a ship"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of 512 pieces, an added token and 1024 rows, in transformers and here."""
    directory = tmp_path_factory.mktemp("padded")
    shape = TinyShape("padded", 4, 2, 16, vocabulary_size=1024, context=64)
    theirs = in_transformers(shape)
    theirs.save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(trained_model(True))
    (directory / "added_tokens.json").write_text('{"<|end|>": 600}')
    return theirs, OpenLlamaCausalLM.from_preset(str(directory))


def test_generate_gives_the_tokens_of_transformers_without_undefined_ones(models):
    theirs, lm = models
    lm.compile(sampler="greedy")
    undefined = [*range(512, 600), *range(601, 1024)]
    for prompt in PROMPTS:
        [ids] = lm.preprocessor.prompt_ids([prompt])
        options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
        free = theirs.generate(torch.tensor([ids]), **options)[0].tolist()
        assert set(free) & set(undefined)
        expected = theirs.generate(
            torch.tensor([ids]), suppress_tokens=undefined, **options
        )[0].tolist()
        tokenizer = lm.preprocessor.tokenizer
        assert lm.generate(
            prompt, max_new_tokens=12, stop_token_ids=None
        ) == tokenizer.detokenize(expected)
        pieces = lm.stream(prompt, max_new_tokens=12, stop_token_ids=None)
        assert prompt + "".join(pieces) == tokenizer.detokenize(expected)


@first_on_tensorflow(
    "sampler",
    [
        keras_hub.samplers.RandomSampler(seed=1),
        keras_hub.samplers.TopKSampler(k=2000, seed=1),
        keras_hub.samplers.TopPSampler(p=0.9, seed=1),
        keras_hub.samplers.BeamSampler(num_beams=3),
        keras_hub.samplers.ContrastiveSampler(k=4, alpha=0.3),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers_never_choose_undefined_tokens(models, sampler):
    _, lm = models
    lm.compile(sampler=sampler)
    tokenizer = lm.preprocessor.tokenizer
    prompts = lm.preprocessor.prompt_ids(PROMPTS)
    loop = lm.make_generate_function()
    for new_tokens in loop.generate(prompts, [12, 12], [2]):
        ids = {i for sequence in new_tokens for i in sequence}
        assert ids and not ids & set(tokenizer.vocabulary.ids_without_token(1024))


@pytest.mark.slow_on_tensorflow
def test_sampling_never_chooses_undefined_tokens(models):
    _, lm = models
    lm.compile(sampler="greedy")
    undefined = lm.preprocessor.tokenizer.vocabulary.ids_without_token(1024)
    results = lm.generate(
        PROMPTS, max_new_tokens=12, sampling=SamplingConfig(3.0, seed=1), logprobs=0
    )
    for result in results:
        assert result.token_ids and not set(result.token_ids) & set(undefined)
