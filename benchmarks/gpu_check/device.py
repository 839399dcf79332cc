"""The device, and the limits of its speed."""

import contextlib
import functools
import importlib.metadata
import platform

import results
from timing import median_seconds

REPEATS = 10  # Calls that are timed together, to hide the launch time.


def sizes():
    """Side of the matrices, and size of the array that is copied and read."""
    return (8192, 1 << 30) if results.has_gpu() else (512, 1 << 22)


def measure(product, copy, read, side, numbers):
    """Measures three functions, which run `REPEATS` times and wait."""
    flops = REPEATS * 2 * side**3 / median_seconds(product)
    copied = REPEATS * 2 * 2 * numbers / median_seconds(copy)
    read_rate = REPEATS * 2 * numbers / median_seconds(read)
    results.measure(f"product of {side} x {side}, bfloat16", flops / 1e12, "TFLOP/s")
    results.measure("copy: read and write", copied / 1e9, "GB/s")
    results.measure("read: sum of an array", read_rate / 1e9, "GB/s")
    results.save_limits(flops=flops, read=max(read_rate, copied))


def on_torch():
    """Measures on PyTorch."""
    import torch

    report_versions("torch", "triton", "transformers", "keras", "numpy")
    device = "cuda" if results.has_gpu() else "cpu"
    if results.has_gpu():
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        results.info("device", f"{properties.name}, {memory:.1f} GiB")
        results.info(
            "CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
        )
    side, numbers = sizes()
    make = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    a, b, array = make(side, side), make(side, side), make(numbers)
    other = torch.empty_like(array)

    def repeated(run):
        def call():
            for _ in range(REPEATS):
                run()
            if device == "cuda":
                torch.cuda.synchronize()

        return call

    measure(
        repeated(lambda: torch.matmul(a, b)),
        repeated(lambda: other.copy_(array)),
        repeated(lambda: array.sum()),
        side,
        numbers,
    )


def on_jax():
    """Measures on JAX."""
    import jax
    import jax.numpy as jnp

    report_versions("jax", "jaxlib")
    device = jax.devices()[0]
    results.info("device", f"{device.device_kind}, {device.client.platform_version}")
    side, numbers = sizes()
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(key, (side, side), "bfloat16") for key in keys[:2])
    array = jax.random.normal(keys[2], (numbers,), "bfloat16")

    def repeated(function, *arguments):
        compiled = jax.jit(function)

        def call():
            for _ in range(REPEATS):
                output = compiled(*arguments)
            output.block_until_ready()

        return call

    measure(
        repeated(jnp.matmul, a, b),
        repeated(lambda x: -x, array),
        repeated(lambda x: jnp.sum(x, dtype="float32"), array),
        side,
        numbers,
    )


def report_versions(*names):
    """Reports the versions of Python and of the packages that are installed."""
    versions = []
    for name in names:
        # PyTorch for CPUs has no Triton.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    results.info(
        "versions", ", ".join([f"Python {platform.python_version()}", *versions])
    )
