"""Memory of quantized models that generate on a CPU.

    python benchmarks/memory.py                       # 268 million parameters
    python benchmarks/memory.py --contender torch/int4 \
        --width 3200 --layers 26 --heads 32 --intermediate 8640     # 3B: 7 GB of disk

Writes a random bfloat16 checkpoint into a temporary directory. For each contender, a
new process loads it with `from_preset(..., quantization=...)` and generates twice, 128
tokens after a prompt of 64. Anonymous memory, which no file backs, is what the system
cannot free. It is sampled every 5 ms, and reported beyond that of the interpreter after
imports.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import random_llama  # benchmarks/random_llama.py
from load import anonymous_memory  # benchmarks/load.py

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("jax/int8", "jax/int4", "torch/int8", "torch/int4")
PROMPT, NEW_TOKENS = 64, 128


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contender", nargs="+", default=CONTENDERS)
    parser.add_argument("--checkpoint", type=Path, help="directory to use, or to write")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    random_llama.add_size_options(parser)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.checkpoint, options.measure)))
        return
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = options.checkpoint or Path(directory, "model")
        if not checkpoint.exists():
            sizes = random_llama.sizes_of(options)
            random_llama.write_checkpoint(checkpoint, sizes, "bfloat16")
        titles = ("weights", "loaded", "peak", "generated", "peak", "tokens/s")
        print(f"{'MB':14}{''.join(f'{title:>10}' for title in titles)}")
        for contender in options.contender:
            report(contender, checkpoint)


def report(contender, checkpoint):
    backend, quantization = contender.split("/")
    command = [sys.executable, __file__, "--measure", quantization]
    output = subprocess.run(
        [*command, "--checkpoint", checkpoint],
        env=os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.PIPE,
    )
    *sizes, speed = json.loads(output.stdout)
    columns = "".join(f"{size / 1e6:10,.0f}" for size in sizes)
    print(f"{contender:14}{columns}{speed:10.1f}", flush=True)


def measure(checkpoint, quantization):
    """Measures in this process; see the module's documentation.

    Returns:
        Bytes of the weights, of anonymous memory when they are loaded and at most until
        then, when it has generated and at most until then; and tokens/s of the second
        call.
    """
    import keras
    import onnxruntime  # noqa: F401 - The memory of imports is not that of the model.

    from keras_openllama import OpenLlamaCausalLM

    keras.ops.zeros(())
    peak = Peak()
    lm = OpenLlamaCausalLM.from_preset(
        checkpoint, dtype="bfloat16", quantization=quantization, preprocessor=None
    )
    loaded = peak.now_and_at_most()
    lm.compile(sampler="greedy")
    ids = np.random.default_rng(0).integers(3, 1000, (1, PROMPT))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    for _ in range(2):
        start = time.perf_counter()
        lm.generate(inputs, max_new_tokens=NEW_TOKENS, stop_token_ids=None)
        seconds = time.perf_counter() - start
    generated = peak.now_and_at_most()
    sizes = {"bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}
    weights = sum(sizes[w.dtype] * int(np.prod(w.shape)) for w in lm.weights)
    return weights, *loaded, *generated, NEW_TOKENS / seconds


class Peak:
    """Samples the anonymous memory of this process, beyond what it has now."""

    def __init__(self):
        self._start = self._peak = anonymous_memory()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self):
        while True:
            self._peak = max(self._peak, anonymous_memory())
            time.sleep(0.005)

    def now_and_at_most(self):
        """The memory now, and the most since the last call."""
        now, peak = anonymous_memory(), self._peak
        self._peak = now
        return now - self._start, max(now, peak) - self._start


if __name__ == "__main__":
    main()
