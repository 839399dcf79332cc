import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from tests.support.tokenizer_models import large_model, trained_model

V1 = OpenLlamaTokenizer(trained_model(keep_spaces=False))
V2 = OpenLlamaTokenizer(trained_model(keep_spaces=True))
LARGE = OpenLlamaTokenizer(large_model())

quick = settings(max_examples=150, deadline=None, derandomize=True)
backend_free = pytest.mark.backend_free
by_name = pytest.mark.parametrize(
    "tokenizer", [V1, V2, LARGE], ids=["v1", "v2", "large"]
)


def ids_of(tokenizer):
    """Random ids. Half of them are bytes, and many are not valid UTF-8."""
    multibyte = st.sampled_from([3 + byte for byte in "é日🦙".encode()])
    return st.lists(
        st.one_of(
            st.integers(0, tokenizer.vocabulary_size() - 1),
            st.integers(0, 2),
            st.integers(3, 258),
            multibyte,
            st.just(tokenizer.token_to_id("▁")),
        ),
        max_size=30,
    )


def streamed(tokenizer, ids, prefix=()):
    decoder = tokenizer.stream_decoder(prefix_ids=prefix)
    pieces = [decoder.push(token_id) for token_id in ids]
    return [*pieces, decoder.flush()]


@backend_free
@by_name
@given(st.data())
@quick
def test_stream_decoder_equals_detokenize(tokenizer, data):
    ids = data.draw(ids_of(tokenizer))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.detokenize(ids)


@backend_free
@by_name
@given(st.data())
@quick
def test_stream_decoder_continues_a_prefix(tokenizer, data):
    prefix = data.draw(ids_of(tokenizer))
    ids = data.draw(ids_of(tokenizer))
    before = tokenizer.detokenize(prefix)
    full = tokenizer.detokenize(prefix + ids)
    text = "".join(streamed(tokenizer, ids, prefix))
    if full.startswith(before):
        assert text == full[len(before) :]
    else:  # The stream has completed the character that the prefix ends in.
        # At most three pending bytes were shown as U+FFFD. U+FFFD of invalid bytes
        # stay.
        assert any(
            before.endswith("\ufffd" * n) and before[:-n] + text == full
            for n in (1, 2, 3)
        )


@backend_free
def test_stream_decoder_completes_the_last_character_of_the_prefix():
    ids = V2("a 日")
    assert "".join(streamed(V2, ids[-1:], ids[:-1])) == "日"
    assert "".join(streamed(V2, [V2.token_to_id("b")], ids[:-1])) == "b"
    # An invalid byte before the pending one.
    rest, first = V2.token_to_id("<0x80>"), V2.token_to_id("<0xC2>")
    assert "".join(streamed(V2, [rest], [rest, first])) == "\x80"
    assert V2.detokenize([rest, first, rest]) == "\ufffd\x80"


@backend_free
@by_name
def test_stream_decoder_never_emits_an_incomplete_character(tokenizer):
    text = "A llama: 🦙, naïve 日本語!"
    pieces = streamed(tokenizer, tokenizer(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


@backend_free
def test_stream_decoder_preserves_spaces():
    text = "  two  spaces\n    four, and at the end  "
    assert "".join(streamed(V2, V2(text))) == text


@backend_free
def test_stream_decoder_preserves_the_space_after_a_prefix():
    prompt, continuation = V2("The whole"), V2("whole")
    assert "".join(streamed(V2, continuation)) == "whole"
    assert "".join(streamed(V2, continuation, prompt)) == " whole"
    # A start token has no text, so the text starts after it.
    assert "".join(streamed(V2, continuation, [1])) == "whole"


@backend_free
def test_stream_decoder_emits_invalid_bytes_immediately():
    decoder = V2.stream_decoder()
    emoji = [3 + byte for byte in "🦙".encode()]
    assert [decoder.push(i) for i in emoji[:3]] == ["", "", ""]
    assert decoder.push(V2.token_to_id("a")) == "\ufffd\ufffd\ufffda"
    assert [decoder.push(i) for i in emoji] == ["", "", "", "🦙"]
    assert [decoder.push(i) for i in emoji[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd\ufffd" and decoder.flush() == ""


@backend_free
def test_stream_decoder_decodes_at_most_two_ids_per_call(monkeypatch):
    longest = 0

    class Counting:
        def __init__(self, processor):
            self.processor = processor

        def __getattr__(self, name):
            return getattr(self.processor, name)

        def decode(self, ids):
            nonlocal longest
            longest = max(longest, len(ids))
            return self.processor.decode(ids)

    tokenizer = OpenLlamaTokenizer(V2.proto)
    counting = Counting(tokenizer.processor)
    monkeypatch.setattr(tokenizer.vocabulary, "processor", counting)
    streamed(tokenizer, V2("日本 text " * 200), prefix=[1] * 50 + V2("a b" * 50))
    assert 0 < longest <= 2


def test_stream_decoder_accepts_backend_tensors():
    tensor = keras.ops.convert_to_tensor(V2("some text"), "int32")
    assert "".join(streamed(V2, tensor, tensor)) == " some text"


@backend_free
@pytest.mark.parametrize("bad", [512, -1])
def test_stream_decoder_rejects_ids_outside_the_vocabulary(bad):
    for use in (
        lambda: V2.stream_decoder().push(bad),
        lambda: V2.stream_decoder(prefix_ids=[5, bad]),
    ):
        with pytest.raises(
            ValueError, match=rf"`token_id` .* 0 to 511. Received: {bad}$"
        ):
            use()
