"""Fine-tuning examples from JSON lines files."""

import json

import pytest

from keras_openllama.data.instructions import read_examples, split_examples

pytestmark = pytest.mark.backend_free


def write(path, *lines):
    path.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    )
    return path


def test_read_examples_ignores_other_keys(tmp_path):
    pair = {"prompt": "a", "response": "b"}
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for example, expected in ((pair, pair), (chat, chat), ({"text": "a"}, "a")):
        path = write(tmp_path / "x.jsonl", {**example, "id": 7}, "", example)
        assert read_examples([path]) == [expected, expected]


def test_read_examples_fills_templates(tmp_path):
    path = write(tmp_path / "x.jsonl", {"q": "a", "a": "b", "n": 1})
    templates = "Q: {q}\nA:", " {a}"
    assert read_examples([path], templates) == [
        {"prompt": "Q: a\nA:", "response": " b"}
    ]


@pytest.mark.parametrize(
    ("line", "templates", "message"),
    [
        ("{", None, "line 2: not valid JSON"),
        ("[1]", None, "line 2: not a JSON object"),
        ({"prompt": "a"}, None, "line 2: it must have the keys .* It has: prompt"),
        (
            {"prompt": "a", "response": 7},
            None,
            "line 2: its 'response' must be a string",
        ),
        (
            {"q": "a"},
            ("{q}", "{a}"),
            "line 2: it does not have 'a', which the template",
        ),
        (
            {"prompt": "a", "response": None},
            None,
            "line 2: its 'response' must be a string: None",
        ),
    ],
)
def test_read_examples_names_a_malformed_line(line, templates, message, tmp_path):
    good = {"prompt": "a", "response": "b", "q": "c", "a": "d"}
    path = write(tmp_path / "x.jsonl", good, line)
    with pytest.raises(ValueError, match=r"x\.jsonl, " + message):
        read_examples([path], templates)


def test_read_examples_names_a_line_with_invalid_utf8(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: 'utf-8'"):
        read_examples([path])


def test_read_examples_rejects_empty_files_and_mixed_kinds(tmp_path):
    with pytest.raises(ValueError, match="has no examples"):
        read_examples([write(tmp_path / "empty.jsonl", "")])
    mixed = {"prompt": "a", "response": "b"}, {"text": "c"}
    with pytest.raises(ValueError, match="several kinds"):
        read_examples([write(tmp_path / "mixed.jsonl", *mixed)])


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.0, 0), (0.001, 1), (0.25, 5), (0.999, 19)]
)
def test_split_examples_selects_a_fraction_for_validation(fraction, count):
    examples = list(range(20))
    assert split_examples(["one"], fraction, seed=1) == (["one"], [])
    train, validation = split_examples(examples, fraction, seed=1)
    assert len(validation) == count and sorted(train + validation) == examples
    assert split_examples(examples, fraction, seed=1) == (train, validation)


def test_read_examples_ignores_a_byte_order_mark_and_names_other_encodings(tmp_path):
    path = tmp_path / "pairs.jsonl"
    line = '{"prompt": "2 + 2 =", "response": " 4"}\n'
    path.write_text(line * 2, "utf-8-sig")
    assert len(read_examples([path])) == 2
    path.write_text(line, "utf-16")
    with pytest.raises(ValueError, match=r"pairs\.jsonl is UTF-16"):
        read_examples([path])
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl is a Git LFS pointer"):
        read_examples([path])
