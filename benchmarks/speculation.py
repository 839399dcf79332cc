"""Speed of speculative decoding, and where it pays.

    python benchmarks/speculation.py
    python benchmarks/speculation.py --contender jax/bfloat16 torch/bfloat16 --new 128

Each contender is a backend and a dtype, or bits of quantized weights, in a process of
its own. Two models generate one sequence, with and without a draft:

    random     268 million random parameters (`--help` lists the sizes). The draft is
               the continuation itself, in which a part of the tokens is replaced: its
               accuracy is known, and it costs nothing. 0 % is text that a draft does
               not predict at all.
    nano       open_llama_nano with prompt lookup: greedy decoding, which repeats
               phrases ("greedy"), and sampled text ("sampled")

    tokens/s   new tokens divided by the time of the call, the best of the rounds
    speed-up   that divided by the tokens/s without a draft
    accepted   part of the proposed tokens that were accepted
    per step   new tokens for each time that the model ran
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time

import numpy as np
from random_llama import loading_arguments  # benchmarks/random_llama.py

import train  # benchmarks/train.py

CONTENDERS = (
    *("jax/float32", "jax/bfloat16", "torch/float32", "torch/bfloat16"),
    *("tensorflow/float32", "jax/int8", "jax/int4"),
)
ACCURACIES = (0.0, 0.5, 0.8, 0.95, 1.0)
PROMPT = "It was a dark night"


class KnownText:
    """A draft that knows the text, but replaces a part of its tokens."""

    def __init__(self, ids, accuracy, max_tokens):
        from keras_openllama import PromptLookup

        self.max_tokens, self.stats = max_tokens, PromptLookup().stats
        wrong = np.random.default_rng(0).random(len(ids)) >= accuracy
        self._ids = np.where(wrong, (np.array(ids) + 1) % 1000, ids).tolist()

    def check(self, model):
        pass

    def proposals(self, options):
        position, (new_ids, number) = 0, (yield [])
        while True:
            position += len(new_ids)
            new_ids, number = yield self._ids[position : position + number]


def best_rates(contenders, new, rounds):
    """Runs functions in alternation; returns tokens/s of the fastest run of each."""
    for run in contenders:  # Compiles.
        run()
    times = [[] for _ in contenders]
    for _ in range(rounds):
        for run, measured in zip(contenders, times, strict=True):
            start = time.perf_counter()
            run()
            measured.append(time.perf_counter() - start)
    return [new / min(measured) for measured in times]


def print_rows(title, names, rates, drafts):
    print(f"{title:26} {'tokens/s':>9} {'speed-up':>9} {'accepted':>9} {'per step':>9}")
    print(f"{'  without a draft':26} {rates[0]:9.1f}")
    for name, rate, draft in zip(names, rates[1:], drafts, strict=True):
        stats = draft.stats
        print(
            f"  {name:24} {rate:9.1f} {rate / rates[0]:8.2f}x "
            f"{stats.acceptance_rate:9.0%} {stats.tokens_per_step:9.2f}"
        )


def measure_random(dtype, options):
    import keras

    from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM

    keras.utils.set_random_seed(0)
    is_quantized = dtype.startswith("int")
    backbone = OpenLlamaBackbone(
        **train.keras_sizes(options), dtype="bfloat16" if is_quantized else dtype
    )
    lm = OpenLlamaCausalLM(backbone)
    if is_quantized:
        lm.quantize(dtype)
    prompt = np.random.default_rng(0).integers(3, options.vocabulary, (1, 64))
    inputs = {"token_ids": prompt, "padding_mask": np.ones_like(prompt)}

    def run(draft=None):
        return lm.generate(
            inputs,
            max_new_tokens=options.new,
            stop_token_ids=None,
            strip_prompt=True,
            draft=draft,
        )

    ids = run()["token_ids"][0][: options.new].tolist()
    drafts = [KnownText(ids, accuracy, 15) for accuracy in ACCURACIES]
    runs = [run, *(lambda draft=draft: run(draft) for draft in drafts)]
    rates = best_rates(runs, options.new, options.rounds)
    names = [f"accuracy {accuracy:.0%}" for accuracy in ACCURACIES]
    print_rows(f"random {options.contender[0]}", names, rates, drafts)


def measure_nano(dtype, options):
    from keras_openllama import OpenLlamaCausalLM, PromptLookup, SamplingConfig

    lm = OpenLlamaCausalLM.from_preset("open_llama_nano", **loading_arguments(dtype))
    arguments = dict(max_new_tokens=options.new, stop_token_ids=None)
    sampled = SamplingConfig(top_p=0.95, seed=1)
    for title, sampling in (("greedy", None), ("sampled", sampled)):
        draft = PromptLookup()
        run = functools.partial(lm.generate, PROMPT, sampling=sampling, **arguments)
        runs = [run, functools.partial(run, draft=draft)]
        rates = best_rates(runs, options.new, options.rounds)
        title = f"nano {title} {options.contender[0]}"
        print_rows(title, ["prompt lookup"], rates, [draft])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contender", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--new", type=int, default=96, help="new tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    for name, value in (("vocabulary", 32_000), ("layers", 16), ("heads", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--model", choices=("random", "nano"), nargs="+", default=None)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = options.model or ["random", "nano"]
    if options.worker:
        options = argparse.Namespace(**json.loads(options.worker))
        dtype = options.contender[0].partition("/")[2]
        {"random": measure_random, "nano": measure_nano}[options.model](dtype, options)
        return
    for contender in options.contender:
        for model in models:
            work = vars(options) | {"contender": [contender], "model": model}
            subprocess.run(
                [sys.executable, __file__, "--worker", json.dumps(work)],
                env=os.environ | {"KERAS_BACKEND": contender.partition("/")[0]},
                check=True,
            )


if __name__ == "__main__":
    main()
