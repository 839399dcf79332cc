"""Removes what wrappers of PyTorch models add to the names of tensors.

`torch.compile`, data parallelism, FSDP, activation checkpointing, PEFT and training
frameworks wrap a model or its layers in modules of their own. The state of the wrapper
instead of the model then has names such as `_orig_mod.module.model.norm.weight`.
"""

from __future__ import annotations

import collections
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from keras_openllama.checkpoints.matching import format_names

# Attributes that hold the wrapped module. They occur anywhere in a name.
_WRAPPERS = {
    "_orig_mod",  # torch.compile
    "module",  # DataParallel, DistributedDataParallel, DeepSpeed
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",  # Lightning Fabric
    "base_layer",  # PEFT, of a layer with adapters
}
# PEFT's name of the adapter, such as "default", which its own files do not have.
_ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB]\.)([^.]+)\.(?=weight$)")
_Tensor = TypeVar("_Tensor")


def unwrap_names(
    tensors: Mapping[str, _Tensor],
    known: Collection[str],
    where: Any,
    usual_prefix: str = "",
) -> dict[str, _Tensor]:
    """Removes wrappers and a common prefix from names, and warns once if there are any.

    Args:
        tensors: The tensors by name.
        known: Names without wrappers. A prefix is removed if it is the same in all
            names that end with one of these.
        where: Names the file in messages.
        usual_prefix: A prefix that belongs to the format, so that it gets no warning.

    Returns:
        The tensors by name without wrappers, in the same order.

    Raises:
        ValueError: If two tensors get the same name.

    Example:
        >>> unwrap_names({"module.norm": 1}, {"norm"}, "a.bin")
        {'norm': 1}
    """
    short, removed = {}, {}  # New names, and what was removed (as a set in order).
    for name in tensors:
        short[name] = _without_wrappers(name, removed)
    prefix = _common_prefix(short.values(), known)
    if prefix not in ("", usual_prefix):
        removed[prefix.removeprefix(usual_prefix)] = True
    unwrapped, origins = {}, collections.defaultdict(list)
    for name, tensor in tensors.items():
        new = short[name].removeprefix(prefix)
        unwrapped[new] = tensor
        origins[new].append(name)
    for new, names in origins.items():
        if len(names) > 1:
            raise ValueError(
                f"{where} has several tensors for {new}: {format_names(names)}. Save "
                "one model, or one adapter, in it."
            )
    if removed:
        warnings.warn(
            f"The names of tensors in {where} contain "
            f"{format_names(map(repr, removed))} of wrappers of the model, which is "
            "removed. `save_pretrained` of the model itself saves names without it.",
            stacklevel=2,
        )
    return unwrapped


def _without_wrappers(name, removed):
    parts = name.split(".")
    removed.update({f"{part}.": True for part in parts if part in _WRAPPERS})
    name = ".".join(part for part in parts if part not in _WRAPPERS)
    removed.update({f"{adapter}.": True for adapter in _ADAPTER_NAME.findall(name)})
    return _ADAPTER_NAME.sub("", name)


def _common_prefix(names, known):
    """Returns the prefix that all names have before a known one, or `""`."""
    prefixes = set()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):  # From the longest ending to the shortest.
            ending = ".".join(parts[start:])
            if ending in known:
                prefixes.add(name.removesuffix(ending))
                break
    return prefixes.pop() if len(prefixes) == 1 else ""
