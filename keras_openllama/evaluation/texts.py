"""Texts to evaluate: files, directories of files, and prepared datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from keras_openllama.evaluation.perplexity_protocols import (
    Document,
    TokenizedDocument,
)
from keras_openllama.utils.text_files import decode_text
from keras_openllama.utils.types import PathLike

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

TEXT_KEY = "text"


def read_texts(
    paths: Iterable[PathLike], lm: OpenLlamaCausalLM
) -> dict[str, list[Document]]:
    """Reads texts to evaluate.

    Args:
        paths: a `.txt` file is a source of one document; a directory of `.txt` files
            has a source per file. Each line of a `.jsonl` file is a document
            `{"text": "…"}`. The directory of a prepared dataset has a source for each
            of its sources, with the documents of the validation split.
        lm: the model. A prepared dataset must have been made with its tokenizer.

    Returns:
        Documents by the name of their source, see `perplexity.evaluate_perplexity`.

    Raises:
        OSError: if a path cannot be read.
        ValueError: if a file is not UTF-8, is empty, has an unknown suffix or was
            prepared with another tokenizer, or if two sources have the same name.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("greeting.txt").write_text("Good morning.")
        >>> read_texts(["greeting.txt"], lm)
        {'greeting': ['Good morning.']}
    """
    return _read_paths(paths, lambda path: _read_prepared_data(path, lm))


def check_texts(paths: Iterable[PathLike]) -> None:
    """Checks paths for `read_texts`, without a model.

    Of a prepared dataset, only `manifest.json` must be there.

    Args:
        paths: See `read_texts`.

    Raises:
        OSError: If a path cannot be read.
        ValueError: If a file is not UTF-8, is empty or has an unknown suffix, or if two
            sources have the same name.

    Example:
        >>> _ = Path("empty.txt").write_text("")
        >>> check_texts(["empty.txt"])
        Traceback (most recent call last):
        ...
        ValueError: empty.txt is empty. Remove it, or download it again.
    """
    _read_paths(paths, lambda path: {})


def _read_paths(paths, read_prepared_data):
    sources = {}
    for path in map(Path, paths):
        for name, documents in _read_path(path, read_prepared_data).items():
            if name in sources:
                raise ValueError(
                    f"{path} is the second source named {name!r}. Rename one of them."
                )
            sources[name] = documents
    return sources


def _read_path(path, read_prepared_data):
    if path.is_dir():
        texts = sorted(path.glob("*.txt"))
        if texts:
            return {text.stem: [_read_text(text)] for text in texts}
        if (path / "manifest.json").exists():
            return read_prepared_data(path)
        raise ValueError(
            f"{path} has no .txt files and is not a prepared dataset. Pass another "
            "directory, or files."
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Check the path.")
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return {path.stem: [_read_text(path)]}
    if suffix == ".jsonl":
        return {path.stem: _read_lines(path)}
    raise ValueError(
        f"{path} must end in .txt or .jsonl. Received: {suffix!r}. Rename it if it is "
        "text."
    )


def _read_text(path):
    text = decode_text(path.read_bytes(), path)
    if not text.strip():
        raise ValueError(f"{path} is empty. Remove it, or download it again.")
    return text


def _read_lines(path):
    lines = _read_text(path).split("\n")
    documents = [
        _parse_document(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not any(documents):
        raise ValueError(f"{path} has no text in any line. Remove it.")
    return documents


def _parse_document(line, place):
    try:
        text = json.loads(line)[TEXT_KEY]
        text.encode()
    except (ValueError, TypeError, LookupError, AttributeError):
        raise ValueError(
            f'{place} must be {{"{TEXT_KEY}": "…"}}. Received: {line[:60]!r}. Correct '
            "or remove it."
        ) from None
    return text


def _read_prepared_data(path, lm):
    try:
        from keras_openllama.data.prepared_data import PreparedData
    except ImportError as error:
        raise ImportError(
            "Prepared datasets require the extra `train`: pip install "
            "'keras-openllama[train]'."
        ) from error
    data = PreparedData.open(str(path))
    data.check_tokenizer(lm.preprocessor.tokenizer.fingerprint)
    sources = {}
    for name in data.sources:
        documents = data.documents(name, "validation")
        if len(documents):
            # Without `<s>` and `</s>`, which are not text.
            sources[name] = [
                TokenizedDocument(tokens[1:-1], size)
                for tokens, size in documents.read_many(range(len(documents)))
            ]
    if not sources:
        raise ValueError(
            f"{path} has no validation documents. Prepare it with a larger "
            "--validation-fraction."
        )
    return sources
