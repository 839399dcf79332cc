"""Examples from JSON lines, and which of them a step sees."""

import json

import numpy as np
import pytest

from keras_openllama.data.instructions import InstructionData, divide, read

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


def batches(rows, batch_size=4, seed=0):
    column = np.arange(rows)[:, None]
    x = {"token_ids": column, "padding_mask": column}
    return InstructionData((x, column, column), batch_size, seed)


def seen(batches, steps):
    return [batches.batch(step - 1)[1][:, 0].tolist() for step in steps]


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own():
    flat = [row for batch in seen(batches(10), range(1, 16)) for row in batch]
    epochs = [flat[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert seen(batches(10, seed=1), [1]) != seen(batches(10), [1])


def test_a_step_sees_the_same_wherever_reading_began():
    assert seen(batches(10), [7, 3, 9]) == [
        seen(batches(10), [i])[0] for i in (7, 3, 9)
    ]


def test_steps_cover_the_epochs():
    assert batches(10).steps(1) == 3
    assert batches(10).steps(2) == 5
    assert batches(3, batch_size=8).steps(0.1) == 1
    assert seen(batches(3, batch_size=8), [1])[0][:3] != [0, 0, 0]
