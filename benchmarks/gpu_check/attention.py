"""The attention kernels of a device, compared with the plain formula in float32."""

import concurrent.futures
import dataclasses

import numpy as np
import results
from parity import error

LIMIT = 0.02  # Relative to the norm; bfloat16 rounds by up to 0.004.


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of the heads, and the contents of the sequences."""

    name: str
    heads: int
    key_value_heads: int
    head_dim: int
    documents: str  # "full", "padded" or "packed"


CASES = (
    Case("heads of 128", 4, 4, 128, "full"),
    Case("heads of 128, padding", 4, 4, 128, "padded"),
    Case("heads of 128, packed documents", 4, 4, 128, "packed"),
    Case("heads of 100", 4, 4, 100, "full"),
    Case("heads of 100, packed documents", 4, 4, 100, "packed"),
    Case("grouped heads of 64, packed", 8, 2, 64, "packed"),
)
ROWS, LENGTH = 2, 256


def inputs(case):
    """Query, key, value and gradient of the output: NumPy, float32."""
    random = np.random.default_rng(0)
    counts = (case.heads, case.key_value_heads, case.key_value_heads, case.heads)
    return [
        random.standard_normal((ROWS, count, LENGTH, case.head_dim), "float32")
        for count in counts
    ]


def documents_of(case):
    """The document number of each token, 0 for padding: int32 `(ROWS, LENGTH)`."""
    documents = np.ones((ROWS, LENGTH), "int32")
    if case.documents == "packed":
        documents[0, LENGTH // 3 :] = 2
        documents[1, LENGTH // 2 :] = 2
    if case.documents != "full":
        documents[1, -LENGTH // 5 :] = 0
    if case.documents == "padded":  # Left padding too: rows of the mask that are empty.
        documents[0, : LENGTH // 5] = 0
    return documents


def compare(case, found, expected):
    """Checks values and gradients."""
    names = ("values", "query", "key", "value")
    errors = dict(zip(names, map(error, found, expected), strict=True))
    gradients = max(errors[name] for name in names[1:])
    results.check(f"{case.name}: values", errors["values"], LIMIT)
    results.check(f"{case.name}: gradients", gradients, LIMIT)


# ----- JAX


def check_jax():
    """Checks the kernels on JAX."""
    # Compiling takes most of the time, and threads of XLA compile in parallel.
    with concurrent.futures.ThreadPoolExecutor(len(CASES)) as pool:
        jobs = {case: pool.submit(on_jax, case) for case in CASES}
        for case, job in jobs.items():
            kernel, plain, text = job.result()
            compare(case, kernel, plain)
            if not results.has_gpu():
                results.skip(f"{case.name}: kernel", "cuDNN needs a GPU")
                continue
            missing = 2 - min(2, text.count("__cudnn$fmha"))
            results.check(f"{case.name}: missing cuDNN kernels", missing, 0)


def on_jax(case):
    """Returns the results of the device's kernel and of the plain formula.

    Returns:
        For both, the values and gradients in float32; and the compiled program of the
        kernel as text. The kernel computes in bfloat16; the formula in float32 on the
        CPU, on inputs that were rounded to bfloat16.
    """
    import jax

    kernel, text = values_and_gradients(case, "bfloat16", jax.devices()[0])
    plain, _ = values_and_gradients(case, "float32", jax.devices("cpu")[0])
    return kernel, plain, text


def values_and_gradients(case, dtype, device):
    """Returns values and gradients in float32, and the compiled program as text."""
    import jax
    import jax.numpy as jnp
    import ml_dtypes

    from keras_openllama.layers.attention import causal_mask, dot_product_attention
    from keras_openllama.layers.attention_kernels import select_attention

    rounded = (x.astype(ml_dtypes.bfloat16).astype(dtype) for x in inputs(case))
    *heads, weights, documents = jax.device_put([*rounded, documents_of(case)], device)
    kernel = select_attention(device)

    def loss(heads, weights, documents):
        real = (documents > 0)[:, None, :, None]
        mask = causal_mask(jnp.arange(LENGTH)[None], documents)
        if dtype == "float32":
            context = dot_product_attention(*heads, mask)
        else:
            context = kernel(*heads, mask, documents)
        return jnp.sum(context * weights * real, dtype="float32"), context * real

    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = program.lower(heads, weights, documents).compile()
    (_, context), gradients = compiled(heads, weights, documents)
    arrays = [np.asarray(x).astype("float32") for x in (context, *gradients)]
    return arrays, compiled.as_text()


# ----- PyTorch


def check_torch():
    """Checks the kernels on PyTorch."""
    import torch

    from keras_openllama.layers.attention import (
        causal_attention,
        causal_mask,
        fused_causal_attention,
    )

    for case in CASES:
        tensors = inputs(case)
        documents = torch.tensor(documents_of(case), device=device())
        positions = torch.arange(LENGTH, device=device())[None]
        mask = causal_mask(positions, documents)
        real = (documents > 0)[:, None, :, None]
        plain = on_torch(lambda *heads, m=mask: formula(*heads, m), tensors, real)
        with recorded_kernels() as kernels:
            found = on_torch(
                lambda *heads, m=mask: causal_attention(*heads, m), tensors, real, True
            )
        compare(case, found, plain)
        results.info(f"{case.name}: kernel", ", ".join(kernels))
        if case.documents == "full":
            with recorded_kernels() as kernels:
                found = on_torch(fused_causal_attention, tensors, real, True)
            values = error(found[0], plain[0])
            results.check(f"{case.name}: prefill", values, LIMIT)
            results.info(f"{case.name}: kernel of prefill", ", ".join(kernels))


def device():
    """PyTorch's name of the device."""
    return "cuda" if results.has_gpu() else "cpu"


def on_torch(attend, tensors, real, is_bfloat16=False):
    """As `values_and_gradients`, without the program."""
    import torch

    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    *heads, weights = (
        torch.tensor(x, device=device()).bfloat16().to(dtype) for x in tensors
    )
    heads = [x.requires_grad_() for x in heads]
    context = attend(*heads)
    (context * weights * real).float().sum().backward()
    found = [context * real, *(x.grad for x in heads)]
    return [x.detach().float().cpu().numpy() for x in found]


def formula(query, key, value, mask):
    """Attention by its formula."""
    import torch

    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -1e30).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, value)


class recorded_kernels:
    """Context manager: a list of the kernels of `scaled_dot_product_attention`."""

    def __enter__(self):
        from torch.nn import functional

        self._original, kernels = functional.scaled_dot_product_attention, []

        def recording(*heads, **options):
            kernels.append(chosen(*heads, **options))
            return self._original(*heads, **options)

        functional.scaled_dot_product_attention = recording
        return kernels

    def __exit__(self, *_):
        from torch.nn import functional

        functional.scaled_dot_product_attention = self._original


def chosen(*heads, **options):
    """The name of the kernel that PyTorch selects for these arguments."""
    import torch
    from torch.nn.attention import SDPBackend

    return SDPBackend(torch._fused_sdp_choice(*heads, **options)).name
