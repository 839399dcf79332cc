"""Matches the tensors of a checkpoint with the weights of a model, one to one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_openllama.checkpoints.tensors import StoredTensor

FLOATS = ("float32", "bfloat16", "float16", "float64")
_MAX_LISTED = 20


def match_tensors(
    tensors: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[str, tuple[int, ...]]],
    where: Any,
    config: str = "config.json (or the preset, and any argument that overrides it)",
) -> dict[str, StoredTensor]:
    """Matches the tensors of a checkpoint with the weights of a model.

    Args:
        tensors: The tensors by their names in the checkpoint.
        expected: For each variable path, the name and the shape that the tensor has in
            the checkpoint.
        where: Names the checkpoint in the error message.
        config: Names what the expected shapes follow from, for the error message.

    Returns:
        The tensors by variable path, in the order of `expected`.

    Raises:
        ValueError: If tensors are missing or unexpected, or have the wrong shape or a
            dtype that is not floating point. The message lists them.
    """
    unmatched = dict(tensors)
    matched, missing, wrong_shape, wrong_dtype = {}, [], [], []
    for path, (name, shape) in expected.items():
        stored = unmatched.pop(name, None)
        if stored is None:
            missing.append(name)
        elif tuple(stored.shape) != shape:
            wrong_shape.append(f"{name} has {stored.shape}, expected {shape}")
        elif stored.dtype not in FLOATS:
            wrong_dtype.append(f"{name} has {stored.dtype}")
        else:
            matched[path] = stored
    problems = {
        "missing": missing,
        "unexpected": unmatched,
        "wrong shape": wrong_shape,
        "not floating point": wrong_dtype,
    }
    found = [
        f"{problem}: {format_names(names)}"
        for problem, names in problems.items()
        if names
    ]
    if found:
        may_be_truncated = missing and matched and len(found) == 1
        remedy = ", and that the file is complete" if may_be_truncated else ""
        raise ValueError(
            f"The weights in {where} do not match this model. {'; '.join(found)}. "
            f"Check that {config} belongs to the weights{remedy}."
        )
    return matched


def check_whole(tensors: Mapping[str, StoredTensor], where: Any) -> None:
    """Checks that a file has whole tensors, and not what a process had of them.

    Args:
        tensors: The tensors by name.
        where: Names the file in the error message.

    Raises:
        ValueError: If tensors are empty (DeepSpeed ZeRO-3) or flattened (FSDP).
    """
    empty = [name for name, stored in tensors.items() if 0 in stored.shape]
    if empty:
        raise ValueError(
            f"{where} has empty tensors: {format_names(empty)}. DeepSpeed ZeRO-3 "
            "divides the weights among its processes, and saves such placeholders if "
            "they are not gathered. Set stage3_gather_16bit_weights_on_model_save=true "
            "in DeepSpeed's configuration and save again, or make whole weights of a "
            "DeepSpeed checkpoint with its zero_to_fp32.py."
        )
    flat = [name for name in tensors if "flat_param" in name]
    if flat:
        raise ValueError(
            f"{where} has the flattened tensors of FSDP: {format_names(flat)}. Save "
            "the model with the state dict type FULL_STATE_DICT."
        )


def format_names(names: Iterable[str]) -> str:
    """Joins names by commas for a message, and abbreviates a long list.

    Args:
        names: The names. At most 20 are listed.

    Returns:
        The first names, and how many more there are.

    Example:
        >>> format_names(["embedding", "lm_head"])
        'embedding, lm_head'
    """
    names = list(names)
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
