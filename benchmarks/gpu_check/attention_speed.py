"""What the kernels of attention take, next to the plain formula."""

import results
from timing import median_seconds


def sizes():
    """Rows, heads, length, head_dim."""
    return (4, 32, 2048, 128) if results.has_gpu() else (1, 2, 64, 16)


def report(name, milliseconds):
    rows, heads, length, head_dim = sizes()
    # Forward two products, backward five, half of each hidden by causality.
    flops = 7 * 2 * rows * heads * length**2 * head_dim / 2
    rate = f"{flops / milliseconds / 1e9:.0f} TFLOP/s"
    results.measure(f"{name}, forward and backward", milliseconds, "ms", rate)


def on_jax():
    import jax
    import jax.numpy as jnp

    from keras_openllama.layers.attention import (
        causal_attention,
        causal_mask,
        dot_product_attention,
    )
    from keras_openllama.layers.attention_kernels import select_attention

    rows, heads, length, head_dim = sizes()
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [
        jax.random.normal(key, (rows, heads, length, head_dim), "bfloat16")
        for key in keys
    ]
    documents = jnp.ones((rows, length), "int32")
    mask = causal_mask(jnp.arange(length)[None], documents)
    kernel = select_attention(jax.devices()[0])

    def cudnn(*heads, **options):
        heads = (jnp.swapaxes(x, 1, 2) for x in heads)
        return jax.nn.dot_product_attention(*heads, implementation="cudnn", **options)

    ways = {
        "ours, as training takes it": lambda *x: kernel(*x, mask, documents),
        "ours, as scoring takes it": lambda *x: causal_attention(*x, mask),
        "plain formula": lambda *x: dot_product_attention(*x, mask),
    }
    if results.has_gpu():
        ways |= {
            "cuDNN, mask alone": lambda *x: cudnn(*x, mask=mask),
            "cuDNN, causal without mask": lambda *x: cudnn(*x, is_causal=True),
        }
    for name, attend_so in ways.items():
        gradient = jax.jit(
            jax.grad(lambda *x, f=attend_so: jnp.sum(f(*x), dtype="float32"), (0, 1, 2))
        )
        run = lambda g=gradient: jax.block_until_ready([g(*inputs) for _ in range(5)])  # noqa: E731
        report(name, 1e3 * median_seconds(run) / 5)


def on_torch():
    import torch
    from attention import device, formula

    from keras_openllama.layers.attention import causal_attention, causal_mask
    from keras_openllama.layers.cached_attention import fused_causal_attention

    rows, heads, length, head_dim = sizes()
    inputs = [
        torch.randn(
            *(rows, heads, length, head_dim),
            dtype=torch.bfloat16,
            device=device(),
            requires_grad=True,
        )
        for _ in range(3)
    ]
    mask = causal_mask(torch.arange(length, device=device())[None])
    mask = mask.expand(rows, 1, length, length)
    ways = {
        "ours, as training takes it": lambda *x: causal_attention(*x, mask),
        "ours, as a prompt takes it": fused_causal_attention,
        "plain formula": lambda *x: formula(*x, mask),
    }
    for name, attend in ways.items():

        def run(attend=attend):
            for _ in range(5):
                attend(*inputs).sum().backward()
            if results.has_gpu():
                torch.cuda.synchronize()

        report(name, 1e3 * median_seconds(run) / 5)
