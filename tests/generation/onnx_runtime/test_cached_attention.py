"""The compiled attention to a KV cache."""

import ml_dtypes
import native_products
import numpy as np
import pytest

from keras_openllama.generation.onnx_runtime.decoder import open_session, ort_value
from keras_openllama.generation.onnx_runtime.file import (
    GRAPH_FILE,
    PACKAGE_DOMAIN,
    OnnxGraph,
)
from keras_openllama.native.library import compile_library, native_library

pytestmark = [pytest.mark.backend_free, native_products.needs_them]
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}
# How far a stored element may be away: a rounded number may be the neighbour of the
# expected one, since its angle is rounded. Then, the context; with bfloat16,
# instructions round queries, and weights if there are many queries.
SCALES = ("key_scales", "value_scales")
TOLERANCES = {"float16": (2e-3, 2e-4), "bfloat16": (2e-2, 6e-3), "int8": (1, 2e-2)}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def session_of(heads, kv_heads, dtype, directory, library):
    graph = OnnxGraph()
    graph.input("qkv", "float32", ["batch", "length", "all"])
    for cache in ("keys", "values"):
        graph.input(cache, dtype, ["batch", kv_heads, "columns", "size"])
    inputs = ["qkv", "keys", "values", "last", "cos", "sin"]
    if dtype == "int8":
        inputs += SCALES
        for scales in SCALES:
            graph.input(scales, "float32", ["batch", kv_heads, "columns"])
    graph.input("last", "int32", ["batch"])
    for table in ("cos", "sin"):
        graph.input(table, "float32", ["positions", "half"])
    graph.add(
        *("CachedAttention", inputs, "context", PACKAGE_DOMAIN),
        num_heads=heads,
        kv_num_heads=kv_heads,
    )
    graph.output("context", "float32", ["batch", "length", "outputs"])
    graph.save(directory, "attention")
    return open_session(directory / GRAPH_FILE, library, {})


def tables(positions, head_dim):
    angles = np.outer(np.arange(positions), 100 ** -np.linspace(0, 1, head_dim // 2))
    return np.cos(angles).astype("float32"), np.sin(angles).astype("float32")


def attend(session, qkv, keys, values, last, **scales):
    """Runs the operator, which writes to the cache and its scales."""
    binding = session.io_binding()
    cos, sin = tables(keys.shape[2], keys.shape[3])
    inputs = {"qkv": qkv, "keys": keys, "values": values, "cos": cos, "sin": sin}
    inputs["last"] = np.array(last, "int32")
    for name, array in (inputs | scales).items():
        binding.bind_ortvalue_input(name, ort_value(array))
    binding.bind_output("context")
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0].numpy()


def rotated(x, positions, head_dim):
    cos, sin = (table[positions] for table in tables(1000, head_dim))
    first, second = np.split(x.astype("float64"), 2, axis=-1)
    return np.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


def stored(x, dtype):
    """What the cache has for vectors, and the scales of integers."""
    if dtype != np.int8:
        return x.astype(dtype), np.ones(x.shape[:-1], "float32")
    scales = np.abs(x).max(axis=-1) / 127
    return np.round(x / scales[..., None]).astype(dtype), scales.astype("float32")


def write(qkv, cache, last, heads):
    """Writes the new keys and values, as the operator should.

    Args:
        cache: keys, values, and the scales of both.
    """
    kv_heads, _, head_dim = cache[0].shape[1:]
    new = qkv.reshape(*qkv.shape[:2], -1, head_dim).swapaxes(1, 2)[:, heads:]
    for row, end in enumerate(last):
        at = np.arange(end - qkv.shape[1] + 1, end + 1)
        keys = rotated(new[row, :kv_heads], at, head_dim)
        for i, x in enumerate((keys, new[row, kv_heads:])):
            cache[i][row, :, at], cache[2 + i][row, :, at] = (
                part.swapaxes(0, 1) for part in stored(x, cache[0].dtype)
            )


def expected_context(qkv, cache, last, heads):
    """Attention to a cache in float64; queries are rounded to bfloat16 if it is."""
    batch, length, _ = qkv.shape
    kv_heads, _, head_dim = cache[0].shape[1:]
    queries = qkv.reshape(batch, length, -1, head_dim)[:, :, :heads]
    context = np.zeros((batch, length, heads, head_dim))
    for row, end in enumerate(last):
        at = np.arange(end - length + 1, end + 1)
        for head in range(heads):
            own = head * kv_heads // heads
            keys, values = (
                x[row, own, : end + 1].astype("float64")
                * scales[row, own, : end + 1, None]
                for x, scales in zip(cache[:2], cache[2:], strict=True)
            )
            query = rotated(queries[row, :, head], at, head_dim)
            if cache[0].dtype == ml_dtypes.bfloat16:
                query = query.astype(ml_dtypes.bfloat16).astype("float64")
            scores = query @ keys.T / head_dim**0.5
            scores[np.arange(end + 1) > at[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            context[row, :, head] = weights @ values
    return context.reshape(batch, length, -1)


@pytest.mark.parametrize("options", native_products.OPTIONS, ids=["native", "avx2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(2, 2, 100), (6, 2, 64), (1, 1, 8)]
)
@pytest.mark.parametrize("length", [1, 3, 40, 200])
def test_cached_attention_attends_to_the_tokens_up_to_its_own(
    options, dtype, heads, kv_heads, head_dim, length, tmp_path
):
    batch, columns = 2, 450
    session = session_of(heads, kv_heads, dtype, tmp_path, compile_library(options))
    qkv = random(batch, length, (heads + 2 * kv_heads) * head_dim)
    pairs = [
        stored(random(batch, kv_heads, columns, head_dim, seed=seed), DTYPES[dtype])
        for seed in (1, 2)
    ]
    cache = [*(x for x, _ in pairs), *(scales for _, scales in pairs)]
    last = [length - 1 + 7, columns - 10]
    for row, end in enumerate(last):  # What is beyond is never read.
        for x in cache:
            x[row, :, end + 1 :] = np.nan if x.dtype != np.int8 else 127
    wanted = [x.copy() for x in cache]
    write(qkv, wanted, last, heads)
    keys, values, *scales = cache
    names = SCALES if dtype == "int8" else ()
    found = attend(
        *(session, qkv, keys, values, last), **dict(zip(names, scales, strict=False))
    )
    of_cache, of_context = TOLERANCES[dtype]
    for x, other in zip(cache, wanted, strict=True):
        for row, end in enumerate(last):
            difference = x[row, :, : end + 1] - other[row, :, : end + 1].astype(
                "float32"
            )
            assert np.abs(difference).max() <= of_cache
            assert np.mean(difference != 0) < 1e-2 or x.dtype == np.float32
    context = expected_context(qkv, wanted, last, heads)
    assert np.abs(found - context).max() < of_context


@pytest.mark.parametrize("length", [1, 40])
def test_cached_attention_of_large_values_is_finite_in_float16(length, tmp_path):
    session = session_of(2, 1, "float16", tmp_path, native_library())
    qkv = random(1, length, 4 * 16) * 1e6
    keys, values = np.zeros((2, 1, 1, 50, 16), "float16")
    found = attend(session, qkv, keys, values, [length - 1])
    assert np.isfinite(found).all() and np.abs(values).max() == 65504


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 40])
# The last token has 2 heads of queries, one of keys and one of values.
@pytest.mark.parametrize("element, heads", [(3, [0]), (35, [0, 1]), (60, [0, 1])])
def test_cached_attention_of_not_a_number_is_not_a_number(
    dtype, length, element, heads, tmp_path
):
    session = session_of(2, 1, dtype, tmp_path, native_library())
    qkv = random(1, length, 4 * 16)
    qkv[0, -1, element] = np.nan
    keys, values = np.zeros((2, 1, 1, 50, 16), DTYPES[dtype])
    scales = {name: np.zeros((1, 1, 50), "float32") for name in SCALES}
    found = attend(
        *(session, qkv, keys, values, [length - 1]),
        **(scales if dtype == "int8" else {}),
    ).reshape(1, length, 2, 16)
    assert np.isnan(found[0, -1, heads]).any(axis=-1).all()
    if element < 32:  # Of a query.
        assert np.isfinite(found[0, -1, 1]).all() and np.isfinite(found[0, :-1]).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"last": [50]}, "a position is outside of the cache or the tables"),
        ({"last": [1]}, "a position is outside of the cache or the tables"),
        ({"qkv": np.zeros((1, 3, 63), "float32")}, "have other sizes"),
        ({"values": np.zeros((1, 1, 50, 18), "float16")}, "have other sizes"),
        ({"keys": np.zeros((2, 1, 50, 16), "float16")}, "have other sizes"),
    ],
)
def test_cached_attention_of_other_sizes_is_an_error(change, message, tmp_path):
    session = session_of(2, 1, "float16", tmp_path, native_library())
    arguments = {
        "qkv": random(1, 3, 4 * 16),
        "keys": np.zeros((1, 1, 50, 16), "float16"),
        "values": np.zeros((1, 1, 50, 16), "float16"),
        "last": [2],
    }
    with pytest.raises(Exception, match=message):
        attend(session, **(arguments | change))
