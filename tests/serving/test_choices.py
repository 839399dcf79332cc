import random
from types import SimpleNamespace

import pytest

from keras_openllama import OpenLlamaTokenizer
from keras_openllama.serving.choices import ChoiceDecoder

pytestmark = pytest.mark.backend_free


@pytest.fixture(scope="module")
def tokenizer():
    return OpenLlamaTokenizer.from_preset("open_llama_nano")


def event(token_id, finish_reason=None, logprob=-0.5):
    top = ((token_id, logprob),)
    return SimpleNamespace(
        token_id=token_id,
        logprob=logprob,
        top_logprobs=top,
        finish_reason=finish_reason,
        prompt=None,
    )


def pieces_of(tokenizer, text, stops=(), end=None, reason="length"):
    ids = tokenizer.tokenize_continuation(text) + ([end] if end is not None else [])
    decoder = ChoiceDecoder(tokenizer, [1], stops, (2,), has_logprobs=True)
    last = len(ids) - 1
    pieces = [
        decoder.push(event(token_id, reason if i == last else None))
        for i, token_id in enumerate(ids)
    ]
    return decoder, [piece for piece in pieces if piece]


def test_choice_decoder_returns_the_text_and_all_tokens(tokenizer):
    text = "the sea é 海 and the shore"
    decoder, pieces = pieces_of(tokenizer, text)
    assert "".join(piece.text for piece in pieces) == text
    tokens = [token for piece in pieces for token in piece.tokens]
    ids = tokenizer.tokenize_continuation(text)
    assert [token.token_id for token in tokens] == ids
    assert decoder.num_tokens == len(ids)
    assert [piece.finish_reason for piece in pieces][-1] == "length"
    assert {piece.finish_reason for piece in pieces[:-1]} == {None}


def test_offsets_of_tokens_are_where_their_text_begins(tokenizer):
    text = "the sea and the shore"
    _, pieces = pieces_of(tokenizer, text)
    for token in (token for piece in pieces for token in piece.tokens):
        shown = tokenizer.id_to_token(token.token_id).replace("▁", " ")
        assert text[token.offset :].startswith(shown)


def test_the_token_that_ends_a_text_is_not_a_part_of_it(tokenizer):
    decoder, pieces = pieces_of(tokenizer, "the sea", end=2, reason="stop")
    assert "".join(piece.text for piece in pieces) == "the sea"
    assert pieces[-1].finish_reason == "stop"
    assert 2 not in [token.token_id for piece in pieces for token in piece.tokens]
    assert decoder.num_tokens == len(tokenizer.tokenize_continuation("the sea"))


def test_tokens_of_a_stop_string_are_not_returned(tokenizer):
    _, pieces = pieces_of(tokenizer, "the sea and the shore", stops=(" and the",))
    assert "".join(piece.text for piece in pieces) == "the sea"
    assert pieces[-1].finish_reason == "stop"
    shown = [t.token_id for piece in pieces for t in piece.tokens]
    assert tokenizer.detokenize(shown).strip() == "the sea"


def test_nothing_follows_a_stop_string(tokenizer):
    decoder, _ = pieces_of(tokenizer, "the sea", stops=("sea",))
    assert decoder.finished
    assert decoder.push(event(300)) is None
    assert decoder.push(event(None, "cancelled")) is None


def test_choice_decoder_begins_with_the_tokens_of_an_echoed_prompt(tokenizer):
    prompt, text = "the sea é", " and the shore"
    prompt_ids = [1, *tokenizer(prompt)]
    decoder = ChoiceDecoder(tokenizer, prompt_ids, (), (2,), True, echo=prompt)
    scores = SimpleNamespace(
        token_id=None, finish_reason=None, prompt=[*map(event, prompt_ids[1:])]
    )
    ids = tokenizer.tokenize_continuation(text)
    pieces = [decoder.push(scores), *map(decoder.push, map(event, ids))]
    pieces.append(decoder.push(event(2, "stop")))
    assert "".join(piece.text for piece in pieces) == prompt + text
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [token.token_id for token in tokens] == [*prompt_ids, *ids, 2]
    assert [token.logprob for token in tokens[:2]] == [None, -0.5]
    for token in tokens[1:-1]:
        shown = tokenizer.id_to_token(token.token_id).replace("▁", " ")
        assert (" " + prompt + text)[token.offset + (token.offset > 0) :].startswith(
            shown
        ) or shown.startswith("<0x")
    assert decoder.num_tokens == len(ids)


def test_log_probabilities_are_numbers_of_json(tokenizer):
    decoder = ChoiceDecoder(tokenizer, [1], (), (), has_logprobs=True)
    (token,) = decoder.push(event(300, logprob=float("-inf"))).tokens
    assert token.logprob == -9999.0
    assert token.top == ((300, -9999.0),)


def test_tokens_are_returned_once_and_in_order_for_any_stop_string(tokenizer):
    numbers = random.Random(0)
    text = "the sea and the shore of the sea, and the sun"
    ids = tokenizer.tokenize_continuation(text)
    for _ in range(50):
        start = numbers.randrange(len(text))
        stop = text[start : start + numbers.randint(1, 6)]
        _, pieces = pieces_of(tokenizer, text, stops=(stop,))
        shown = [t.token_id for piece in pieces for t in piece.tokens]
        assert shown == ids[: len(shown)]
        joined = "".join(piece.text for piece in pieces)
        assert joined == text[: text.index(stop)]
        assert tokenizer.detokenize(ids[: len(shown)]).startswith(joined)
