"""The model and the servers of `benchmarks/serve_http.py`."""

import contextlib
import importlib.resources
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import numpy as np
import random_llama  # benchmarks/random_llama.py
import sentencepiece

SLOTS = 16  # Texts that a server computes at once.
GGUF_TYPES = "f32", "q4_0"
START_SECONDS = 120
HOST = "127.0.0.1"
SITE = "pip install --target DIR {}, and set PYTHONPATH=DIR"


# ----- The model and the prompts


def prepare(directory, options):
    """Writes the model, unless it is there."""
    if (directory / "ready").exists():
        return
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from keras_openllama import (
        OpenLlamaCausalLM,
        OpenLlamaCausalLMPreprocessor,
        OpenLlamaTokenizer,
    )

    directory.mkdir(parents=True, exist_ok=True)
    sizes = random_llama.sizes_of(options)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        weights = Path(temporary, "weights")
        random_llama.write_checkpoint(weights, sizes, "float32")
        tokenizer = OpenLlamaTokenizer(tokenizer_model())
        lm = OpenLlamaCausalLM.from_preset(
            weights, preprocessor=OpenLlamaCausalLMPreprocessor(tokenizer)
        )
        lm.export_to_transformers(directory / "transformers")
        for kind in GGUF_TYPES:
            lm.export_to_gguf(directory / f"{kind}.gguf", kind)
    (directory / "ready").touch()


def tokenizer_model():
    """Bytes of a SentencePiece model of 32,000 pieces, of a package for the tests."""
    files = importlib.resources.files("mistral_common")
    return (files / "data" / "tokenizer.model.v1").read_bytes()


class Prompts:
    """Random texts of a given number of tokens, all different."""

    def __init__(self, seed):
        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model())
        pieces = map(processor.id_to_piece, range(processor.get_piece_size()))
        words = [piece[1:] for piece in pieces if re.fullmatch("▁[a-z]+", piece)]
        self._words = [word for word in words if len(processor.encode(word)) == 1]
        self._random = np.random.default_rng(seed)

    def make(self, tokens):
        """A text that has this number of tokens, the start token included."""
        return " ".join(self._random.choice(self._words, tokens - 1))


# ----- Servers


def missing(contender, options):
    """How to install what a contender needs; `None` if it is there."""
    kind = contender.partition("/")[0]
    if kind == "transformers" and not importlib.util.find_spec("fastapi"):
        return SITE.format("fastapi uvicorn")
    if kind == "llama-cpp-python" and not importlib.util.find_spec("llama_cpp"):
        return SITE.format("'llama-cpp-python[server]'")
    if kind == "llama-server" and not shutil.which(options.llama_server):
        return "compile the target `llama-server` of llama.cpp, and set --llama-server"
    return None


def command(contender, directory, port, options):
    """The command of a server, and the path that responds when it is ready."""
    kind, _, dtype = contender.partition("/")
    model = directory / "transformers"
    place = ["--host", HOST, "--port", str(port)]
    if kind == "transformers":
        program = [Path(sys.executable).with_name("transformers"), "serve", model]
        flags = ["--continuous-batching", "--device", "cpu", "--dtype", "float32"]
        return [*program, *flags, *place], "/health"
    gguf = ["--model", directory / f"{dtype}.gguf"]
    threads = str(options.threads)
    context = options.context * SLOTS
    if kind == "llama-server":
        flags = ["--parallel", SLOTS, "--ctx-size", context, "--threads", threads]
        return [options.llama_server, *gguf, *map(str, flags), *place], "/health"
    if kind == "llama-cpp-python":
        program = [sys.executable, "-m", "llama_cpp.server"]
        flags = ["--n_ctx", str(options.context), "--n_threads", threads]
        return [*program, *gguf, *flags, *place], "/v1/models"
    if dtype in random_llama.QUANTIZED:
        flags = ["--quantization", dtype, "--dtype", "bfloat16"]
    else:
        flags = ["--dtype", dtype]
    program = [sys.executable, "-m", "keras_openllama", "serve", "--preset", model]
    limits = ["--slots", str(SLOTS), "--context", str(options.context)]
    flags += ["--backend", kind, "--no-access-log"]
    return [*program, *flags, *limits, *place], "/health"


@contextlib.contextmanager
def running_server(contender, directory, options):
    """Runs a server; yields its address."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    arguments, path = command(contender, directory, port, options)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
        try:
            url = f"http://{HOST}:{port}"
            end = time.monotonic() + START_SECONDS
            while not is_ready(url + path):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    sys.exit(f"{contender} did not start:\n{log.read()[-4000:]}")
                time.sleep(0.1)
            yield url
        finally:
            process.kill()
            process.wait()


def is_ready(url):
    try:
        return httpx2.get(url, timeout=5).status_code == 200
    except httpx2.TransportError:
        return False
