"""Speed of continuous batching, compared with `generate`.

    python benchmarks/serve.py
    python benchmarks/serve.py --model jax/int4 --clients 1 4 16

One random model is written in transformers' format, and loaded in a process for each
backend and dtype. Clients send a request, wait for its last token, and send the next
one. The figures:

    generate   tokens/s of `generate` for one prompt
    clients    tokens/s of the engine, all clients together
    first      seconds to the first token of a long prompt: alone, and while 8 other
               requests run; and the largest gap between two tokens of these
    turn       seconds to the first token of the second turn of a long chat, without
               and with the prompt cache
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import random_llama  # benchmarks/random_llama.py

MODELS = "jax/float32", "jax/int4", "torch/float32"
STREAMS = 8  # Requests that run while the time to the first token is measured.


class Client:
    """Sends requests to an engine and measures the times of their tokens."""

    def __init__(self, engine, seed):
        self.engine, self.random = engine, np.random.default_rng(seed)
        self.times = []

    def prompt(self, length):
        """Random token ids."""
        return self.random.integers(3, 30000, length).tolist()

    def send(self, prompt, new):
        """Sends a request without waiting; returns its handle."""
        from keras_openllama import SamplingConfig
        from keras_openllama.generation.continuous_batching.engine import EngineRequest

        request = EngineRequest(prompt, new, SamplingConfig(temperature=0))
        self.times = [time.monotonic()]
        return self.engine.submit(
            request, lambda event: self.times.append(time.monotonic())
        )

    def complete(self, prompt, new):
        """Sends a request and waits; returns its handle."""
        handle = self.send(prompt, new)
        handle.finished.wait()
        return handle

    @property
    def seconds_to_first(self):
        return self.times[1] - self.times[0]

    @property
    def gaps(self):
        return np.diff(self.times[1:])


def work(checkpoint, dtype, options):
    """Measures one model; returns the figures."""
    from keras_openllama import OpenLlamaCausalLM
    from keras_openllama.generation.continuous_batching.engine import Engine

    arguments = random_llama.loading_arguments(dtype)
    lm = OpenLlamaCausalLM.from_preset(checkpoint, preprocessor=None, **arguments)
    new, length = options["new"], options["prompt"]
    results = {}

    with Engine(lm, num_slots=16, context=options["context"]) as engine:
        for clients in (1, 2, 4, 8, 16):  # Compiles all programs.
            many_clients(engine, clients, length, new=3)
        Client(engine, 9).complete(Client(engine, 0).prompt(300), 2)
        results["generate"] = plain_generate(lm, length, new)
        for clients in options["clients"]:
            results[f"clients_{clients}"] = many_clients(engine, clients, length, new)
        results["generate_again"] = plain_generate(lm, length, new)
        results |= first_token(engine, options["long"])
        results |= second_turn(engine, options["chat"])
    return results


def plain_generate(lm, length, new):
    """Tokens/s of `generate`."""
    ids = np.random.default_rng(1).integers(3, 30000, (1, length))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    lm.generate(inputs, max_new_tokens=new, stop_token_ids=None)
    begin = time.monotonic()
    lm.generate(inputs, max_new_tokens=new, stop_token_ids=None)
    return new / (time.monotonic() - begin)


def many_clients(engine, number, length, new):
    """Tokens/s of some clients with one request each."""
    clients = [Client(engine, seed) for seed in range(number)]
    threads = [
        threading.Thread(target=c.complete, args=(c.prompt(length), new))
        for c in clients
    ]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return number * new / (time.monotonic() - begin)


def first_token(engine, length):
    """Seconds to the first token of a long prompt, alone and beside other requests."""
    client = Client(engine, 100)
    alone = []
    for _ in range(2):
        client.complete(client.prompt(length), 1)
        alone.append(client.seconds_to_first)
    streams = [Client(engine, seed) for seed in range(STREAMS)]
    handles = [c.send(c.prompt(16), 400) for c in streams]
    while min(len(c.times) for c in streams) < 3:
        time.sleep(0.01)
    beside = []
    for _ in range(2):
        client.complete(client.prompt(length), 1)
        beside.append(client.seconds_to_first)
    gaps = np.concatenate([c.gaps for c in streams])
    for handle in handles:
        handle.cancel()
    for handle in handles:
        handle.finished.wait()
    return {
        "first_alone": min(alone),
        "first_beside": statistics.mean(beside),
        "largest_gap": float(gaps.max()),
        "median_gap": float(np.median(gaps)),
    }


def second_turn(engine, length):
    """Seconds to the first token of a chat's second turn, without and with cache."""
    client = Client(engine, 200)
    chat = client.prompt(length)
    without = Client(engine, 201)
    without.complete(without.prompt(length + 36), 1)
    first = client.complete(chat, 16)
    turn = chat + first.new_tokens + client.prompt(20)
    handle = client.complete(turn, 1)
    return {
        "turn_without": without.seconds_to_first,
        "turn_with": client.seconds_to_first,
        "turn_cached_tokens": handle.cached_tokens,
    }


def add_request_options(parser):
    """Adds the sizes of the model and of the requests to a parser."""
    add = parser.add_argument
    random_llama.add_size_options(parser)
    add("--prompt", type=int, default=64, help="tokens of a prompt (%(default)s)")
    add("--new", type=int, default=64, help="tokens to generate (%(default)s)")
    add("--long", type=int, default=512, help="tokens of a long prompt (%(default)s)")
    add("--clients", type=int, nargs="+", default=[1, 4, 16], help="(1, 4 and 16)")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_request_options(parser)
    add("--chat", type=int, default=1500, help="tokens of a chat (%(default)s)")
    add("--model", nargs="+", default=MODELS, metavar="BACKEND/DTYPE",
        help=f"default: {' '.join(MODELS)}")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args()

    results = {}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory, "model")
        sizes = random_llama.sizes_of(options)
        random_llama.write_checkpoint(checkpoint, sizes, "float32")
        for model in options.model:
            settings = {k: v for k, v in vars(options).items() if k != "json"}
            output = subprocess.run(
                [sys.executable, __file__, "--worker", checkpoint, model,
                 json.dumps(settings)],
                env=os.environ | {"KERAS_BACKEND": model.partition("/")[0]},
                stdout=subprocess.PIPE, check=True, text=True,
            ).stdout  # fmt: skip
            results[model] = json.loads(output.splitlines()[-1])
            print(model)
            for name, value in results[model].items():
                print(f"  {name:20}{value:10.3f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _, _, checkpoint, model, settings = sys.argv
        figures = work(checkpoint, model.partition("/")[2], json.loads(settings))
        print(json.dumps(figures))
    else:
        main()
