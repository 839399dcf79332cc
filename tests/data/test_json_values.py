"""Values of JSON files with their lines."""

import gzip
import json

import pytest

from keras_openllama.data.json_values import read_json_values

pytestmark = pytest.mark.backend_free

ONE, TWO = {"text": "a\u2028[b]"}, {"text": "é", "n": [1]}
FORMS = {
    "lines": (f"{json.dumps(ONE)}\r\n\n{json.dumps(TWO)}", [1, 3]),
    "unescaped lines": (
        f"{json.dumps(ONE, ensure_ascii=False)}\n\n{json.dumps(TWO)}\n",
        [1, 3],
    ),
    "one line": (json.dumps(ONE), [1]),
    "an array": (json.dumps([ONE, TWO]), [1, 1]),
    "an indented array": (json.dumps([ONE, TWO], indent=1), [2, 5]),
    "an array by lines": (f"[{json.dumps(ONE)},\n{json.dumps(TWO)}]\n", [1, 2]),
    "indented objects": (
        "\n".join(json.dumps(x, indent=1) for x in (ONE, TWO)),
        [1, 4],
    ),
    "an array under a key": (
        json.dumps({"v": 1, "data": [ONE, TWO]}, indent=1),
        [4, 7],
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_read_json_values_finds_each_value_with_its_line(form, pack, tmp_path):
    text, lines = FORMS[form]
    path = tmp_path / "x.json"
    path.write_bytes(
        pack(("\ufeff" + text).encode()) if pack is bytes else pack(text.encode())
    )
    found = read_json_values(path)
    assert [value.value for value in found] == [ONE, TWO][: len(lines)]
    assert [value.line for value in found] == lines
    assert not any(value.error for value in found)


def test_read_json_values_keeps_a_chat_as_one_value(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for text, count in ((json.dumps(chat), 1), (json.dumps([chat, chat]), 2)):
        path = tmp_path / "x.json"
        path.write_text(text)
        values = [value.value for value in read_json_values(path)]
        assert values in ([chat] * count, chat)
    path.write_text(f"{json.dumps(chat)}\n{json.dumps(chat)}\n")
    assert [value.value for value in read_json_values(path)] == [chat, chat]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "a"},\n{"text": ', "line 2: not valid JSON.*truncated"),
        (
            gzip.compress(b'{"text": "a"}' * 99)[:-9],
            "could not be decompressed: it is tr",
        ),
        ('{"text": "a"}'.encode("utf-16"), "is UTF-16"),
        (
            b"question,answer\na,b\n",
            "neither JSON Lines nor a JSON array: none of its 2",
        ),
        (b"PAR1\x15\x04\n\xff\n", "neither JSON Lines nor a JSON array"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
    ],
)
def test_read_json_values_names_a_damaged_file(data, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.jsonl.*{message}"):
        read_json_values(path)


def test_read_json_values_ignores_byte_order_marks_of_joined_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf[1]\n\xef\xbb\xbf[2]\n")
    assert [value.value for value in read_json_values(path)] == [[1], [2]]
