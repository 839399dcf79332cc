"""SentencePiece models for the tests, laid out as LLaMA's.

Two are trained here in a fraction of a second, from text that every machine has; one
of 32000 pieces is part of the package mistral-common.
"""

import functools
import importlib.resources
import io
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece

from keras_openllama.presets import folder


def train_tokenizer(path, keep_spaces, vocab_size=512):
    """Trains a small model on the Python language reference and writes it.

    As LLaMA's: BPE with byte fallback, unk 0, bos 1, eos 2, bytes 3 to 258, and a
    normaliser that is the identity but for spaces.

    Args:
        path: where the model goes; parent directories are created.
        keep_spaces: bool, keep runs of spaces as v2 models do, or merge them as v1.
        vocab_size: int, number of pieces, at least 400.

    Returns:
        `path`, as a `pathlib.Path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(trained_model(keep_spaces, vocab_size))
    return path


@functools.cache
def trained_model(keep_spaces, vocab_size=512):
    """Returns the bytes of the model that `train_tokenizer` writes."""
    lines = "\n".join(topics.values()).splitlines()[:2000]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.999,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=not keep_spaces,
        allow_whitespace_only_pieces=keep_spaces,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@functools.cache
def large_model():
    """Returns the bytes of a real model of 32000 pieces that preserves spaces."""
    data = importlib.resources.files("mistral_common") / "data"
    return (data / "tokenizer.model.v1").read_bytes()


# Models like those of OpenLLaMA, and one in which runs of spaces have equal scores.
MODELS = {
    "v1": lambda: trained_model(keep_spaces=False),
    "v2": lambda: trained_model(keep_spaces=True),
    "nano": lambda: (folder() / "open_llama_nano" / "tokenizer.model").read_bytes(),
    "tied_scores": large_model,
}
