"""Speed of the attention kernels, compared with the plain formula."""

import functools

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

    from keras_openllama.layers.attention import causal_mask, dot_product_attention
    from keras_openllama.layers.attention_kernels import select_attention

    rows, heads, length, head_dim = sizes()
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [
        jax.random.normal(key, (rows, heads, length, head_dim), "bfloat16")
        for key in keys
    ]
    kernel = select_attention(jax.devices()[0])
    one_document = jnp.ones((rows, length), "int32")
    two_documents = one_document.at[:, length // 2 :].set(2)

    def mask_of(documents):
        return causal_mask(jnp.arange(length)[None], documents)

    def ours(documents, *heads):
        return kernel(*heads, mask_of(documents), documents)

    def formula(documents, *heads):
        return dot_product_attention(*heads, mask_of(documents))

    def cudnn(documents, *heads, is_masked):
        return jax.nn.dot_product_attention(
            *(jnp.swapaxes(x, 1, 2) for x in heads),
            mask=mask_of(documents) if is_masked else None,
            is_causal=True,
            implementation="cudnn",
        )

    # Documents are an argument: XLA must not know which kernel will be selected.
    variants = {
        "ours, one document": (ours, one_document),
        "ours, two documents": (ours, two_documents),
        "plain formula": (formula, one_document),
    }
    if results.has_gpu():
        for is_masked, name in {True: "a mask", False: "no mask"}.items():
            attend = functools.partial(cudnn, is_masked=is_masked)
            variants[f"cuDNN with is_causal and {name}"] = attend, one_document
    for name, (attend, documents) in variants.items():
        gradient = jax.jit(
            jax.grad(lambda *x, f=attend: jnp.sum(f(*x), dtype="float32"), (1, 2, 3))
        )
        run = lambda g=gradient, d=documents: jax.block_until_ready(  # noqa: E731
            [g(d, *inputs) for _ in range(5)]
        )
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
