"""Speed of the attention kernels, compared with the plain formula."""

import results
from timing import median_seconds


def sizes():
    """Batch size, heads, length, head_dim."""
    return (4, 32, 2048, 128) if results.has_gpu() else (1, 2, 64, 16)


def report(name, milliseconds):
    """Reports a time, and the FLOP/s of causal attention."""
    rows, heads, length, head_dim = sizes()
    # Two products forward, five backward; the causal mask halves each.
    flops = 7 * 2 * rows * heads * length**2 * head_dim / 2
    rate = f"{flops / milliseconds / 1e9:.0f} TFLOP/s"
    results.measure(f"{name}, forward and backward", milliseconds, "ms", rate)


def on_jax():
    """Measures on JAX."""
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

    variants = {
        "ours in training": lambda *x: kernel(*x, mask, documents),
        "ours in scoring": lambda *x: causal_attention(*x, mask),
        "plain formula": lambda *x: dot_product_attention(*x, mask),
    }
    if results.has_gpu():
        variants |= {
            "cuDNN with a mask": lambda *x: cudnn(*x, mask=mask),
            "cuDNN with is_causal, no mask": lambda *x: cudnn(*x, is_causal=True),
        }
    for name, attend in variants.items():
        gradient = jax.jit(
            jax.grad(lambda *x, f=attend: jnp.sum(f(*x), dtype="float32"), (0, 1, 2))
        )
        run = lambda g=gradient: jax.block_until_ready([g(*inputs) for _ in range(5)])  # noqa: E731
        report(name, 1e3 * median_seconds(run) / 5)


def on_torch():
    """Measures on PyTorch."""
    import torch
    from attention import device, formula

    from keras_openllama.layers.attention import (
        causal_attention,
        causal_mask,
        fused_causal_attention,
    )

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
    variants = {
        "ours in training": lambda *x: causal_attention(*x, mask),
        "ours in prefill": fused_causal_attention,
        "plain formula": lambda *x: formula(*x, mask),
    }
    for name, attend in variants.items():

        def run(attend=attend):
            for _ in range(5):
                attend(*inputs).sum().backward()
            if results.has_gpu():
                torch.cuda.synchronize()

        report(name, 1e3 * median_seconds(run) / 5)
