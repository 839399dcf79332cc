"""Structured output: texts that match a JSON schema or a regular expression."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from keras_openllama.serving.errors import ApiError
from keras_openllama.serving.json_body import shorten

# A model that likes spaces would otherwise write them without an end.
_JSON_OPTIONS = {"whitespace_flexible": False}


def grammar_of(response_format: dict[str, Any]) -> str:
    r"""Converts `response_format` to a grammar of llguidance.

    Args:
        response_format: `{"type": "json_object"}`, `{"type": "json_schema",
            "json_schema": {"schema": …}}`, or `{"type": "regex", "pattern": …}`.

    Returns:
        The grammar. Between the tokens of JSON there is no space, or one.

    Raises:
        ApiError: For another type, or a schema or pattern that is not a valid one.

    Example:
        >>> "start: /yes|no/" in grammar_of({"type": "regex", "pattern": "yes|no"})
        True
    """
    kind = response_format["type"]
    if kind == "regex":
        pattern = response_format.get("pattern")
        if not isinstance(pattern, str) or not pattern:
            raise _invalid('"pattern" must be a regular expression', pattern)
        return _checked(LLMatcher.grammar_from_regex(pattern))
    if kind == "json_object":
        return _json_grammar({"type": "object"})
    if kind == "json_schema":
        described = response_format.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise _invalid('"json_schema" must be {"name": …, "schema": …}', described)
        return _json_grammar(schema)
    raise _invalid(
        'the type must be "text", "json_object", "json_schema" or "regex"', kind
    )


def _json_grammar(schema):
    try:
        grammar = LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides=_JSON_OPTIONS
        )
    except ValueError as error:
        raise _refused(error) from error
    return _checked(grammar)


def _checked(grammar):
    if error := LLMatcher.validate_grammar(grammar):
        raise _refused(error)
    return grammar


def _invalid(requirement, value):
    return ApiError(
        f"`response_format`: {requirement}. Received: {shorten(value)}",
        param="response_format",
    )


def _refused(error):
    reason = " ".join(str(error).split())[:500]
    return ApiError(f"`response_format`: {reason}", param="response_format")


class ConstraintFactory:
    """Makes the constraints of a tokenizer.

    Args:
        token_bytes: Bytes of each token, see `text.token_bytes`.
        end_token_ids: Ids of the tokens that end a text.
        vocabulary_size: Number of logits of the model.
        encode: Returns token ids of a text that continues another one. llguidance asks
            for them where the grammar leaves one text only. By default, the longest
            tokens.

    Raises:
        ValueError: If no token ends a text.

    Example:
        >>> factory = ConstraintFactory([b"", b"a", b"b"], [0], 4)
        >>> constraint = factory.make(grammar_of({"type": "regex", "pattern": "ab?"}))
        >>> constraint.allowed()
        array([False,  True, False, False])
        >>> constraint.accept(1)
        >>> constraint.allowed()
        array([ True, False,  True, False])
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        end_token_ids: Sequence[int],
        vocabulary_size: int,
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        if not end_token_ids:
            raise ValueError(
                "Structured output needs a model with an end token, see "
                "`OpenLlamaCausalLM.end_token_ids`."
            )
        self._vocabulary_size = vocabulary_size
        # The name of a special token is never a part of a text.
        names = [data or b"<%d>" % i for i, data in enumerate(token_bytes)]
        special_ids = {*end_token_ids, *(i for i, b in enumerate(token_bytes) if not b)}
        tokenizer = _WrappedTokenizer(names, special_ids, end_token_ids[0])
        tokenizer.encode = encode
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(tokenizer),
            eos_token=list(end_token_ids),
            slices=LLTokenizer.json_slices(),
        )

    def make(
        self, grammar: str, banned_tokens: Sequence[int] = ()
    ) -> GrammarConstraint:
        """Returns a constraint for one text.

        Args:
            grammar: Result of `grammar_of`.
            banned_tokens: Ids that are never allowed.

        Raises:
            ApiError: If the grammar is too complex.
        """
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return GrammarConstraint(matcher, self._vocabulary_size, banned_tokens)


class _WrappedTokenizer:
    """The interface of tokenizers that llguidance expects."""

    bos_token_id = None
    encode = None

    def __init__(self, tokens, special_ids, end_token_id):
        self.tokens = tokens
        self.special_token_ids = sorted(special_ids)
        self.eos_token_id = end_token_id
        self._ids = {data: i for i, data in enumerate(tokens) if i not in special_ids}
        self._longest = max(map(len, self._ids))

    def __call__(self, data):
        ids = self.encode(data.decode()) if self.encode else []
        # A tokenizer may normalize the text.
        return (
            ids if b"".join(self.tokens[i] for i in ids) == data else self._greedy(data)
        )

    def _greedy(self, data):
        ids = []
        while data:
            sizes = range(min(self._longest, len(data)), 0, -1)
            size = next((n for n in sizes if data[:n] in self._ids), None)
            if size is None:  # No token has this byte.
                return ids
            ids.append(self._ids[data[:size]])
            data = data[size:]
        return ids


class GrammarConstraint:
    """Which tokens may follow, by a grammar; see `ConstraintFactory.make`."""

    def __init__(
        self, matcher: LLMatcher, vocabulary_size: int, banned_tokens: Sequence[int]
    ) -> None:
        self._matcher = matcher
        self._vocabulary_size = vocabulary_size
        self._banned = list(banned_tokens)

    def allowed(self) -> np.ndarray:
        """Returns which tokens may follow, bool `(vocabulary_size,)`.

        Raises:
            ApiError: If none may.
        """
        allowed = np.zeros(self._vocabulary_size, bool)
        bias = np.frombuffer(self._matcher.compute_logit_bias(), "uint8")
        allowed[: len(bias)] = bias != 0
        allowed[self._banned] = False
        if self._matcher.is_error() or not allowed.any():
            raise ApiError(
                "No token continues the text in the form of `response_format`: "
                + (self._matcher.get_error() or "all are in `banned_tokens`."),
                param="response_format",
            )
        return allowed

    def accept(self, token_id: int) -> None:
        """Takes the token that was chosen."""
        self._matcher.consume_token(token_id)
