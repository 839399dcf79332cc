import json

import pytest

from keras_openllama import OpenLlamaTokenizer
from keras_openllama.serving.constraints import ConstraintFactory, grammar_of
from keras_openllama.serving.errors import ApiError
from keras_openllama.text.token_bytes import token_bytes

pytestmark = pytest.mark.backend_free

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return OpenLlamaTokenizer.from_preset("open_llama_nano")


@pytest.fixture(scope="module")
def factory(tokenizer):
    table = token_bytes(tokenizer.vocabulary)
    # The model has more logits than the tokenizer has tokens.
    return ConstraintFactory(table, [2], 3080, tokenizer.tokenize_continuation)


def accepts(factory, tokenizer, response_format, text):
    """Whether the tokens of a text, and then the end, are allowed one by one."""
    constraint = factory.make(grammar_of(response_format))
    for token_id in [*tokenizer.tokenize_continuation(text), 2]:
        allowed = constraint.allowed()
        assert allowed.shape == (3080,) and not allowed[3072:].any()
        if not allowed[token_id]:
            return False
        constraint.accept(token_id)
    return True


def test_json_schema_allows_objects_of_the_schema_only(factory, tokenizer):
    described = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}

    def is_allowed(value):
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        return accepts(factory, tokenizer, described, text)

    assert is_allowed({"name": "Ahab é 海", "age": 58})
    assert not is_allowed({"name": "Ahab"})
    assert not is_allowed({"name": "Ahab", "age": "old"})
    assert not is_allowed({"name": "Ahab", "age": 58, "x": 1})


def test_json_object_allows_any_object(factory, tokenizer):
    anything = {"type": "json_object"}
    assert accepts(factory, tokenizer, anything, '{"a":[1,null],"b":{}}')
    assert not accepts(factory, tokenizer, anything, "[1]")


def test_regex_allows_texts_that_match(factory, tokenizer):
    date = {"type": "regex", "pattern": r"\d{4}-\d\d?( or so)?"}
    assert accepts(factory, tokenizer, date, "1851-10")
    assert accepts(factory, tokenizer, date, "1851-1 or so")
    assert not accepts(factory, tokenizer, date, "1851")
    assert not accepts(factory, tokenizer, date, " 1851-10")


def test_banned_tokens_are_never_allowed(factory, tokenizer):
    (yes,) = tokenizer.tokenize_continuation("y")
    grammar = grammar_of({"type": "regex", "pattern": "y|no"})
    assert not factory.make(grammar, [yes]).allowed()[yes]


def test_allowed_raises_an_error_if_nothing_is(factory):
    constraint = factory.make(
        grammar_of({"type": "regex", "pattern": "y"}), [*range(3072)]
    )
    with pytest.raises(ApiError, match="No token continues the text"):
        constraint.allowed()


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "xml"},
        {"type": "regex"},
        {"type": "regex", "pattern": "("},
        {"type": "regex", "pattern": "(?=a)b"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": []}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://a/b"}}},
        {"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
    ],
)
def test_grammar_of_refuses_what_it_cannot_enforce(response_format):
    with pytest.raises(ApiError) as caught:
        grammar_of(response_format)
    assert caught.value.param == "response_format"
