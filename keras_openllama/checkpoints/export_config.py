"""The options of an export, validated. Imports no Keras, so that errors are fast."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from keras_openllama.checkpoints.formats import (
    DTYPES,
    EASYLM_CONTENTS,
    FORMATS,
    GGUF_QUANTIZATIONS,
    KERAS_QUANTIZATIONS,
    MAX_SHARD_SIZE,
)
from keras_openllama.checkpoints.model_files import foreign_content
from keras_openllama.utils.staging import check_target
from keras_openllama.utils.types import PathLike

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_QUANTIZATIONS = {"gguf": GGUF_QUANTIZATIONS, "keras": KERAS_QUANTIZATIONS}
_K_QUANTS = (
    " K-quants such as q4_k_m are read, but not written: write f16, and quantize the "
    "file with `llama-quantize` of llama.cpp."
)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The options of an export.

    The constructor validates them, except for the target: see `check_target`.

    Attributes:
        target: Path of the directory to write; for EasyLM and GGUF, of the file.
        to: The format, one of `formats.FORMATS`.
        dtype: The dtype of the weights, one of `formats.DTYPES`. `None` is the dtype of
            the model's tensors. GGUF has types instead, see `quantization`.
        quantization: For GGUF, the type of the weights, one of
            `formats.GGUF_QUANTIZATIONS`; `None` is `"f16"`. For Keras, one of
            `formats.KERAS_QUANTIZATIONS`; `None` leaves weights as they are.
        max_shard_size: Largest size of a file of weights in the transformers format,
            in bytes or as a string such as `"5GB"`. `None` is 5 GB.
        content: The kind of EasyLM checkpoint, one of `formats.EASYLM_CONTENTS`. `None`
            is `"params"`.
        tokenizer: Whether to write the tokenizer, if the format includes one.
        force: Whether to replace an existing target.

    Raises:
        ValueError: If the format, dtype, size or content is unknown, or an option does
            not apply to the format.

    Example:
        >>> ExportConfig("out", "transformers", max_shard_size="500MB").max_shard_bytes
        500000000
    """

    target: Path
    to: str
    dtype: str | None = None
    quantization: str | None = None
    max_shard_size: str | int | None = None
    content: str | None = None
    tokenizer: bool = True
    force: bool = False

    def __post_init__(self):
        quantizations = _QUANTIZATIONS.get(self.to, (self.quantization,))
        for name, value, known in (
            ("to", self.to, FORMATS),
            ("dtype", self.dtype, (*DTYPES, None)),
            ("quantization", self.quantization, (*quantizations, None)),
            ("content", self.content, (*EASYLM_CONTENTS, None)),
        ):
            if value not in known:
                names = ", ".join(k for k in known if k)
                raise ValueError(
                    f"`{name}` must be one of {names}. Received: {name}={value!r}."
                    + (_K_QUANTS if known[:-1] == GGUF_QUANTIZATIONS else "")
                )
        for name, value, to in (
            ("max_shard_size", self.max_shard_size, "transformers"),
            ("content", self.content, "easylm"),
        ):
            if value is not None and self.to != to:
                raise ValueError(
                    f"`{name}` applies to the format {to} only. Received: "
                    f"{name}={value!r}, to={self.to!r}"
                )
        if self.quantization is not None and self.to not in _QUANTIZATIONS:
            raise ValueError(
                "`quantization` applies to the formats gguf and keras. Received: "
                f"quantization={self.quantization!r}, to={self.to!r}"
            )
        if self.to == "gguf" and self.dtype is not None:
            raise ValueError(
                "The type of weights in GGUF is `quantization`, such as 'f16', and not "
                f"`dtype`. Received: dtype={self.dtype!r}, to='gguf'"
            )
        _ = self.max_shard_bytes  # Raises an error if the size is invalid.
        object.__setattr__(self, "target", Path(self.target))

    def check_target(self) -> None:
        """Raises an `OSError` if the target exists or cannot be written."""
        check_target(self.target, self.single_file, self.force, foreign_content)

    @property
    def single_file(self) -> bool:
        """Whether the target is a file rather than a directory."""
        return self.to in ("easylm", "gguf")

    @property
    def max_shard_bytes(self) -> int:
        """Largest size of a file of weights in bytes."""
        size = self.max_shard_size
        return parse_size(MAX_SHARD_SIZE if size is None else size)


def parse_size(size: str | int) -> int:
    """Parses a size in bytes.

    Args:
        size: A number of bytes, or a string such as `"5GB"`, `"500MB"` or `"2GiB"`.

    Returns:
        The number of bytes.

    Raises:
        ValueError: If the size is malformed or not positive.

    Example:
        >>> parse_size("1.5GB")
        1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if unit is None or float(match[1]) * unit < 1:
        raise ValueError(
            "`max_shard_size` must be a positive number of bytes, or a string with a "
            f"unit such as '5GB' or '500MB'. Received: max_shard_size={size!r}"
        )
    return int(float(match[1]) * unit)


def missing_preset_error(source: PathLike) -> ValueError:
    """Returns the error for a file of EasyLM that is converted without a `preset`."""
    return ValueError(
        f"{source} is an EasyLM file, which contains neither the architecture nor "
        "the tokenizer: pass the model as `preset` (--preset), such as "
        "open_llama_3b_v2 or a directory with a config.json."
    )
