"""Fine-tuning examples from JSON files."""

import json

import pytest

from keras_openllama.data.instructions import (
    ExampleErrors,
    read_examples,
    read_located_examples,
    split_examples,
)

pytestmark = pytest.mark.backend_free
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}


def write(path, *lines):
    path.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    )
    return path


def test_read_examples_ignores_other_keys(tmp_path):
    pair = {"prompt": "a", "response": "b"}
    roles = ("user", "assistant")
    chat = {"messages": [{"role": role, "content": "a"} for role in roles]}
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
        ({"messages": [{"role": "user"}]}, None, r"line 2: `messages\[0\]` must be"),
        ({"messages": "Hi"}, None, "line 2: its 'messages' must be a list"),
        (r'{"text": "\ud800"}', None, "line 2: not valid UTF-8, or half of a char"),
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
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: not valid UTF-8"):
        read_examples([path])


def test_read_examples_names_all_errors_at_once(tmp_path):
    good, empty = {"text": "a"}, {"text": " "}
    one = write(tmp_path / "one.jsonl", good, "{", {"t": 1}, empty)
    two = write(tmp_path / "two.jsonl", "")
    with pytest.raises(ValueError, match="3 errors of 4 examples") as error:
        read_examples([one, two])
    for part in ("one.jsonl, line 2: not", "one.jsonl, line 3: it must have the keys"):
        assert part in str(error.value)
    assert "two.jsonl has no examples" in str(error.value)
    assert "1 example skipped: empty text" in str(error.value)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "response": ""}, "empty response"),
        ({"prompt": "a", "completion": None}, "empty response"),
        ({"instruction": "a", "input": "", "output": "\n"}, "empty response"),
        ({"question": "", "answer": "a"}, "empty prompt"),
        ({"messages": [IMAGE]}, "content of type image_url"),
    ],
)
def test_read_examples_skips_what_cannot_be_learned(record, reason, tmp_path):
    good = [{"prompt": "a", "response": "b"}] * 9
    path = write(tmp_path / "x.jsonl", *good, record)
    assert read_examples([path]) == good
    errors = ExampleErrors()
    read_located_examples([path], None, errors)
    assert errors.summary() == [f"1 example skipped: {reason} ({path}, line 10)"]
    path = write(tmp_path / "x.jsonl", *good, record, record)
    with pytest.raises(
        ValueError, match="2 of 11 examples would be skipped, more"
    ) as e:
        read_examples([path])
    assert f"2 examples skipped: {reason} ({path}, line 10; {path}, line" in str(
        e.value
    )
    assert read_examples([path], max_skipped=0.5) == good


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
