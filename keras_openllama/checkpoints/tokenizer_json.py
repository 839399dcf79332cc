"""Converts a SentencePiece model to an equivalent `tokenizer.json`, or raises an error.

The `tokenizers` library applies merges by rank, leftmost pair first. SentencePiece
merges the pair whose piece has the highest score, the leftmost of equal scores first.
Therefore merges are ranked by score. Among equal scores (the runs of spaces of some
models) the longest left part comes first, because SentencePiece extends one run from
the left to its end before it starts the next one. `build_tokenizer_json` verifies the
result: it compares both tokenizers on texts that consist of the model's own pieces.
"""

import random

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # Piece types of SentencePiece.
_BPE = 2  # SentencePiece's enum value of the model type.
_SPACE = "▁"  # SentencePiece's symbol for a space.
_ALL = 1 << 30  # More spaces than any text starts with.
_NUM_TEXTS = 2000  # Heuristic: the comparison takes about a second.


def build_tokenizer_json(proto: bytes, add_start_token: bool = True) -> str:
    """Converts a SentencePiece model to a `tokenizer.json`.

    Args:
        proto: The serialized model.
        add_start_token: Whether the start token is prepended to each text.

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
    reason = _unsupported_feature(model)
    if reason:
        raise _conversion_error(reason)
    tokenizer = _tokenizer(model, add_start_token)
    _compare(tokenizer, proto, [piece.piece for piece in model.pieces])
    return tokenizer.to_str(pretty=True)


def _conversion_error(reason):
    return ValueError(
        f"This SentencePiece model cannot be converted to tokenizer.json: {reason}. "
        "Without that file transformers would build its own, with wrong ids. Export "
        "the model without a tokenizer (tokenizer=False, or --no-tokenizer) and use "
        "SentencePiece itself."
    )


def _unsupported_feature(model):
    """Returns why the library cannot represent a model, or `None` if it can."""
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    kinds = {piece.type for piece in model.pieces}
    bytes_found = sum(piece.type == _BYTE for piece in model.pieces)
    unsupported = {
        "it is not a BPE model": trainer.model_type != _BPE,
        f"its normalizer, {normalizer.name!r}, rewrites characters": bool(
            normalizer.precompiled_charsmap
        ),
        "it does not escape spaces": not normalizer.escape_whitespaces,
        "it writes spaces after words": trainer.treat_whitespace_as_suffix,
        "it has user-defined or unused pieces": not kinds
        <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE},
        # SentencePiece decodes an unknown character as " ⁇ ", the library as nothing.
        "it does not fall back to bytes for unknown characters": bytes_found != 256,
    }
    return next((reason for reason, applies in unsupported.items() if applies), None)


def _tokenizer(model, add_start_token):
    from tokenizers import AddedToken, Tokenizer, models, processors

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
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    tokenizer.decoder = _decoder(model.normalizer_spec)
    specials = [p.piece for p in model.pieces if p.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in specials]
    )
    if add_start_token:
        start = model.trainer_spec.bos_piece
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A",
            pair=f"{start} $A {start}:1 $B:1",
            special_tokens=[(start, ids[start])],
        )
    return tokenizer


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


def _normalizer(spec):
    from tokenizers import Regex, normalizers

    steps = []
    if spec.remove_extra_whitespaces:
        # Strips only spaces, no other white space; at the end also their symbol.
        for pattern in (r"\A +", rf"[ {_SPACE}]+\z"):
            steps.append(normalizers.Replace(Regex(pattern), ""))
        steps.append(normalizers.Replace(Regex(" +"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _decoder(spec):
    from tokenizers import decoders

    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", _ALL, 0))
    elif spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _compare(tokenizer, proto, pieces):
    """Raises a `ValueError` if a text has other ids than with SentencePiece."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    texts = list(_texts(pieces))
    # SentencePiece treats strings such as "<s>" as ordinary text.
    tokenizer.encode_special_tokens = True
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    tokenizer.encode_special_tokens = False
    expected = processor.encode(texts)
    decoded = tokenizer.decode_batch(expected)
    for text, found, ids, back in zip(texts, encoded, expected, decoded, strict=True):
        if found.ids != ids:
            raise _conversion_error(
                f"{text!r} would be encoded as {found.ids} instead of {ids}"
            )
        if back != processor.decode(ids):
            raise _conversion_error(
                f"{ids} would be decoded as {back!r} instead of "
                f"{processor.decode(ids)!r}"
            )


def _texts(pieces):
    """Yields texts that exercise the order of merges."""
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
    for length in range(1, 101):
        yield " " * length + "x" + " " * (101 - length)
    for _ in range(_NUM_TEXTS):
        length = rng.randint(1, 30)
        yield "".join(rng.choices(pieces, k=length))
        yield "".join(rng.choices(letters, k=length))
        if repeated:
            yield "".join(rng.choices(repeated, k=length % 7 + 1))
