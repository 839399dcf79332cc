"""`tokenizer.json` for a SentencePiece model, equal to SentencePiece or refused.

The `tokenizers` library applies merges by rank, the leftmost pair first; SentencePiece
joins the pair whose piece has the highest score, the leftmost first among equals. So
merges are ranked by score. Among equal scores (the runs of spaces of some models) the
longest left part comes first, since SentencePiece, going from the left, grows one run
to the end before it begins the next. That this is right for the model at hand is not
taken for granted: `build` compares the two on texts made of the model's own pieces.
"""

import random

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # Types of pieces in SentencePiece.
_BPE = 2  # SentencePiece's number of the model type.
_SPACE = "▁"  # What SentencePiece writes for a space.
_ALL = 1 << 30  # More spaces than any text begins with.
_TEXTS = 2000  # Ours: the comparison takes about a second.


def build(proto, starts=True):
    """Makes a `tokenizer.json` for a SentencePiece model.

    Args:
        proto: bytes of the model.
        starts: bool, whether the start token stands before each text.

    Returns:
        String, the JSON text.

    Raises:
        ValueError: if the library cannot do what SentencePiece does with this model.
            The message says what.

    Example:

    ```python
    Path("tokenizer.json").write_text(fast_tokenizer.build(tokenizer.proto))
    ```
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    complaint = _complaint(model)
    if complaint:
        raise _refusal(complaint)
    tokenizer = _tokenizer(model, starts)
    _compare(tokenizer, proto, [piece.piece for piece in model.pieces])
    return tokenizer.to_str(pretty=True)


def _refusal(complaint):
    return ValueError(
        f"No tokenizer.json can be written that equals this SentencePiece model: "
        f"{complaint}. Without one transformers would make its own, with wrong ids. "
        "Leave the tokenizer out (tokenizer=False, or --no-tokenizer) and use "
        "SentencePiece itself."
    )


def _complaint(model):
    """What of a model the library cannot express, or `None`."""
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    kinds = {piece.type for piece in model.pieces}
    bytes_found = sum(piece.type == _BYTE for piece in model.pieces)
    unfit = {
        "it is no BPE model": trainer.model_type != _BPE,
        f"its normaliser, {normalizer.name!r}, rewrites characters": bool(
            normalizer.precompiled_charsmap
        ),
        "it does not escape spaces": not normalizer.escape_whitespaces,
        "it writes spaces behind words": trainer.treat_whitespace_as_suffix,
        "it has user-defined or unused pieces": not kinds
        <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE},
        # There an unknown character comes back as " ⁇ ", in the library as nothing.
        "it does not fall back to bytes for unknown characters": bytes_found != 256,
    }
    return next((complaint for complaint, holds in unfit.items() if holds), None)


def _tokenizer(model, starts):
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
    if starts:
        start = model.trainer_spec.bos_piece
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A",
            pair=f"{start} $A {start}:1 $B:1",
            special_tokens=[(start, ids[start])],
        )
    return tokenizer


def _merges(model, ids):
    """Pairs of pieces, in the order in which SentencePiece prefers their joins."""
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
        # Of all white space the space alone, and at the end also what it is written as.
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
    """Raises a `ValueError` if the tokenizer differs from SentencePiece on a text."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    texts = list(_texts(pieces))
    # Control strings are ordinary text for SentencePiece.
    tokenizer.encode_special_tokens = True
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    tokenizer.encode_special_tokens = False
    expected = processor.encode(texts)
    decoded = tokenizer.decode_batch(expected)
    for text, ours, ids, back in zip(texts, encoded, expected, decoded, strict=True):
        if ours.ids != ids:
            raise _refusal(f"{text!r} would become {ours.ids}, and is {ids}")
        if back != processor.decode(ids):
            raise _refusal(
                f"{ids} would become {back!r}, and is {processor.decode(ids)!r}"
            )


def _texts(pieces):
    """Texts that put the order of merges to the test."""
    chance = random.Random(0)  # The same texts each time.
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
    for _ in range(_TEXTS):
        length = chance.randint(1, 30)
        yield "".join(chance.choices(pieces, k=length))
        yield "".join(chance.choices(letters, k=length))
        if repeated:
            yield "".join(chance.choices(repeated, k=length % 7 + 1))
