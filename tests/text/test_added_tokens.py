"""Added tokens and vocabularies: what is encoded as a token, and what it decodes to."""

import pytest
from tokenizer_models import trained_model

from keras_openllama import OpenLlamaTokenizer
from keras_openllama.text.added_tokens import (
    AddedToken,
    TokenSplitter,
    as_added_tokens,
    undefined_ids,
)

pytestmark = pytest.mark.backend_free
PROTO = trained_model(True)


def test_added_tokens_without_ids_follow_the_others():
    tokens = as_added_tokens(["<b>", AddedToken("<a>", 520)], first_id=512)
    assert [(t.content, t.id) for t in tokens] == [("<a>", 520), ("<b>", 521)]


@pytest.mark.parametrize(
    "tokens",
    [
        "<a>",
        {"<a>": 512},
        [""],
        [3],
        [{"content": "<a>"}],
        [{"content": "<a>", "id": "512"}],
        [{"content": "<a>", "id": True}],
        [{"content": "<a>", "id": 512, "single": True}],
        ["<a>", "<a>"],
        [AddedToken("<a>", 512), AddedToken("<b>", 512)],
    ],
)
def test_tokenizer_rejects_malformed_added_tokens(tokens):
    with pytest.raises(ValueError, match="added_tokens"):
        OpenLlamaTokenizer(PROTO, added_tokens=tokens)


def test_token_splitter_prefers_the_longest_token():
    tokens = {text: AddedToken(text, i) for i, text in enumerate(["<a", "<a>", "b"])}
    splitter = TokenSplitter(tokens)
    assert [i for _, i in splitter.split("<a><a b")] == [1, 0, None, 2]
    assert "".join(part for part, _ in splitter.split("x<a>\n<ab.")) == "x<a>\n<ab."


def test_undefined_ids_lie_between_tokens():
    tokens = [AddedToken("<a>", 513), AddedToken("<b>", 515)]
    assert undefined_ids(tokens, pieces=512) == [512, 514]
    assert undefined_ids([], pieces=512) == []


def test_special_tokens_are_encoded_only_where_control_strings_are_parsed():
    tokenizer = OpenLlamaTokenizer(PROTO, added_tokens=["<|end|>"])
    assert 512 not in tokenizer("a<|end|>")
    assert tokenizer("a<|end|>", parse_special=True)[-1] == 512
    assert tokenizer.detokenize(tokenizer("a<|end|>")) == "a<|end|>"
    assert tokenizer.detokenize([*tokenizer("the sea"), 512]) == "the sea"


def test_tokens_that_are_not_special_are_words():
    word = {"content": "<sep>", "id": 512, "special": False}
    tokenizer = OpenLlamaTokenizer(PROTO, added_tokens=[word])
    ids = tokenizer("the<sep>sea")
    assert ids == [*tokenizer("the"), 512, *tokenizer("sea")]
    assert tokenizer.detokenize(ids) == "the<sep> sea"
    assert tokenizer.tokenize_continuation("<sep>") == [512]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_stream_decoder_equals_detokenize_with_added_tokens(normalized, special):
    token = AddedToken("<sep>", 513, special, normalized)
    tokenizer = OpenLlamaTokenizer(PROTO, added_tokens=[token])
    for text in ("<sep> the sea", "the <sep>sea", " <sep>日<sep>本", "<sep>"):
        ids = tokenizer(text, parse_special=True)
        assert 513 in ids
        decoder = tokenizer.stream_decoder()
        streamed = "".join(map(decoder.push, ids)) + decoder.flush()
        assert streamed == tokenizer.detokenize(ids)


def test_ids_without_a_token_have_a_placeholder_and_no_text():
    tokenizer = OpenLlamaTokenizer(PROTO, added_tokens=[AddedToken("<a>", 514)])
    assert tokenizer.vocabulary_size() == 515 == len(tokenizer.get_vocabulary())
    assert tokenizer.id_to_token(513) == "<undefined 513>"
    assert tokenizer.token_to_id("<a>") == 514
    assert tokenizer.detokenize([513, *tokenizer("a"), 512]) == "a"
    assert tokenizer.vocabulary.ids_without_token(517) == [512, 513, 515, 516]


def test_the_prepend_scheme_decides_about_the_space_after_tokens():
    always, first = (
        OpenLlamaTokenizer(PROTO, added_tokens=["<a>"], prepend_scheme=scheme)
        for scheme in ("always", "first")
    )
    ids = first("<a>the", parse_special=True)
    assert ids == [512, *first.tokenize_continuation("the")]
    assert always("<a>the", parse_special=True) == [512, *always("the")]
    with pytest.raises(ValueError, match="prepend_scheme"):
        OpenLlamaTokenizer(PROTO, prepend_scheme="never")


def test_fingerprint_changes_with_tokens_that_plain_text_can_contain():
    plain = OpenLlamaTokenizer(PROTO).fingerprint
    assert OpenLlamaTokenizer(PROTO, added_tokens=["<a>"]).fingerprint == plain
    word = AddedToken("<a>", 512, special=False)
    assert OpenLlamaTokenizer(PROTO, added_tokens=[word]).fingerprint != plain


def test_tokenizer_config_contains_the_added_tokens():
    tokens = [AddedToken("<a>", 513, special=False, rstrip=True), "<b>"]
    tokenizer = OpenLlamaTokenizer(PROTO, added_tokens=tokens, prepend_scheme="first")
    again = OpenLlamaTokenizer.from_config(tokenizer.get_config())
    assert again.settings() == tokenizer.settings()
