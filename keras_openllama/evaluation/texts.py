"""Texts to measure: files, directories of them, and prepared data sets."""

import json
from pathlib import Path

TEXT_KEY = "text"


def read(paths, lm):
    """Reads texts to measure.

    Args:
        paths: list of paths. A `.txt` file is a source of one document; a directory of
            them, a source a file; a `.jsonl` file a source whose lines are documents,
            each with its text under the key `"text"`; the directory of a prepared data
            set, a source for each of its own, with the documents that were set aside.
        lm: `OpenLlamaCausalLM` whose tokenizer a prepared data set must have.

    Returns:
        Dict by name of lists of documents, see `perplexity.evaluate`.

    Raises:
        OSError: if a path cannot be read.
        ValueError: for what is no UTF-8, empty, of another kind, or prepared with
            another tokenizer, or if two sources have one name; the file is named.

    Example:
        perplexity.evaluate(lm, texts.read(["heldout/"], lm))
    """
    sources = {}
    for path in map(Path, paths):
        for name, documents in _read(path, lm).items():
            if name in sources:
                raise ValueError(
                    f"{path} is the second source called {name!r}. Rename one of them."
                )
            sources[name] = documents
    return sources


def _read(path, lm):
    if path.is_dir():
        texts = sorted(path.glob("*.txt"))
        if texts:
            return {text.stem: [_text(text)] for text in texts}
        if (path / "manifest.json").exists():
            return _prepared(path, lm)
        raise ValueError(
            f"{path} has no .txt files, and is no prepared data set. Name a directory "
            "that is, or files."
        )
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return {path.stem: [_text(path)]}
    if suffix == ".jsonl":
        return {path.stem: _lines(path)}
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Is the path right?")
    raise ValueError(
        f"{path} ends in {suffix!r}, and .txt and .jsonl are read. Rename it if it is "
        "text."
    )


def _text(path):
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}). Convert it with iconv first."
        ) from None
    if not text.strip():
        raise ValueError(f"{path} is empty. Leave it out, or fetch it again.")
    return text


def _lines(path):
    lines = _text(path).split("\n")
    documents = [
        _document(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not any(documents):
        raise ValueError(f"{path} has no text in any line. Leave it out.")
    return documents


def _document(line, place):
    try:
        text = json.loads(line)[TEXT_KEY]
        text.encode()
    except (ValueError, TypeError, LookupError, AttributeError):
        raise ValueError(
            f'{place} is no {{"{TEXT_KEY}": "…"}}: {line[:60]!r}. Mend or remove it.'
        ) from None
    return text


def _prepared(path, lm):
    try:
        from keras_openllama.data.prepared_data import PreparedData
    except ImportError as error:
        raise ImportError(
            "Reading a prepared data set needs the extra `train`: pip install "
            "'keras-openllama[train]' brings it."
        ) from error
    data = PreparedData.open(str(path))
    data.check_tokenizer(lm.preprocessor.tokenizer.fingerprint)
    sources = {}
    for name in data.sources:
        documents = data.documents(name, "validation")
        if len(documents):
            # Each is between <s> and </s>, which are no text.
            sources[name] = [
                (tokens[1:-1], size)
                for tokens, size in documents.read_many(range(len(documents)))
            ]
    if not sources:
        raise ValueError(
            f"{path} has no documents set aside. Prepare it with a larger "
            "--validation-fraction."
        )
    return sources
