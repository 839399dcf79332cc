"""Speed of the server over HTTP, compared with transformers serve and llama.cpp.

    python benchmarks/serve_http.py
    python benchmarks/serve_http.py --contender jax/float32 transformers --clients 16
    python benchmarks/serve_http.py --contender jax/float32 --first-token --json FILE
    python benchmarks/serve_http.py --table --json FILE

One random model is written in transformers' format and as GGUF files, and each
contender serves it in a process of its own:

    generate:BACKEND/DTYPE   `generate` for one prompt after the other
    engine:BACKEND/DTYPE     the engine of the server, without HTTP
    BACKEND/DTYPE            `keras-openllama serve`
    transformers             `transformers serve --continuous-batching`, float32
    llama-server/TYPE        llama.cpp's server, with a GGUF file of this type
    llama-cpp-python/TYPE    `python -m llama_cpp.server`, one request at a time

Clients send a prompt, wait for the last token of the stream, and send the next one,
until the time is up. The figures, medians of the rounds in `--json`:

    tokens/s   of all clients together
    first      seconds from a request to its first token
    gap        milliseconds between two tokens of a stream, 99th percentile
    512 tokens seconds to the first token of a long prompt, alone and while 8 other
               streams run
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import random_llama  # benchmarks/random_llama.py
import serve as engine_benchmark  # benchmarks/serve.py
from http_figures import (  # benchmarks/http_figures.py
    add_results,
    figures,
    print_table,
)
from http_servers import (  # benchmarks/http_servers.py
    SLOTS,
    Prompts,
    missing,
    prepare,
    running_server,
)

CONTENDERS = (
    "generate:jax/float32",
    "engine:jax/float32",
    "jax/float32",
    "torch/float32",
    "transformers",
    "llama-server/f32",
    "llama-cpp-python/f32",
    "generate:jax/int4",
    "jax/int4",
    "llama-server/q4_0",
    "llama-cpp-python/q4_0",
)
STREAMS = 8  # Streams that run while the time to the first token is measured.


# ----- Clients


class Stream:
    """A request and the times of its tokens.

    Attributes:
        times: when it was sent, and when each piece of text came.
        text: the text.
    """

    def __init__(self):
        self.times, self.text = [], ""

    async def send(self, client, url, prompt, new):
        body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
        self.times.append(time.monotonic())
        async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "choices" not in event:
                    raise RuntimeError(f"The server sent {line}")
                text = "".join(choice["text"] or "" for choice in event["choices"])
                if text:
                    self.text += text
                    self.times.append(time.monotonic())
        return self


async def measure_server(url, options):
    """Measures a server; returns the figures."""
    # Some servers close connections between two requests.
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as client:
        text = Prompts(0).make(16)
        results = {"text": (await Stream().send(client, url, text, 16)).text}
        if options.first_token:
            results["first_token"] = await first_token(client, url, options)
        else:
            for number in options.clients:
                results[str(number)] = await many_clients(client, url, number, options)
    return results


async def many_clients(client, url, number, options):
    """Figures of some clients, whose first requests are not counted.

    Those compile programs, and their lengths differ, so that the requests of different
    clients begin at different times.
    """
    prompts = Prompts(number)
    streams, warm = [], []

    async def send_until_end(index):
        first = max(1, options.new * (index + 1) // number)
        await Stream().send(client, url, prompts.make(options.prompt), first)
        warm.append(index)
        while True:
            streams.append(Stream())
            prompt = prompts.make(options.prompt)
            await streams[-1].send(client, url, prompt, options.new)

    tasks = [asyncio.create_task(send_until_end(index)) for index in range(number)]
    while len(warm) < number and not any(task.done() for task in tasks):
        await asyncio.sleep(0.01)
    begin = time.monotonic()
    done, pending = await asyncio.wait(tasks, timeout=options.seconds)
    end = time.monotonic()
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()  # Raises the exception.
    return figures([stream.times for stream in streams], begin, end, options)


async def first_token(client, url, options):
    """Seconds to the first token of a long prompt, alone and beside other streams."""
    prompts = Prompts(100)

    async def measure(number=3):
        streams = [Stream() for _ in range(number)]
        for stream in streams:
            await stream.send(client, url, prompts.make(options.long), 1)
        return [stream.times[1] - stream.times[0] for stream in streams]

    await measure(1)
    alone = await measure()
    streams = [Stream() for _ in range(STREAMS)]
    tasks = [
        asyncio.create_task(stream.send(client, url, prompts.make(16), 1000))
        for stream in streams
    ]
    while min(len(stream.times) for stream in streams) < 3:
        await asyncio.sleep(0.01)
    await measure(1)
    begin = time.monotonic()
    beside = await measure()
    if any(task.done() for task in tasks):
        raise RuntimeError("A stream ended before the end of the measurement.")
    gaps = np.concatenate(
        [np.diff([t for t in stream.times if t > begin]) for stream in streams]
    )
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "alone": statistics.median(alone),
        "beside": statistics.median(beside),
        "largest_gap": float(gaps.max()),
    }


# ----- Without a server, in a process for each contender


def work(kind, dtype, directory, options):
    """Measures `generate` or the engine; returns the figures."""
    from keras_openllama import OpenLlamaCausalLM

    lm = OpenLlamaCausalLM.from_preset(
        directory / "transformers", **random_llama.loading_arguments(dtype)
    )
    prompts = Prompts(1)
    text = lm.generate(Prompts(0).make(16), max_new_tokens=16, strip_prompt=True)
    if kind == "generate":
        return {"text": text, "1": plain_generate(lm, prompts, options)}
    return {"text": text, **engine_figures(lm, prompts, options)}


def plain_generate(lm, prompts, options):
    """Tokens/s of `generate`."""

    def generate():
        prompt = prompts.make(options.prompt)
        lm.generate(prompt, max_new_tokens=options.new, stop_token_ids=None)

    generate()
    begin, number = time.monotonic(), 0
    while time.monotonic() < begin + options.seconds:
        generate()
        number += 1
    seconds = time.monotonic() - begin
    return {"tokens_per_second": number * options.new / seconds}


def engine_figures(lm, prompts, options):
    """Figures of the engine with some numbers of clients."""
    from keras_openllama.generation.continuous_batching.engine import Engine

    results = {}
    with Engine(lm, num_slots=SLOTS, context=options.context) as engine:
        for number in options.clients:
            results[str(number)] = engine_clients(engine, number, options)
    return results


def engine_clients(engine, number, options):
    """Figures of some clients of the engine; see `many_clients`."""
    requests, handles, warm = [], {}, []
    ended = threading.Event()

    def send_until_end(index):
        client = engine_benchmark.Client(engine, 1000 + index)
        first = max(1, options.new * (index + 1) // number)
        client.complete(client.prompt(options.prompt), first)
        warm.append(index)
        while not ended.is_set():
            handles[index] = client.send(client.prompt(options.prompt), options.new)
            requests.append(client.times)
            handles[index].finished.wait()

    threads = [
        threading.Thread(target=send_until_end, args=(index,))
        for index in range(number)
    ]
    for thread in threads:
        thread.start()
    while len(warm) < number:
        time.sleep(0.01)
    begin = time.monotonic()
    time.sleep(options.seconds)
    end = time.monotonic()
    ended.set()
    for handle in list(handles.values()):
        handle.cancel()
    for thread in threads:
        thread.join()
    return figures(requests, begin, end, options)


# ----- All contenders


def measure(contender, directory, options):
    """Measures one contender; returns the figures."""
    kind, _, model = contender.rpartition(":")
    if not kind:
        with running_server(contender, directory, options) as url:
            return asyncio.run(measure_server(url, options))
    settings = {
        name: value
        for name, value in vars(options).items()
        if isinstance(value, int | float | list)
    }
    backend, _, dtype = model.partition("/")
    output = subprocess.run(
        [sys.executable, __file__, "--worker", kind, dtype, directory,
         json.dumps(settings)],
        env=os.environ | {"KERAS_BACKEND": backend},
        stdout=subprocess.PIPE, check=True, text=True,
    ).stdout  # fmt: skip
    return json.loads(output.splitlines()[-1])


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    engine_benchmark.add_request_options(parser)
    add("--seconds", type=float, default=20.0, help="of each figure (%(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="of llama.cpp (all cores)")
    add("--contender", nargs="+", default=CONTENDERS, metavar="NAME",
        help=f"default: {' '.join(CONTENDERS)}")  # fmt: skip
    add("--first-token", action="store_true",
        help="measure the first token of a long prompt, not --clients")  # fmt: skip
    add("--llama-server", default="llama-server", metavar="FILE",
        help="program of llama.cpp's server (%(default)s)")  # fmt: skip
    add("--directory", type=Path, metavar="DIR",
        help="keep the model here for the next run")  # fmt: skip
    add("--json", type=Path, metavar="FILE",
        help="add the figures to those in this file")  # fmt: skip
    add("--table", action="store_true", help="only print the figures in --json")
    return parser.parse_args()


def main():
    options = parse_arguments()
    results = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    with contextlib.ExitStack() as stack:
        contenders = [] if options.table else options.contender
        if contenders:
            temporary = options.directory or stack.enter_context(
                tempfile.TemporaryDirectory()
            )
            directory = Path(temporary)
            prepare(directory, options)
        for contender in contenders:
            install = missing(contender, options)
            if install:
                print(f"{contender} is not installed: {install}", flush=True)
                continue
            found = measure(contender, directory, options)
            print(contender, json.dumps(found, ensure_ascii=False), flush=True)
            add_results(results, contender, found)
            if options.json:
                text = json.dumps(results, indent=1, ensure_ascii=False)
                options.json.write_text(text)
    if results:
        print_table(results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _, _, kind, dtype, directory, settings = sys.argv
        settings = argparse.Namespace(**json.loads(settings))
        print(json.dumps(work(kind, dtype, Path(directory), settings)))
    else:
        main()
