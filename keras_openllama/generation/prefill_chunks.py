"""In how many tokens at a time prompts are written to the KV cache."""

from __future__ import annotations

# Heuristics: most columns, and tokens of the whole batch, of the first chunk on a GPU.
# The matrix products of a chunk then take far longer than reading the weights.
FIRST_CHUNK, FIRST_CHUNK_TOKENS = 2048, 16384


def prefill_chunks(platform: str, batch: int, columns: int) -> list[int]:
    """Returns the sizes of the chunks in which prefixes are written to the cache.

    On a CPU, chunks of 256 tokens are near the peak rate of matrix products, and a
    chunk of 32 takes about as long as two decoding steps. An accelerator reads the
    weights in the time in which it computes about 256 tokens of the whole batch, so
    smaller chunks are not faster. Larger chunks are faster; memory for attention scores
    limits them.

    Args:
        platform: platform of the devices, such as `"cpu"`.
        batch: batch size of the program, a power of two.
        columns: columns of the cache, a power of two.

    Returns:
        Chunk sizes below `columns`, descending; `[columns]` if none is. Each divides
        `columns`.

    Example:
        >>> prefill_chunks("cpu", batch=1, columns=2048)
        [256, 32]
        >>> prefill_chunks("gpu", batch=4, columns=2048)
        [1024, 256, 64]
    """
    if platform == "cpu":
        sizes = {256, 32}
    else:
        sizes = {max(256, min(1024, 8192 // batch)), 256, max(32, 256 // batch)}
    fitting = [size for size in sizes if size < columns]
    return sorted(fitting, reverse=True) or [columns]


def first_chunks(batch: int, columns: int) -> list[int]:
    """Returns the sizes of a first chunk that attends to itself by a fused kernel.

    The program contains each size; the smallest one that holds the prefixes runs. So
    the weights are read once for most prompts.

    Args:
        batch: batch size of the program, a power of two.
        columns: columns of the cache, a power of two.

    Returns:
        Chunk sizes up to `columns`, ascending.

    Example:
        >>> first_chunks(batch=1, columns=2048), first_chunks(batch=64, columns=512)
        ([256, 1024, 2048], [256])
    """
    largest = max(256, min(FIRST_CHUNK, FIRST_CHUNK_TOKENS // batch))
    if columns <= largest:
        return sorted({min(size, columns) for size in (256, 1024, columns)})
    return sorted({256, largest})  # Longer prompts need further chunks.
