"""Compares ways to decode on PyTorch, and profiles them.

    python benchmarks/gpu_check/torch_variants.py --seconds 100

Variants: `eager` launches each kernel, `captured` replays a CUDA graph of eager
kernels, `compiled` one of compiled layers, `fused` is `compiled` with the query, key
and value (gate and up) kernels joined, and `tuned` is `compiled` with coordinate
descent, which replaces matrix-vector products by Triton kernels. `triton` is `captured`
with the kernels of `triton_layer.py`, and `joined` that with joined kernels,
and `gemv` that with a Triton kernel for products with one vector.

Lines are printed as results arrive. A section that would start after --seconds is
skipped, and the process ends at 1.2 times that. Without a GPU, sizes are tiny, and
what needs Triton fails.
"""

# ruff: noqa: E402
import argparse
import gc
import os
import sys
import threading
import time
import traceback

START = time.perf_counter()
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import paths  # noqa: F401  First: it makes the other imports work.
import torch

HAS_GPU = torch.cuda.is_available()
os.environ["GPU_CHECK_HAS_GPU"] = str(int(HAS_GPU))

import models
import numpy as np

from keras_openllama.generation.pytorch import network as torch_network
from keras_openllama.generation.pytorch import token_loop as token_loop_torch

DEVICE = "cuda" if HAS_GPU else "cpu"
PROMPT, NEW, SHORT = 64, 128, 32


def say(text):
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


def wait():
    if HAS_GPU:
        torch.cuda.synchronize()


def timed(run):
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def make(preset, dtype="bfloat16", **changes):
    gc.collect()
    sizes = {**models.sizes(preset), **changes}
    seconds, lm = timed(lambda: models.ours(sizes, dtype))
    say(f"{preset} {dtype} {changes}: created in {seconds:.1f} s")
    return lm, sizes


def prompts(sizes, batch, length):
    random = np.random.default_rng(0)
    ids = random.integers(3, sizes["vocabulary_size"], (batch, length), "int32")
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def generate(lm, inputs, new):
    out = lm.generate(inputs, max_new_tokens=new, stop_token_ids=None)
    return out["token_ids"]


def use(lm, variant):
    """Selects a variant, with new decoders."""
    modes = {
        "tuned": "compiled",
        "fused": "compiled",
        "triton": "captured",
        "joined": "captured",
        "gemv": "captured",
    }
    token_loop_torch.DECODING[DEVICE] = modes.get(variant, variant)
    options = {"coordinate_descent_tuning": True} if variant == "tuned" else {}
    token_loop_torch.COMPILE_OPTIONS = options
    torch._dynamo.reset()
    joined = variant in ("fused", "joined", "gemv")
    torch_network._layer_tensors = fused_tensors if joined else TENSORS
    torch_network.project_heads = fused_heads if joined else HEADS
    torch_network.finish_layer = fused_finish if joined else FINISH
    torch_network.TorchNetwork.decode = DECODE
    if variant in ("triton", "joined", "gemv"):
        torch_network.TorchNetwork.decode = triton_decode(joined, variant == "gemv")
    lm.compile(sampler="greedy")


TENSORS = torch_network._layer_tensors
DECODE = torch_network.TorchNetwork.decode
HEADS, FINISH = torch_network.project_heads, torch_network.finish_layer


def triton_decode(joined, gemv):
    import triton_layer

    project = triton_layer.gemv if gemv else torch_network.project

    def decode(self, tokens, cos, sin, bias, column, cache, run_layer=None):
        x = self.embed(tokens)
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x = triton_layer.decode_layer(
                *(x, layer, cos, sin, bias, column, keys, values),
                *(self.head_dim, self.epsilon, joined, project),
            )
        x = torch_network.rms_norm(x[0] + x[1], self.final_norm, self.epsilon)
        return project(x, self.lm_head)[:, 0]

    return decode


def sweep_gemv(lm):
    """Measures products of all layers with one vector, by cuBLAS and by Triton."""
    import triton_layer

    use(lm, "joined")
    network = torch_network.TorchNetwork(lm)
    tiles = ([1, 1024, 4], [2, 1024, 4], [4, 512, 4], [8, 256, 4], [4, 1024, 8])
    for name in ("query", "output", "gate", "down"):
        linears = [getattr(layer, name) for layer in network.layers]
        shape = linears[0].kernel.shape
        x = torch.randn(1, 1, shape[1], device=DEVICE, dtype=torch.bfloat16)
        for tile in (None, *tiles):
            triton_layer.GEMV[:] = tile or triton_layer.GEMV
            project = triton_layer.gemv if tile else torch_network.project

            def run(linears=linears, project=project, x=x):
                for linear in linears:
                    project(x, linear)

            run()
            wait()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            times = [timed(graph.replay)[0] for _ in range(6)]
            each = min(times) / len(linears)
            rate = linears[0].kernel.nbytes / each / 1e9
            say(f"{name} {tuple(shape)} {tile}: {1e6 * each:.1f} us, {rate:.0f} GB/s")
    triton_layer.GEMV[:] = [4, 512, 4]


def fused_tensors(layer):
    tensors = TENSORS(layer)
    join = lambda *parts: tensors.query._replace(  # noqa: E731
        kernel=torch.cat([part.kernel for part in parts])
    )
    return tensors._replace(
        query=join(tensors.query, tensors.key, tensors.value),
        gate=join(tensors.gate, tensors.up),
    )


def fused_heads(x, layer, cos, sin, head_dim, epsilon):
    batch, length, _ = x.shape
    normed = torch_network.rms_norm(x, layer.attention_norm, epsilon)
    kv = layer.key.kernel.shape[0] // head_dim
    heads = torch_network.project(normed, layer.query)
    heads = heads.view(batch, length, -1, head_dim)
    query, key, value = heads.split([heads.shape[2] - 2 * kv, kv, kv], dim=2)
    rotate = torch_network.rotate
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def fused_finish(x, context, layer, epsilon):
    project = torch_network.project
    x = x + project(context.flatten(2), layer.output)
    normed = torch_network.rms_norm(x, layer.feedforward_norm, epsilon)
    gate, up = project(normed, layer.gate).chunk(2, dim=-1)
    return x + project(torch.nn.functional.silu(gate) * up, layer.down)


def decode(lm, sizes, variant, batch, rounds=2):
    """Measures the first call and the time per step; returns the tokens."""
    inputs = prompts(sizes, batch, PROMPT)
    first, tokens = timed(lambda: generate(lm, inputs, NEW))
    times = []
    for _ in range(rounds):
        long, _ = timed(lambda: generate(lm, inputs, NEW))
        short, _ = timed(lambda: generate(lm, inputs, SHORT))
        times.append((long - short) / (NEW - SHORT))
    step = min(times)
    bytes_read = 2 * models.multiplied(sizes)
    say(
        f"{variant:9} batch {batch:2}: first call {first:6.2f} s, "
        f"{1e3 * step:7.3f} ms per step, {batch / step:8.1f} tokens/s, weights at "
        f"{bytes_read / step / 1e9:.0f} GB/s"
    )
    if HAS_GPU:
        say(f"   peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return tokens


def compare(name, tokens, expected):
    length = min(tokens.shape[1], expected.shape[1])
    same = tokens[:, :length] == expected[:, :length]
    first = [int(row.argmin()) if not row.all() else length for row in same]
    say(f"{name}: equal up to token {[n - PROMPT for n in first]} of {length - PROMPT}")


def profile(name, run, per):
    """Prints the kernels by time; `per` divides times and counts."""
    run()
    if not HAS_GPU:
        return
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        seconds, _ = timed(run)
    kernels = [
        (event.self_device_time_total, event.count, event.key)
        for event in recorded.key_averages()
        if event.self_device_time_total > 0
    ]
    total = sum(kernel[0] for kernel in kernels)
    say(
        f"profile of {name}: {1e3 * seconds / per:.3f} ms wall, kernels "
        f"{total / 1e3 / per:.3f} ms, {sum(k[1] for k in kernels) / per:.0f} launches"
    )
    for duration, count, key in sorted(kernels, reverse=True)[:25]:
        print(
            f"    {duration / per:9.1f} us {count / per:7.1f} x "
            f"{duration / count:8.2f} us  {key[:110]}",
            flush=True,
        )


def measure_prefill(lm, sizes):
    length = sizes["max_sequence_length"] - 1
    inputs = prompts(sizes, 1, length)
    for number in range(4):
        seconds, _ = timed(lambda: generate(lm, inputs, 1))
        say(f"prompt of {length}, one new, call {number}: {1e3 * seconds:.1f} ms")
    decoder = lm.make_generate_function()._free_decoders[-1]

    @torch.no_grad()
    def prefill():
        decoder.prefill(length - 1)

    for _ in range(2):
        wait()
        start = time.perf_counter()
        prefill()
        launched = time.perf_counter() - start
        wait()
        seconds = time.perf_counter() - start
        say(
            f"   of these the prefill: {1e3 * seconds:.1f} ms, its kernels launched "
            f"after {1e3 * launched:.1f} ms"
        )
    profile("prefill", prefill, 1)


def check_float32():
    torch.backends.cuda.matmul.allow_tf32 = False
    lm, sizes = make("open_llama_3b_v2", "float32", num_layers=3)
    ids = prompts(sizes, 3, PROMPT)
    ids["padding_mask"] = (np.arange(PROMPT)[None] < [[PROMPT], [9], [40]]).astype(int)
    found = {}
    for variant in ("eager", "captured", "triton", "joined", "gemv"):
        use(lm, variant)
        _, found[variant] = timed(lambda: generate(lm, ids, 60))
        equal = np.array_equal(found["eager"], found[variant])
        say(f"float32, ragged prompts: {variant} equals eager: {equal}")


def all_3b(sections):
    lm, sizes = make("open_llama_3b_v2")
    tokens = {}

    def variant(name, batches, rounds=2):
        def run():
            use(lm, name)
            for batch in batches:
                tokens[name, batch] = decode(lm, sizes, name, batch, rounds)
                if name != "captured" and ("captured", batch) in tokens:
                    expected = tokens["captured", batch]
                    compare(f"{name}, captured", tokens[name, batch][:4], expected[:4])

        return run

    def profile_decoding(name, batch):
        def run():
            use(lm, name)
            inputs = prompts(sizes, batch, PROMPT)
            profile(
                f"{name} decoding, batch {batch}, 32 steps with prefill",
                lambda: generate(lm, inputs, SHORT),
                SHORT,
            )

        return run

    def eager():
        use(lm, "eager")
        inputs = prompts(sizes, 1, PROMPT)
        for _ in range(2):
            seconds, found = timed(lambda: generate(lm, inputs, SHORT))
            say(f"eager     batch  1: {1e3 * seconds / SHORT:.2f} ms per step")
        compare("captured, eager", tokens["captured", 1][:, : PROMPT + SHORT], found)

    batches = (1, 8, 64) if HAS_GPU else (1, 3)
    last = batches[-1]
    sections("captured", variant("captured", batches))
    sections("prefill", lambda: measure_prefill(lm, sizes))
    for name in ("triton", "joined"):
        sections(name, variant(name, batches))
    sections("gemv", variant("gemv", (1,)))
    sections("profile gemv 1", profile_decoding("gemv", 1))
    sections("profile joined 64", profile_decoding("joined", last))
    sections("eager", eager)
    sections("7B", lambda: all_7b(sections))
    if HAS_GPU:
        with torch.no_grad():
            sections("sweep of gemv", lambda: sweep_gemv(lm))
    sections("compiled", variant("compiled", (1, last)))
    sections("profile compiled 1", profile_decoding("compiled", 1))
    sections("profile compiled 64", profile_decoding("compiled", last))
    sections("profile captured", profile_decoding("captured", 1))
    sections("fused", variant("fused", (1,)))
    sections("tuned", variant("tuned", (1,)))
    sections("profile tuned", profile_decoding("tuned", 1))


def all_7b(sections):
    lm, sizes = make("open_llama_7b_v2")
    for name in ("captured", "gemv"):

        def run(name=name):
            use(lm, name)
            decode(lm, sizes, name, 1, rounds=1)

        sections(f"7B {name}", run)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=100)
    options = parser.parse_args()
    left = START + 1.2 * options.seconds - time.perf_counter()
    timer = threading.Timer(left, lambda: (say("time"), os._exit(3)))
    timer.daemon = True
    timer.start()

    def sections(name, run):
        if time.perf_counter() - START > options.seconds:
            say(f"{name}: skipped, the time is over")
            return
        try:
            run()
        except Exception:
            say(f"{name} FAILED")
            traceback.print_exc(file=sys.stdout)

    say(f"torch {torch.__version__}, {DEVICE}")
    sections("float32", check_float32)
    sections("3B", lambda: all_3b(sections))
    say("end")


if __name__ == "__main__":
    main()
