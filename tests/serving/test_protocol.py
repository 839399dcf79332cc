import pytest
from hypothesis import given, settings
from request_bodies import BODIES

from keras_openllama import SamplingConfig
from keras_openllama.serving.errors import ApiError
from keras_openllama.serving.json_body import parse_json_object
from keras_openllama.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
)

pytestmark = pytest.mark.backend_free

HI = {"messages": [{"role": "user", "content": "Hi"}]}


def param_of(parse, body):
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert caught.value.status == 400
    return caught.value.param


def test_parse_completion_takes_all_sampling_fields():
    request = parse_completion(
        {
            "model": "nano",
            "prompt": "The sea",
            "max_tokens": 5,
            "temperature": 0.5,
            "top_k": 3,
            "top_p": 0.9,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "logit_bias": {"7": -100},
            "banned_tokens": [8],
            "min_tokens": 2,
            "seed": 9,
            "n": 2,
            "stop": ["a", "b"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": 3,
            "user": "somebody",
        }
    )
    assert request.prompts == ("The sea",)
    options = request.options
    assert options.sampling == SamplingConfig(
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={7: -100},
        banned_tokens=[8],
        min_new_tokens=2,
        seed=9,
    )
    assert (options.model, options.max_tokens, options.num_choices) == ("nano", 5, 2)
    assert (options.stop, options.top_logprobs) == (("a", "b"), 3)
    assert options.stream and options.include_usage


@pytest.mark.parametrize(
    "prompt, prompts",
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1], [2, 3]], ([1], [2, 3])),
    ],
)
def test_parse_completion_takes_texts_and_token_ids(prompt, prompts):
    assert parse_completion({"prompt": prompt}).prompts == prompts


def test_parse_completion_has_the_default_of_openai_for_max_tokens():
    assert parse_completion({"prompt": "a"}).options.max_tokens == 16
    assert parse_chat(HI).options.max_tokens is None


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_k", 0),
        ("seed", 2**64),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("n", 0),
        ("n", 10**6),
        ("stop", ""),
        ("stop", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 101}),
        ("min_tokens", -1),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("response_format", "json"),
        ("logprobs", 21),
        ("suffix", "end"),
        ("best_of", 2),
        ("prompt", []),
        ("prompt", [1, "a"]),
        ("prompt", {}),
        ("tool", 1),
    ],
)
def test_parse_completion_names_the_field_that_is_wrong(field, value):
    assert param_of(parse_completion, {"prompt": "a", field: value}) == field


def test_parse_completion_may_score_the_prompt_alone():
    body = {"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 0}
    request = parse_completion(body)
    assert request.echo
    assert (request.options.max_tokens, request.options.top_logprobs) == (0, 1)


def test_parse_completion_scores_the_prompt_for_one_choice_only():
    body = {"prompt": "a", "echo": True, "logprobs": 1, "n": 2, "temperature": 1}
    assert param_of(parse_completion, body) == "n"


def test_parse_chat_joins_the_parts_of_a_message():
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "sea"}]
    request = parse_chat({"messages": [{"role": "user", "content": parts}]})
    assert request.messages == ({"role": "user", "content": "Hello, sea"},)


def test_parse_chat_takes_the_messages_that_the_server_sent():
    sent = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None}
    request = parse_chat({"messages": [*HI["messages"], sent, *HI["messages"]]})
    assert request.messages[1] == {"role": "assistant", "content": "Hi"}


def test_parse_chat_prefers_max_completion_tokens():
    body = HI | {"max_tokens": 3, "max_completion_tokens": 4}
    assert parse_chat(body).options.max_tokens == 4


@pytest.mark.parametrize(
    "field, value, param",
    [
        ("messages", [], "messages"),
        ("messages", ["Hi"], "messages[0]"),
        ("messages", [{"role": "tool", "content": "Hi"}], "messages[0].role"),
        ("messages", [{"role": ["user"], "content": "Hi"}], "messages[0].role"),
        ("messages", [{"role": "user", "content": 1}], "messages[0].content"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "messages[0].content[0]",
        ),
        ("messages", [{"role": "user", "content": "", "x": 1}], "messages[0]"),
        ("tools", [{"type": "function"}], "tools"),
        ("tool_choice", "auto", "tool_choice"),
        ("top_logprobs", 2, "top_logprobs"),
        ("logprobs", 2, "logprobs"),
        ("prompt", "a", "prompt"),
    ],
)
def test_parse_chat_names_the_field_that_is_wrong(field, value, param):
    assert param_of(parse_chat, HI | {field: value}) == param


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b"{", b'{"a": NaN}', b"\xff", b'{"a": "\\ud800"}', b"[" * 10**5],
)
def test_parse_json_object_refuses_what_is_not_an_object_of_json(body):
    with pytest.raises(ApiError, match="The body must be"):
        parse_json_object(body)


@pytest.mark.parametrize("parse", [parse_completion, parse_chat])
@given(body=BODIES)
@settings(max_examples=200, deadline=None)
def test_parsers_raise_only_errors_of_the_api(parse, body):
    try:
        request = parse({k: v for k, v in body.items() if v is not None})
    except ApiError as error:
        assert error.status == 400
    else:
        assert isinstance(request, CompletionRequest | ChatRequest)
