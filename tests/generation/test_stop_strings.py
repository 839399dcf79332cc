"""Text while its tokens arrive, up to a stop string."""

import pytest

from keras_openllama.generation.stop_strings import (
    StopStringDecoder,
    decode_until_stopped,
    normalize_stop_strings,
)

pytestmark = pytest.mark.backend_free


class Letters:
    """A tokenizer, and its decoder: each id is a letter. One is always held back."""

    def stream_decoder(self, prefix_ids):
        return _Decoder()


class _Decoder:
    held = ""

    def push(self, token_id):
        shown, self.held = self.held, "abcdef"[token_id]
        return shown

    def flush(self):
        return self.held


def continuations(number, *stops):
    return [StopStringDecoder(Letters(), [], stops) for _ in range(number)]


def test_the_stop_string_that_ends_first_counts_however_tokens_come():
    texts = set()
    for stride in (1, 2, 4):
        (row,) = continuations(1, "abcd", "c")
        for start in range(0, 4, stride):
            row.push(range(start, start + stride))
        row.flush()
        texts.add(row.text)
    assert texts == {"ab"}


def test_rows_grow_and_are_flushed_at_the_end():
    rows = continuations(2)
    steps = decode_until_stopped(rows, iter([[[0, 1], [2]], [[3], []]]))
    seen = [[row.text for row in rows] for _ in steps]
    assert seen == [["a", ""], ["ab", ""], ["abd", "c"]]


def test_no_token_is_asked_for_once_all_rows_have_stopped():
    asked = []

    def tokens():
        for new in ([[0, 2, 1], [0, 1]], [[1], [2, 3]], [[1], [1]]):
            asked.append(new)
            yield new

    rows = continuations(2, "c")
    for _ in decode_until_stopped(rows, tokens()):
        pass
    assert len(asked) == 2
    assert [row.text for row in rows] == ["a", "ab"]


def test_nothing_that_may_begin_a_stop_string_is_shown():
    (row,) = rows = continuations(1, "bcf")
    shown = []
    for _ in decode_until_stopped(rows, ([[i]] for i in (0, 1, 2, 3, 1, 2, 5, 0))):
        shown.append(row.text)
    assert row.stopped and shown[-1] == row.text == "abcd"
    assert all("abcd".startswith(text) for text in shown)


def test_a_stop_string_that_is_never_finished_is_shown_at_the_end():
    (row,) = rows = continuations(1, "bcf")
    for _ in decode_until_stopped(rows, iter([[[0, 1, 2]]])):
        pass
    assert row.text == "abc" and not row.stopped


def test_stop_strings_are_a_string_or_several():
    assert normalize_stop_strings(None) == ()
    assert normalize_stop_strings("ab") == ("ab",)
    assert normalize_stop_strings(["a", "b"]) == ("a", "b")
    for bad in ("", [""], [3], ["a", None]):
        with pytest.raises(ValueError, match="`stop` must be a string or a list"):
            normalize_stop_strings(bad)
