"""Examples in the forms that people have them."""

import json

import pytest

from keras_openllama.text.messages import UnusableExampleError
from keras_openllama.text.records import example_from_record

pytestmark = pytest.mark.backend_free

USER, REPLY = (
    {"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A"))
)
SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "a", "meta": {}}, "a"),
        ({"prompt": "Q", "response": "A"}, {"prompt": "Q", "response": "A"}),
        (
            {"prompt": "Q", "completion": " A", "id": 3},
            {"prompt": "Q", "response": " A"},
        ),
        # Alpaca, Dolly, OpenOrca, question answering.
        ({"instruction": "Q", "input": "", "output": "A", "text": "…"}, [USER, REPLY]),
        (
            {"instruction": "Q", "context": "C", "response": "A", "category": "qa"},
            [{"role": "user", "content": "Q\n\nC"}, REPLY],
        ),
        ({"instruction": "", "input": "Q", "output": "A"}, [USER, REPLY]),
        ({"input": "Q", "output": "A"}, [USER, REPLY]),
        (
            {"system_prompt": "S", "question": "Q", "response": "A"},
            [SYSTEM, USER, REPLY],
        ),
        ({"question": "Q", "answer": "A"}, [USER, REPLY]),
        # ShareGPT and LIMA.
        (
            {
                "id": "x",
                "system": "S",
                "conversations": [
                    {"from": "human", "value": "Q", "markdown": None},
                    {"from": "gpt", "value": "A"},
                ],
            },
            [SYSTEM, USER, REPLY],
        ),
        ({"conversations": ["Q", "A"], "source": "x"}, [USER, REPLY]),
        # OpenAI.
        (
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {**USER, "content": [{"type": "text", "text": "Q"}], "name": None},
                    {**REPLY, "tool_calls": None, "refusal": None, "weight": 1},
                ],
                "tools": [],
                "parallel_tool_calls": False,
            },
            [USER, REPLY],
        ),
        (
            {
                "messages": [
                    {**USER, "name": "Ann"},
                    {**REPLY, "weight": 0},
                    USER,
                    REPLY,
                ]
            },
            [{**USER, "name": "Ann"}, {**REPLY, "weight": 0}, USER, REPLY],
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "refusal": "No"},
                ]
            },
            [USER, {"role": "assistant", "content": "No"}],
        ),
        ([USER, REPLY], [USER, REPLY]),
        # TRL.
        (
            {"prompt": [USER, REPLY, USER], "completion": [REPLY]},
            [USER, {**REPLY, "weight": 0}, USER, REPLY],
        ),
    ],
    ids=str,
)
def test_example_from_record_knows_the_usual_forms(record, expected):
    example = example_from_record(record)
    found = example["messages"] if isinstance(expected, list) else example
    assert found == expected


def test_example_from_record_has_a_pair_for_models_without_a_chat_template():
    alpaca = example_from_record({"instruction": "Q", "input": "I", "output": "A"})
    assert alpaca["prompt"].endswith(
        "### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\n"
    )
    assert alpaca["response"] == "A"
    found = example_from_record({"question": "Q", "answer": "A", "system": "S"})
    assert found["prompt"] == "S\n\nQuestion: Q\nAnswer:"
    assert found["response"] == " A"


def test_example_from_record_keeps_tools_and_their_calls():
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    function = {"name": "look", "arguments": '{"at": "the sea"}'}
    called = {"role": "assistant", "tool_calls": [{"id": "1", "function": function}]}
    answer = {"role": "tool", "tool_call_id": "1", "content": "blue"}
    record = {"messages": [USER, called, answer, REPLY], "tools": json.dumps([tool])}
    example = example_from_record(record)
    assert example["tools"] == [tool]
    [call] = example["messages"][1]["tool_calls"]
    assert call["function"]["arguments"] == {"at": "the sea"}
    assert example["messages"][2] == answer
    legacy = {"role": "assistant", "content": None, "function_call": function}
    example = example_from_record({"messages": [USER, legacy]})
    [call] = example["messages"][1]["tool_calls"]
    assert call["function"]["name"] == "look"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (7, "not a JSON object"),
        ({"a": 1}, "must have the keys .* It has: a"),
        ({"prompt": "a", "response": 7}, "its 'response' must be a string: 7"),
        ({"messages": [{"role": "user"}]}, r"`messages\[0\]` must be a dict"),
        (
            {"messages": [{"role": 3, "content": "a"}]},
            r"`messages\[0\]` must be a dict",
        ),
        ({"messages": [{**USER, "content": 3}]}, r"content of `messages\[0\]`"),
        ({"messages": [{**USER, "content": [{"text": 3}]}]}, "part of the content"),
        ({"messages": [{**REPLY, "weight": 0.5}]}, "weight .* must be 0 .*or 1"),
        ({"messages": [REPLY], "tools": "{"}, "`tools` is not valid JSON"),
        ({"messages": [{**REPLY, "tool_calls": "x"}]}, "tool calls"),
    ],
)
def test_example_from_record_explains_malformed_records(record, message):
    with pytest.raises(ValueError, match=message) as error:
        example_from_record(record)
    assert not isinstance(error.value, UnusableExampleError)
