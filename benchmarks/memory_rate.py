"""The rate at which a backend reads weights: products of matrices and a vector."""

import statistics
import time

from random_llama import QUANTIZED  # benchmarks/random_llama.py

LIMIT_BYTES = 400e6  # Matrices for the limit: larger than any CPU cache.


def bytes_per_weight(dtype):
    """Bytes of a weight in a contender's products; scales are included."""
    return {
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "int8": 1 + 2 / 32,
        "int4": 0.5 + 2 / 32,
    }[dtype]


def bandwidth(backend, dtype, width, ff):
    """The best rate of matrix-vector products in any memory layout, in bytes/s."""
    if dtype in QUANTIZED:  # The rate of the memory.
        dtypes = ("float32", "bfloat16")
        return max(bandwidth(backend, dtype, width, ff) for dtype in dtypes)
    size = bytes_per_weight(dtype)
    count = int(LIMIT_BYTES / (width * ff * size))
    products = {"jax": jax_products, "torch": torch_products}
    products = products.get(backend, tensorflow_products)
    best = 0.0
    for k, n in ((width, ff), (ff, width)):
        for run in products(dtype, k, n, count):
            run()
            times = []
            for _ in range(5):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            best = max(best, count * k * n * size / statistics.median(times))
    return best


def jax_products(dtype, k, n, count):
    """Yields functions that multiply `count` matrices by a vector of size `k`; JAX."""
    import jax
    import jax.numpy as jnp

    def product(x, w):
        return jax.lax.dot_general(x, w, (((1,), (w.shape.index(k),)), ((), ())))

    def two_rows(x, w):  # The only fast form in bfloat16.
        x = jax.lax.optimization_barrier(jnp.concatenate([x, x]))
        dimensions = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(w, x, dimensions, preferred_element_type="float32")
        return jax.lax.optimization_barrier(y)

    x = jnp.ones((1, k), dtype)
    for shape in ((k, n), (n, k)):
        matrices = [jnp.full(shape, i, dtype) for i in range(count)]
        for form in (product, two_rows) if shape == (n, k) else (product,):
            run = jax.jit(lambda x, ws, form=form: [form(x, w) for w in ws])
            yield lambda f=run, ws=matrices: jax.block_until_ready(f(x, ws))


def tensorflow_products(dtype, k, n, count):
    """The same on TensorFlow, with and without XLA."""
    import tensorflow as tf

    x = tf.ones((1, k), dtype)
    for transposed in (False, True):
        shape = (n, k) if transposed else (k, n)
        matrices = [tf.Variable(tf.ones(shape, dtype)) for _ in range(count)]
        for jit in (False, True):
            run = tf.function(
                lambda ws=matrices, t=transposed: [
                    tf.matmul(x, w, transpose_b=t) for w in ws
                ],
                jit_compile=jit,
            )
            yield lambda f=run: f()[-1].numpy()


def torch_products(dtype, k, n, count):
    """The same on PyTorch: plain, transposed, blocks of outputs, oneDNN's layout."""
    import torch

    x = torch.ones((1, k), dtype=getattr(torch, dtype))
    for transposed in (False, True):
        shape = (n, k) if transposed else (k, n)
        matrices = [torch.ones(shape, dtype=x.dtype) for _ in range(count)]
        matrices = [w.T if transposed else w for w in matrices]
        yield lambda ws=matrices: [x @ w for w in ws]
        if transposed and n % 64 == 0:
            blocks = [w.T.view(-1, 64, k).transpose(1, 2) for w in matrices]
            yield lambda ws=blocks: [x @ w for w in ws]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pack = torch.ops.mkldnn._reorder_linear_weight
        product = torch.ops.mkldnn._linear_pointwise
        matrices = [pack(torch.ones((n, k), dtype=x.dtype)) for _ in range(count)]
        yield lambda ws=matrices: [product(x, w, None, "none", [], "") for w in ws]
