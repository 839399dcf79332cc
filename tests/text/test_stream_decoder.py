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
    """Random ids of which half are bytes, many of them no valid UTF-8."""
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
def test_streamed_pieces_join_to_the_whole_text(tokenizer, data):
    ids = data.draw(ids_of(tokenizer))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.detokenize(ids)


@backend_free
@by_name
@given(st.data())
@quick
def test_a_stream_continues_a_prefix(tokenizer, data):
    prefix = data.draw(ids_of(tokenizer))
    ids = data.draw(ids_of(tokenizer))
    before = tokenizer.detokenize(prefix)
    whole = tokenizer.detokenize(prefix + ids)
    text = "".join(streamed(tokenizer, ids, prefix))
    if whole.startswith(before):
        assert text == whole[len(before) :]
    else:  # The stream has completed the character that the prefix ends in.
        # At most three bytes wait for its rest, each shown as a mark; marks of bytes
        # that were no character stay.
        assert any(
            before.endswith("\ufffd" * n) and before[:-n] + text == whole
            for n in (1, 2, 3)
        )


@backend_free
def test_a_stream_completes_the_character_that_the_prefix_ends_in():
    ids = V2("a 日")
    assert "".join(streamed(V2, ids[-1:], ids[:-1])) == "日"
    assert "".join(streamed(V2, [V2.token_to_id("b")], ids[:-1])) == "b"
    # A byte that is no character stands before the one that waits.
    rest, first = V2.token_to_id("<0x80>"), V2.token_to_id("<0xC2>")
    assert "".join(streamed(V2, [rest], [rest, first])) == "\x80"
    assert V2.detokenize([rest, first, rest]) == "\ufffd\x80"


@backend_free
@by_name
def test_a_stream_never_emits_half_a_character(tokenizer):
    text = "A llama: 🦙, naïve 日本語!"
    pieces = streamed(tokenizer, tokenizer(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


@backend_free
def test_a_stream_keeps_spaces():
    text = "  two  spaces\n    four, and at the end  "
    assert "".join(streamed(V2, V2(text))) == text


@backend_free
def test_first_token_after_a_prefix_keeps_its_space():
    prompt, continuation = V2("The whole"), V2("whole")
    assert "".join(streamed(V2, continuation)) == "whole"
    assert "".join(streamed(V2, continuation, prompt)) == " whole"
    # A start token is no text: what follows is the start of the text.
    assert "".join(streamed(V2, continuation, [1])) == "whole"


@backend_free
def test_bytes_that_cannot_become_a_character_are_emitted_at_once():
    decoder = V2.stream_decoder()
    emoji = [3 + byte for byte in "🦙".encode()]
    assert [decoder.push(i) for i in emoji[:3]] == ["", "", ""]
    assert decoder.push(V2.token_to_id("a")) == "\ufffd\ufffd\ufffda"
    assert [decoder.push(i) for i in emoji] == ["", "", "", "🦙"]
    assert [decoder.push(i) for i in emoji[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd\ufffd" and decoder.flush() == ""


@backend_free
def test_cost_of_a_streamed_token_does_not_grow_with_the_text(monkeypatch):
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
    monkeypatch.setattr(tokenizer, "_processor", Counting(tokenizer.processor))
    streamed(tokenizer, V2("日本 text " * 200), prefix=[1] * 50 + V2("a b" * 50))
    assert 0 < longest <= 2


def test_ids_may_be_tensors_of_the_backend():
    tensor = keras.ops.convert_to_tensor(V2("some text"), "int32")
    assert "".join(streamed(V2, tensor, tensor)) == " some text"


@backend_free
@pytest.mark.parametrize("bad", [512, -1])
def test_ids_out_of_range_are_named(bad):
    for use in (
        lambda: V2.stream_decoder().push(bad),
        lambda: V2.stream_decoder(prefix_ids=[5, bad]),
    ):
        with pytest.raises(ValueError, match=rf"`token_id` is {bad}.* size is 512"):
            use()
