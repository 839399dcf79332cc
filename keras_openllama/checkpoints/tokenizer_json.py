"""Converts a SentencePiece model to an equivalent `tokenizer.json`, and back.

The `tokenizers` library applies merges by rank, leftmost pair first. SentencePiece
merges the pair whose piece has the highest score, the leftmost of equal scores first.
Therefore merges are ranked by score. Among equal scores (the runs of spaces of some
models) the longest left part comes first, because SentencePiece extends one run from
the left to its end before it starts the next one. Both directions verify the result:
they compare both tokenizers on texts that consist of the model's own pieces and the
added tokens, and raise an error if these differ.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keras_openllama.text.added_tokens import (
    AddedToken,
    undefined_ids,
    undefined_token,
)
from keras_openllama.text.vocabulary import PREPEND_SCHEMES, Vocabulary

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # Piece types of SentencePiece.
_BPE = 2  # SentencePiece's enum value of the model type.
_SPACE = "▁"  # SentencePiece's symbol for a space.
_ALL = 1 << 30  # More spaces than any text starts with.
_NUM_TEXTS = 2000  # Heuristic: the comparison takes about a second.


def build_tokenizer_json(
    proto: bytes,
    add_start_token: bool = True,
    add_end_token: bool = False,
    added_tokens: Sequence[AddedToken] = (),
    prepend_scheme: str = "always",
) -> str:
    """Converts a SentencePiece model with added tokens to a `tokenizer.json`.

    With the prepend scheme "first", the library omits the space before a text that
    begins with a space itself.

    Args:
        proto: The serialized model.
        add_start_token: Whether the start token is prepended to each text.
        add_end_token: Whether the end token is appended to each text.
        added_tokens: Tokens beside the pieces of the model, by ascending id.
        prepend_scheme: See `OpenLlamaTokenizer`.

    Returns:
        The contents of the file.

    Raises:
        ValueError: If the `tokenizers` library cannot reproduce this model. The message
            gives the reason.

    Example:
        >>> import tokenizers
        >>> proto = lm.preprocessor.tokenizer.proto
        >>> tokenizer = tokenizers.Tokenizer.from_str(build_tokenizer_json(proto))
        >>> tokenizer.encode("The sea").ids == lm.preprocessor.tokenizer(
        ...     "The sea", add_bos=True
        ... )
        True
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    reason = unsupported_feature(model)
    if reason is None and _has_other_pieces(model):
        reason = "it has user-defined or unused pieces"
    if reason:
        raise _conversion_error(reason)
    tokenizer = _tokenizer(model, prepend_scheme)
    _add_tokens(tokenizer, len(model.pieces), added_tokens)
    tokenizer.post_processor = _template(model, add_start_token, add_end_token)
    vocabulary = Vocabulary(proto, "the model", added_tokens, prepend_scheme)
    texts = _texts([piece.piece for piece in model.pieces], added_tokens)
    if prepend_scheme == "first":
        texts = (text for text in texts if not text.startswith(" "))
    try:
        _compare(tokenizer, vocabulary, list(texts))
    except _DifferenceError as error:
        raise _conversion_error(str(error)) from error
    return tokenizer.to_str(pretty=True)


def build_sentencepiece_model(tokenizer_json: str) -> bytes:
    """Converts a `tokenizer.json` of a LLaMA tokenizer to a SentencePiece model.

    Later versions of transformers save this file only. The model's scores are the ranks
    of the merges. It encodes and decodes like the original SentencePiece model, unless
    the file was converted from one that merges runs of spaces: transformers drops this
    property.

    Args:
        tokenizer_json: Contents of the file.

    Returns:
        The serialized model, without the added tokens.

    Raises:
        ValueError: If SentencePiece cannot reproduce this tokenizer. The message gives
            the reason.

    Example:
        >>> from keras_openllama import OpenLlamaTokenizer
        >>> proto = lm.preprocessor.tokenizer.proto
        >>> again = build_sentencepiece_model(build_tokenizer_json(proto))
        >>> OpenLlamaTokenizer(again)("The sea") == OpenLlamaTokenizer(proto)("The sea")
        True
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
        data = json.loads(tokenizer.to_str())
        model = _sentencepiece_model(data, tokenizer)
        proto = model.SerializeToString()
        texts = _texts([piece.piece for piece in model.pieces], ())
        # The library's Metaspace omits the space before a text that begins with one.
        texts = [text for text in texts if not text.startswith(" ")]
        _compare(tokenizer, Vocabulary(proto, "it"), texts, (False,))
    except Exception as error:  # The library raises no narrower class.
        raise ValueError(
            "tokenizer.json is not of a LLaMA tokenizer that SentencePiece can "
            f"reproduce: {error!r}"
        ) from error
    return proto


def _sentencepiece_model(data, tokenizer):
    from sentencepiece import sentencepiece_model_pb2

    vocabulary = data["model"]["vocab"]
    unknown = data["model"]["unk_token"] or "<unk>"  # transformers omits it.
    controls = {t["content"] for t in data["added_tokens"] if t["special"]}
    ranks = {}
    for left, right in data["model"]["merges"]:
        ranks.setdefault(left + right, len(ranks))
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError("its ids have gaps")
    model = sentencepiece_model_pb2.ModelProto()
    for piece, i in sorted(vocabulary.items(), key=lambda item: item[1]):
        kind, score = _NORMAL, -float(ranks.get(piece, len(ranks) + i))
        if piece == unknown or piece in controls:
            kind, score = _UNKNOWN if piece == unknown else _CONTROL, 0.0
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            kind, score = _BYTE, 0.0
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback = _BPE, True
    trainer.vocab_size = len(vocabulary)
    trainer.unk_id, trainer.unk_piece = vocabulary[unknown], unknown
    trainer.bos_id, trainer.eos_id = vocabulary["<s>"], vocabulary["</s>"]
    trainer.pad_id = -1

    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(prepend_scheme_of(data))
    one, two = tokenizer.encode_batch(["a a", "a  a"])
    model.normalizer_spec.remove_extra_whitespaces = one.ids == two.ids
    return model


def prepend_scheme_of(data: dict[str, Any]) -> str | None:
    """Returns where a tokenizer adds a space before a text.

    Args:
        data: Contents of `tokenizer.json`.

    Returns:
        The prepend scheme, see `OpenLlamaTokenizer`. `None` if it adds no space.

    Example:
        >>> proto = lm.preprocessor.tokenizer.proto
        >>> prepend_scheme_of(json.loads(build_tokenizer_json(proto)))
        'always'
    """
    if any(s.get("type") == "Prepend" for s in _steps(data, "normalizer")):
        return "always"
    for step in _steps(data, "pre_tokenizer"):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always")
            return scheme if scheme in PREPEND_SCHEMES else None
    return None


def template_of(data: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Returns where a tokenizer puts special tokens around a text.

    Args:
        data: Contents of `tokenizer.json`.

    Returns:
        The parts, each with the key `"Sequence"` (the text) or `"SpecialToken"`. `None`
        if the file does not define them.

    Example:
        >>> proto = lm.preprocessor.tokenizer.proto
        >>> template = template_of(json.loads(build_tokenizer_json(proto)))
        >>> [next(iter(part)) for part in template]
        ['SpecialToken', 'Sequence']
    """
    for step in _steps(data, "post_processor"):
        if step.get("type") == "TemplateProcessing":
            return step.get("single") or None
    return None


def _steps(data, name):
    """Returns the steps of a part of the file, which may be a sequence."""
    part = data.get(name)
    if not isinstance(part, dict):
        return []
    names = "normalizers", "pretokenizers", "processors"
    steps = next((part[name] for name in names if part.get(name)), [part])
    return [step for step in steps if isinstance(step, dict)]


def _conversion_error(reason):
    return ValueError(
        f"This SentencePiece model cannot be converted to tokenizer.json: {reason}. "
        "Without that file transformers would build its own, with wrong ids. Export "
        "the model without a tokenizer (tokenizer=False, or --no-tokenizer) and use "
        "SentencePiece itself."
    )


def unsupported_feature(model: ModelProto) -> str | None:
    """Returns why only SentencePiece itself can apply a model, or `None`.

    Args:
        model: A parsed SentencePiece model.

    Returns:
        A clause such as `"it is not a BPE model"`.
    """
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    bytes_found = sum(piece.type == _BYTE for piece in model.pieces)
    unsupported = {
        "it is not a BPE model": trainer.model_type != _BPE,
        f"its normalizer, {normalizer.name!r}, rewrites characters": bool(
            normalizer.precompiled_charsmap
        ),
        "it does not escape spaces": not normalizer.escape_whitespaces,
        "it writes spaces after words": trainer.treat_whitespace_as_suffix,
        # SentencePiece decodes an unknown character as " ⁇ ", other libraries as
        # nothing.
        "it does not fall back to bytes for unknown characters": bytes_found != 256,
    }
    return next((reason for reason, applies in unsupported.items() if applies), None)


def _has_other_pieces(model):
    kinds = {piece.type for piece in model.pieces}
    return not kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}


def _tokenizer(model, prepend_scheme):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    unknown = next(p.piece for p in model.pieces if p.type == _UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(model, ids),
            unk_token=unknown,
            byte_fallback=True,
        )
    )
    spec = model.normalizer_spec
    if prepend_scheme == "first" and spec.add_dummy_prefix:
        tokenizer.normalizer = _normalizer(spec, writes_spaces=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            _SPACE, prepend_scheme="first", split=False
        )
    else:
        tokenizer.normalizer = _normalizer(spec)
    tokenizer.decoder = _decoder(spec)
    specials = [p.piece for p in model.pieces if p.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in specials]
    )
    return tokenizer


def _add_tokens(tokenizer, pieces, added_tokens):
    from tokenizers import AddedToken

    # The library numbers new tokens consecutively, so an id without a token gets one.
    # The reader of checkpoints ignores these.
    tokens = [
        (i, AddedToken(undefined_token(i), special=True, normalized=False))
        for i in undefined_ids(added_tokens, pieces)
    ]
    for token in added_tokens:
        flags = token.to_json()
        del flags["id"]
        tokens.append((token.id, AddedToken(**{"normalized": False, **flags})))
    for expected, token in sorted(tokens, key=lambda item: item[0]):
        tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if found != expected:
            raise _conversion_error(
                f"the added token {token.content!r} would have the id {found} instead "
                f"of {expected}"
            )


def _template(model, add_start_token, add_end_token):
    from tokenizers import processors

    spec = model.trainer_spec
    start = [spec.bos_piece] * add_start_token
    end = [spec.eos_piece] * add_end_token
    if not start + end:
        return None
    second = [f"{token}:1" for token in start], [f"{token}:1" for token in end]
    return processors.TemplateProcessing(
        single=[*start, "$A", *end],
        pair=[*start, "$A", *end, *second[0], "$B:1", *second[1]],
        special_tokens=[(token, _id_of(model, token)) for token in start + end],
    )


def _id_of(model, token):
    return next(i for i, piece in enumerate(model.pieces) if piece.piece == token)


def _merges(model, ids):
    """Returns pairs of pieces in the order in which SentencePiece merges them."""
    normal = {p.piece: p.score for p in model.pieces if p.type == _NORMAL}
    merges = [
        (-score, -cut, ids[piece], (piece[:cut], piece[cut:]))
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [pair for *_, pair in sorted(merges)]


def _normalizer(spec, writes_spaces=True):
    from tokenizers import Regex, normalizers

    steps = []
    if spec.remove_extra_whitespaces:
        # Strips only spaces, no other white space; at the end also their symbol.
        for pattern in (r"\A +", rf"[ {_SPACE}]+\z"):
            steps.append(normalizers.Replace(Regex(pattern), ""))
        steps.append(normalizers.Replace(Regex(" +"), " "))
    if writes_spaces:
        steps += [normalizers.Prepend(_SPACE)] * spec.add_dummy_prefix
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps) if steps else None


def _decoder(spec):
    from tokenizers import decoders

    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", _ALL, 0))
    elif spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


class _DifferenceError(ValueError):
    """A text has other ids than with SentencePiece, or ids another text."""


def _compare(tokenizer, vocabulary, texts, parse_special_values=(True, False)):
    """Raises a `_DifferenceError` if both tokenizers differ on a text."""
    for parse_special in parse_special_values:
        tokenizer.encode_special_tokens = not parse_special
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        expected = vocabulary.encode(texts, parse_special)
        for text, found, ids in zip(texts, encoded, expected, strict=True):
            if found.ids != ids:
                raise _DifferenceError(
                    f"{text!r} would be encoded as {found.ids} instead of {ids}"
                )
    tokenizer.encode_special_tokens = False
    pairs = tokenizer.decode_batch(expected), vocabulary.decode(expected)
    for ids, found, text in zip(expected, *pairs, strict=True):
        if found != text:
            raise _DifferenceError(
                f"{ids} would be decoded as {found!r} instead of {text!r}"
            )


def _texts(pieces, added_tokens):
    """Yields texts that exercise the order of merges, and the added tokens."""
    rng = random.Random(0)  # The same texts each time.
    pieces = [piece.replace(_SPACE, " ") for piece in pieces]
    repeated = [p for p in pieces if len(p) > 1 and len(set(p)) == 1]
    letters = sorted({character for piece in pieces for character in piece})
    yield from (
        "",
        " ",
        "\n",
        "\t",
        "a\n\nb",
        "  a",
        "a  ",
        "é\u0301 日本 🙂\u200d",
        "\0",
    )
    for token in added_tokens:
        content = token.content
        yield from (
            content,
            f"a{content}b",
            f" {content} b ",
            f"a {content}  {content}",
        )
        yield f"{content}{content}b{content}"
    for length in range(1, 101):
        yield " " * length + "x" + " " * (101 - length)
    for _ in range(_NUM_TEXTS):
        length = rng.randint(1, 30)
        yield "".join(rng.choices(pieces, k=length))
        yield "".join(rng.choices(letters, k=length))
        if repeated:
            yield "".join(rng.choices(repeated, k=length % 7 + 1))
