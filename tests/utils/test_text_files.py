"""`decode_text` reads UTF-8 with or without a byte-order mark, and names the rest."""

import pytest

from keras_openllama.utils.text_files import decode_text

pytestmark = pytest.mark.backend_free


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_decode_text_ignores_a_byte_order_mark(encoding):
    assert decode_text("naïve \ufeff".encode(encoding), "a.txt") == "naïve \ufeff"
    assert decode_text("a\0b\0\0".encode(encoding), "a.txt") == "a\0b\0\0"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text".encode("utf-16"), r"a\.txt is UTF-16, not UTF-8.*iconv -f UTF-16"),
        ("naïve".encode("utf-16-le"), r"a\.txt is UTF-16LE, not"),
        ("text".encode("utf-16-be"), r"a\.txt is UTF-16BE.*iconv -f UTF-16BE"),
        ("text".encode("utf-32"), r"a\.txt is UTF-32, not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"Git LFS pointer: `git lfs"),
        (b"caf\xe9", r"a\.txt is not UTF-8 \(byte 3\)"),
    ],
    ids=["UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32", "Git LFS", "Latin-1"],
)
def test_decode_text_names_what_is_not_utf8(data, message):
    with pytest.raises(ValueError, match=message):
        decode_text(data, "a.txt")
