"""Keys and values of 8 bits for the KV cache, and attention over them.

The vector of a token and head is stored as int8 integers with one float32 scale, by
which its largest element is 127 or -127. Attention never multiplies a vector by its
scale: a key's scale multiplies the scores of that key, and a value's scale the weight
of that value.

An element is `integer / 128 * scale`. The division is exact in every float type, and
keeps products in float16 within its range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_openllama.layers.cached_attention import (
    CACHE_BLOCK,
    attend_blockwise,
    attend_cached,
    attend_folded,
    fold_query_groups,
    unfold_query_groups,
    update_cache,
)
from keras_openllama.utils.types import Tensor

if keras.config.backend() == "jax":
    import jax

LARGEST = 127
# Value of an integer if the scale is 1.
UNIT = 1 / 128
# Heuristic: PyTorch converts the cache of so many heads at once. The memory of larger
# tensors would be returned to the system, and zeroed, each time.
HEADS_AT_ONCE = 8
# Added to scales, for vectors of zeros. Not representable beside usual elements.
TINY = 1e-30


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds keys or values to 8 bits.

    Args:
        x: Float tensor `(..., head_dim)`.

    Returns:
        int8 integers of the shape of `x`, and float32 scales `(...)`. The difference of
        `integers / 128 * scales[..., None]` from `x` is at most 1/254 of the largest
        absolute element of a vector, and float32 rounding.

    Example:
        >>> integers, scales = quantize_heads(ops.convert_to_tensor([[-1.0, 0.5]]))
        >>> integers.tolist(), scales.tolist()
        ([[-127, 64]], [1.0078740119934082])
    """
    x = ops.cast(x, "float32")
    # Not `ops.maximum`, which copies the constant to the device on PyTorch.
    largest = ops.max(ops.abs(x), axis=-1) + TINY
    integers = ops.round(x * (LARGEST / largest)[..., None])
    return ops.cast(integers, "int8"), largest * (1 / (LARGEST * UNIT))


def write_to_cache(
    cache: tuple[Tensor, ...], key: Tensor, value: Tensor, column: Any
) -> tuple[Tensor, ...]:
    """Writes keys and values to the cache of a layer, quantized if the cache is.

    Args:
        cache: Keys and values, `(heads * batch, columns, head_dim)`; if they are int8,
            also their scales, float32 `(heads * batch, columns)`.
        key: Float tensor `(heads * batch, length, head_dim)`.
        value: Float tensor of the shape of `key`.
        column: See `cached_attention.update_cache`.

    Returns:
        The updated cache.

    Example:
        >>> cache = tuple(ops.zeros((1, 4, 2), "int8") for _ in "kv")
        >>> cache += tuple(ops.zeros((1, 4)) for _ in "kv")
        >>> cache = write_to_cache(cache, ops.ones((1, 1, 2)), ops.ones((1, 1, 2)), 3)
        >>> cache[0][0].tolist()
        [[0, 0], [0, 0], [0, 0], [127, 127]]
    """
    updates = as_stored(cache, key, value)
    return tuple(
        update_cache(tensor, update, column)
        for tensor, update in zip(cache, updates, strict=True)
    )


def is_quantized_cache(cache: Sequence[Tensor]) -> bool:
    """Returns whether the cache of a layer has scales."""
    return len(cache) == 4


def as_stored(
    cache: Sequence[Tensor], key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    """Returns keys and values as a cache stores them.

    Args:
        cache: See `write_to_cache`.
        key: Float tensor `(..., head_dim)`.
        value: Float tensor of the shape of `key`.

    Returns:
        Both; quantized with their scales, `(...)`, if the cache is.
    """
    if not is_quantized_cache(cache):
        return key, value
    (key, key_scales), (value, value_scales) = map(quantize_heads, (key, value))
    return key, value, key_scales, value_scales


def attend_quantized(
    query: Tensor,
    cache: tuple[Tensor, Tensor, Tensor, Tensor],
    bias: Tensor,
    end: Tensor | None,
) -> Tensor:
    """`attend_cached` over a cache of 8 bits.

    XLA on a CPU would convert the whole cache to floats in memory before a product. In
    blocks, which stay in the CPU's cache, that takes little time.

    Args:
        query: See `attend_cached`.
        cache: Keys, values and their scales, see `write_to_cache`.
        bias: See `attend_cached`.
        end: Int scalar, the number of used columns. Ignored on PyTorch, where `cache`
            has the used columns only.

    Returns:
        Tensor of the shape and dtype of `query`.
    """
    key, value, *scales = cache
    query = query * UNIT
    arguments = query, key, value, bias
    if keras.config.backend() == "torch":
        on_cpu = query.device.type == "cpu"
        attend = _attend_by_heads if on_cpu else attend_cached
        context = attend(*arguments, scales)
    elif key.shape[1] % CACHE_BLOCK:
        context = attend_cached(*arguments, scales)
    elif query.shape[2] > 1 or keras.config.backend() == "tensorflow":
        context = attend_blockwise(*arguments, end, scales)
    else:
        context = jax.lax.platform_dependent(
            *(*arguments, end, scales),
            cpu=attend_blockwise,
            # Accelerators convert within the product.
            default=lambda *inputs: attend_cached(*inputs[:4], inputs[5]),
        )
    return context * UNIT


def _attend_by_heads(query, key, value, bias, scales):
    """`attend_cached`, which converts the keys and values of some heads at a time."""
    folded = fold_query_groups(query, key)
    parts = []
    for start in range(0, len(key), HEADS_AT_ONCE):
        now = slice(start, start + HEADS_AT_ONCE)
        inputs = (x[now] for x in (folded, key, value, bias))
        parts.append(attend_folded(*inputs, [x[now] for x in scales]))
    context = ops.concatenate(parts) if len(parts) > 1 else parts[0]
    return unfold_query_groups(context, query.shape)
