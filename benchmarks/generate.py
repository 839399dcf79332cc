"""Speed of generation, compared with KerasHub, transformers, llama.cpp and the memory.

    python benchmarks/generate.py
    python benchmarks/generate.py --prompt 1800 --context 2048 --batch 1
    python benchmarks/generate.py --contender torch/bfloat16 transformers/bfloat16
    python benchmarks/generate.py --contender jax/int4 llama.cpp/q4_0
    python benchmarks/generate.py --prompt 1800 --contender jax/float32 \
        jax/float32+int8_cache

llama.cpp needs `pip install llama-cpp-python`, which compiles it for this processor in
about ten minutes. It reads the same weights from GGUF files that this package writes.

One random model is written in transformers' format, and every contender loads it in
its own process: this package on the backends of Keras, KerasHub's `LlamaCausalLM` on
the same backends, transformers on PyTorch, and llama.cpp. They generate greedily from
the same prompts. Rounds alternate between the contenders; the figures are medians of
the rounds. With `+int8_cache`, this package has a KV cache of 8 bits.

    tokens/s   batch size times new tokens, divided by the time of the call
    prefill    milliseconds to the first token: a call for one token
    decode     batch size times tokens per second after the first token
    limit      decoding reads all weights once per step; the limit is the best rate at
               which this backend multiplies matrices of this dtype and size by a
               vector (for quantized weights: of bfloat16 or float32), measured between
               the rounds
    of limit   decode divided by the limit
    first      seconds of the first call in a new process, including compilation; in
               parentheses in the next process, with JAX's compilation cache

`--help` lists the sizes; the defaults are those of `benchmarks/README.md`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import random_llama  # benchmarks/random_llama.py
from generate_contenders import (  # benchmarks/generate_contenders.py
    Contender,
    is_ours,
    weights_dtype,
)
from memory_rate import bytes_per_weight  # benchmarks/memory_rate.py

CONTENDERS = (
    "jax/float32",
    "jax/bfloat16",
    "torch/float32",
    "torch/bfloat16",
    "tensorflow/float32",
    "keras_hub:jax/float32",
    "keras_hub:torch/bfloat16",
    "keras_hub:tensorflow/float32",
    "transformers/float32",
    "transformers/bfloat16",
    "jax/int8",
    "jax/int4",
    "torch/int8",
    "torch/int4",
    "llama.cpp/f16",
    "llama.cpp/q8_0",
    "llama.cpp/q4_0",
)
# The types of llama.cpp that ours are compared with.
LLAMA_CPP_TYPES = {"bfloat16": "f16", "int8": "q8_0", "int4": "q4_0"}


def measure(options, directory):
    """Measures all contenders. Returns a dict for each contender and batch size."""
    checkpoint = directory / "model"
    sizes = random_llama.sizes_of(options)
    weights = random_llama.write_checkpoint(checkpoint, sizes, "float32")
    contenders = start_contenders(options, checkpoint, directory / "compiled")
    results = []
    for batch in options.batch:
        for contender, figures in measure_batch(contenders, batch, options).items():
            results.append(
                {
                    "contender": contender.name,
                    "batch": batch,
                    "prompt": options.prompt,
                    "new": options.new,
                    **contenders[contender],
                    **summary(contender.name, batch, options.new, weights, **figures),
                }
            )
    for contender in contenders:
        contender.close()
    return results


def start_contenders(options, checkpoint, cache):
    """Starts those that are installed; returns the times of their first calls."""
    request = [options.batch[0], options.prompt, options.new, options.vocabulary]
    started = {}
    for name in options.contender:
        print(f"starting {name}", file=sys.stderr, flush=True)
        second = None
        try:
            contender = Contender(name, checkpoint, options, cache)
            first = contender.ask(request)["seconds"]
            if name.startswith("jax"):
                contender.close()
                contender = Contender(name, checkpoint, options, cache)
                second = contender.ask(request)["seconds"]
        except RuntimeError as error:
            if is_ours(name):
                raise
            # The others may not be installed.
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            continue
        started[contender] = {
            "first_seconds": first,
            "first_seconds_next_process": second,
        }
    return started


def measure_batch(contenders, batch, options):
    """Measures one batch size in rounds; returns a dict for each contender."""
    figures = {
        contender: {"prefills": [], "totals": [], "limits": [], "tokens": None}
        for contender in contenders
    }
    for round_number in range(options.rounds + 1):
        print(f"batch {batch}, round {round_number}", file=sys.stderr, flush=True)
        for contender, found in figures.items():
            for new, seconds in ((1, "prefills"), (options.new, "totals")):
                request = [batch, options.prompt, new, options.vocabulary]
                answer = contender.ask(request)
                found["tokens"] = answer["tokens"]
                if round_number:  # The first one compiles.
                    found[seconds].append(answer["seconds"])
            if is_ours(contender.name) and round_number:
                found["limits"].append(contender.ask("limit"))
    return figures


def summary(name, batch, new, weights, prefills, totals, limits, tokens):
    """The medians of the rounds; `weights` is the number that a step reads."""
    prefill, total = statistics.median(prefills), statistics.median(totals)
    result = {
        "tokens_per_second": batch * new / total,
        "prefill_seconds": prefill,
        "decode_tokens_per_second": batch * (new - 1) / max(total - prefill, 1e-9),
        "tokens": tokens,
    }
    if limits:
        rate = statistics.median(limits)
        step = weights * bytes_per_weight(weights_dtype(name))
        result["limit_gigabytes_per_second"] = rate / 1e9
        result["limit_tokens_per_second"] = batch * rate / step
    return result


def table(results):
    """The results as lines of text."""
    header = f"{'':30}{'tokens/s':>9}{'prefill':>9}{'decode':>8}{'limit':>7}"
    lines = []
    for batch in dict.fromkeys(r["batch"] for r in results):
        rows = [r for r in results if r["batch"] == batch]
        r = rows[0]
        lines += [
            "",
            f"batch {batch}, prompt {r['prompt']}, {r['new']} new tokens, greedy",
            f"{header}{'of limit':>9}{'first':>14}",
        ]
        for r in rows:
            limit, share = "", ""
            if "limit_tokens_per_second" in r:
                limit = f"{r['limit_tokens_per_second']:.0f}"
                of_limit = r["decode_tokens_per_second"] / r["limit_tokens_per_second"]
                share = f"{of_limit:.0%}"
            first = f"{r['first_seconds']:.1f}"
            if r["first_seconds_next_process"] is not None:
                first += f" ({r['first_seconds_next_process']:.1f})"
            lines.append(
                f"{r['contender']:30}{r['tokens_per_second']:9.1f}"
                f"{1e3 * r['prefill_seconds']:9.0f}"
                f"{r['decode_tokens_per_second']:8.1f}{limit:>7}{share:>9}{first:>14}"
            )
        lines += ratios(rows)
    return lines


def ratios(rows):
    """Lines that compare ours with each peer, for one batch size."""
    lines = []
    ours = {r["contender"]: r for r in rows if is_ours(r["contender"])}
    for name, r in ours.items():
        dtype = weights_dtype(name)
        for peer in rows:
            if peer["contender"] not in (
                f"keras_hub:{name}",
                f"transformers/{dtype}",
                f"llama.cpp/{LLAMA_CPP_TYPES.get(dtype)}",
            ):
                continue
            speedup = r["tokens_per_second"] / peer["tokens_per_second"]
            prefill = peer["prefill_seconds"] / r["prefill_seconds"]
            lines.append(
                f"  {name} is {speedup:.2f} x {peer['contender']}, "
                f"its prefill {prefill:.2f} x"
            )
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    random_llama.add_size_options(parser)
    add("--prompt", type=int, default=64, help="tokens of a prompt (%(default)s)")
    add("--new", type=int, default=128, help="tokens to generate (%(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (1 and 8)")
    add("--rounds", type=int, default=3, help="timed rounds (%(default)s)")
    add("--contender", nargs="+", default=CONTENDERS, metavar="NAME",
        help="[keras_hub:]BACKEND/DTYPE or transformers/DTYPE; default: "
        + " ".join(CONTENDERS))  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    add("--verbose", action="store_true", help="show what the processes print")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        results = measure(options, Path(directory))
    print("\n".join(table(results)))
    if options.json:
        sizes = {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(
            json.dumps({"options": sizes, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
