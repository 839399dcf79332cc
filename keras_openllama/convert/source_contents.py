"""A source of models as the contents that every format is written from."""

from keras_openllama.checkpoints.contents import Contents
from keras_openllama.checkpoints.matching import listed
from keras_openllama.config import validate_architecture
from keras_openllama.text.sentencepiece_model import check_vocabulary, load_processor


def contents_of(source, tokenizer=True, origin=None, paths=()):
    """What the model of a source consists of. No tensor is read yet.

    Args:
        source: `loading.sources.ModelSource`.
        tokenizer: bool, whether its tokenizer is wanted.
        origin: string, see `load.origin`.
        paths: list of further paths that are read.

    Returns:
        `Contents`.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: if a file is damaged, or its tensors are not those of the network.
    """
    arguments = validate_architecture(source.arguments())
    proto = _proto(source, arguments) if tokenizer else None
    tensors = source.read_tensors(arguments)
    return Contents(
        arguments,
        tensors,
        tokenizer=proto,
        origin=source.origin or origin,
        control_ids=source.control_ids(),
        preprocessing=source.preprocessing(),
        paths=(*paths, *sorted({tensor.file.path for tensor in tensors.values()})),
    )


def _proto(source, arguments):
    try:
        path = source.tokenizer_file()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} To convert the weights alone, leave the tokenizer out "
            "(tokenizer=False, or --no-tokenizer)."
        ) from error
    proto = path.read_bytes()
    pieces = load_processor(proto, str(path)).vocab_size()
    check_vocabulary(pieces, arguments["vocabulary_size"])
    added = source.added_tokens(pieces)
    if added:
        raise ValueError(
            f"Beside {path}, which has {pieces} pieces, the model has tokens that were "
            f"added to it: {listed(added)}. SentencePiece has no place for them. To "
            "convert the weights alone, leave the tokenizer out (tokenizer=False, or "
            "--no-tokenizer)."
        )
    return proto
