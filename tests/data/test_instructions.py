"""Examples from JSON lines."""

import json

import pytest

from keras_openllama.data.instructions import divide, read

pytestmark = pytest.mark.backend_free


def write(path, *lines):
    path.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    )
    return path


def test_pairs_chats_and_texts_are_read_without_what_is_beside_them(tmp_path):
    pair = {"prompt": "a", "response": "b"}
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for example, expected in ((pair, pair), (chat, chat), ({"text": "a"}, "a")):
        path = write(tmp_path / "x.jsonl", {**example, "id": 7}, "", example)
        assert read([path]) == [expected, expected]


def test_templates_make_pairs_of_other_keys(tmp_path):
    path = write(tmp_path / "x.jsonl", {"q": "a", "a": "b", "n": 1})
    templates = "Q: {q}\nA:", " {a}"
    assert read([path], templates) == [{"prompt": "Q: a\nA:", "response": " b"}]


@pytest.mark.parametrize(
    ("line", "templates", "message"),
    [
        ("{", None, "line 2: no JSON"),
        ("[1]", None, "line 2: no JSON object"),
        ({"prompt": "a"}, None, "line 2: it has none of .* It has: prompt"),
        ({"prompt": "a", "response": 7}, None, "line 2: its 'response' is no string"),
        ({"q": "a"}, ("{q}", "{a}"), "line 2: it has no 'a', which the template"),
        (
            {"prompt": "a", "response": None},
            None,
            "line 2: its 'response' is no string: None",
        ),
    ],
)
def test_a_malformed_line_is_named(line, templates, message, tmp_path):
    good = {"prompt": "a", "response": "b", "q": "c", "a": "d"}
    path = write(tmp_path / "x.jsonl", good, line)
    with pytest.raises(ValueError, match=r"x\.jsonl, " + message):
        read([path], templates)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: 'utf-8'"):
        read([path])


def test_files_without_examples_or_of_several_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no example in"):
        read([write(tmp_path / "empty.jsonl", "")])
    mixed = {"prompt": "a", "response": "b"}, {"text": "c"}
    with pytest.raises(ValueError, match="several kinds"):
        read([write(tmp_path / "mixed.jsonl", *mixed)])


@pytest.mark.parametrize(
    ("share", "apart"), [(0.0, 0), (0.001, 1), (0.25, 5), (0.999, 19)]
)
def test_a_share_is_set_apart(share, apart):
    examples = list(range(20))
    assert divide(["one"], share, seed=1) == (["one"], [])
    kept, other = divide(examples, share, seed=1)
    assert len(other) == apart and sorted(kept + other) == examples
    assert divide(examples, share, seed=1) == (kept, other)
