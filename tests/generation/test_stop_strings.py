"""Decoding of new tokens to text, up to a stop string."""

import pytest

from keras_openllama.generation.stop_strings import (
    StopStringDecoder,
    decode_until_stopped,
    normalize_stop_strings,
)

pytestmark = pytest.mark.backend_free


class LetterTokenizer:
    """A tokenizer whose ids are letters. Its decoder withholds the last letter."""

    def stream_decoder(self, prefix_ids):
        return _LetterDecoder()


class _LetterDecoder:
    withheld = ""

    def push(self, token_id):
        released, self.withheld = self.withheld, "abcdef"[token_id]
        return released

    def flush(self):
        return self.withheld


def make_decoders(number, *stops):
    return [StopStringDecoder(LetterTokenizer(), [], stops) for _ in range(number)]


def test_stop_string_that_ends_first_applies_however_tokens_are_grouped():
    texts = set()
    for stride in (1, 2, 4):
        (decoder,) = make_decoders(1, "abcd", "c")
        for start in range(0, 4, stride):
            decoder.push(range(start, start + stride))
        decoder.flush()
        texts.add(decoder.text)
    assert texts == {"ab"}


def test_decode_until_stopped_flushes_all_decoders_at_the_end():
    decoders = make_decoders(2)
    steps = decode_until_stopped(decoders, iter([[[0, 1], [2]], [[3], []]]))
    texts = [[decoder.text for decoder in decoders] for _ in steps]
    assert texts == [["a", ""], ["ab", ""], ["abd", "c"]]


def test_decode_until_stopped_requests_no_tokens_once_all_have_stopped():
    requested = []

    def tokens():
        for new in ([[0, 2, 1], [0, 1]], [[1], [2, 3]], [[1], [1]]):
            requested.append(new)
            yield new

    decoders = make_decoders(2, "c")
    for _ in decode_until_stopped(decoders, tokens()):
        pass
    assert len(requested) == 2
    assert [decoder.text for decoder in decoders] == ["a", "ab"]


def test_decoder_withholds_text_that_may_begin_a_stop_string():
    (decoder,) = decoders = make_decoders(1, "bcf")
    texts = []
    for _ in decode_until_stopped(decoders, ([[i]] for i in (0, 1, 2, 3, 1, 2, 5, 0))):
        texts.append(decoder.text)
    assert decoder.stopped and texts[-1] == decoder.text == "abcd"
    assert all("abcd".startswith(text) for text in texts)


def test_decoder_releases_an_incomplete_stop_string_at_the_end():
    (decoder,) = decoders = make_decoders(1, "bcf")
    for _ in decode_until_stopped(decoders, iter([[[0, 1, 2]]])):
        pass
    assert decoder.text == "abc" and not decoder.stopped


def test_normalize_stop_strings_accepts_a_string_or_a_list():
    assert normalize_stop_strings(None) == ()
    assert normalize_stop_strings("ab") == ("ab",)
    assert normalize_stop_strings(["a", "b"]) == ("a", "b")
    for bad in ("", [""], [3], ["a", None]):
        with pytest.raises(ValueError, match="`stop` must be a string or a list"):
            normalize_stop_strings(bad)
