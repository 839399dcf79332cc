"""The contenders of `benchmarks/generate.py`, each in a process of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import memory_rate  # benchmarks/memory_rate.py
import numpy as np
from random_llama import loading_arguments  # benchmarks/random_llama.py

INT8_CACHE = "+int8_cache"  # Suffix of a contender.


def weights_dtype(contender):
    """The dtype in the name of a contender."""
    return contender.rpartition("/")[2].removesuffix(INT8_CACHE)


def is_ours(contender):
    """Whether a contender is this package."""
    return contender.partition("/")[0] in ("jax", "torch", "tensorflow")


# ----- In the process of a contender


def load_ours(checkpoint, dtype):
    """Returns a function of token ids and the number of new tokens; this package."""
    from keras_openllama import OpenLlamaCausalLM

    options = loading_arguments(dtype.removesuffix(INT8_CACHE))
    lm = OpenLlamaCausalLM.from_preset(checkpoint, preprocessor=None, **options)
    if dtype.endswith(INT8_CACHE):
        lm.compile(kv_cache_dtype="int8")

    def generate(ids, new):
        mask = np.ones_like(ids)
        inputs = {"token_ids": ids, "padding_mask": mask}
        outputs = lm.generate(
            inputs, max_new_tokens=new, stop_token_ids=None, strip_prompt=True
        )
        return outputs["token_ids"][:, :new]

    return generate


def load_keras_hub(checkpoint, dtype):
    """The same for KerasHub."""
    import keras
    import keras_hub

    backbone = keras_hub.models.LlamaBackbone.from_preset(checkpoint, dtype=dtype)
    lm = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    lm.compile(sampler="greedy")

    def generate(ids, new):
        length = ids.shape[1] + new
        padded = np.zeros((len(ids), length), "int32")
        padded[:, : ids.shape[1]] = ids
        mask = np.arange(length)[None] < np.full((len(ids), 1), ids.shape[1])
        outputs = lm.generate(
            {"token_ids": padded, "padding_mask": mask}, stop_token_ids=None
        )
        return keras.ops.convert_to_numpy(outputs["token_ids"])[:, ids.shape[1] :]

    return generate


def load_transformers(checkpoint, dtype):
    """The same for transformers."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    lm = transformers.LlamaForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype)
    ).eval()
    lm.generation_config.eos_token_id = None

    def generate(ids, new):
        ids = torch.tensor(ids, dtype=torch.long)
        outputs = lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
        return outputs[:, ids.shape[1] :].numpy()

    return generate


def load_llama_cpp(checkpoint, dtype):
    """The same for llama.cpp, by its C interface, which decodes several sequences."""
    import llama_cpp

    from keras_openllama import convert

    path = Path(checkpoint).parent / f"{dtype}.gguf"
    if not path.exists():
        convert.convert(
            checkpoint, path, to="gguf", quantization=dtype, tokenizer=False
        )
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    threads = len(os.sched_getaffinity(0))

    def feed(context, tokens, position):
        """Feeds tokens `(sequences, length)`; returns the next token of each."""
        batch = llama_cpp.llama_batch_init(tokens.size, 0, 1)
        batch.n_tokens = tokens.size
        length = tokens.shape[1]
        for i, token in enumerate(tokens.reshape(-1).tolist()):
            batch.token[i], batch.pos[i] = token, position + i % length
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i // length
            batch.logits[i] = i % length == length - 1
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        ends = range(length - 1, tokens.size, length)
        rows = [llama_cpp.llama_get_logits_ith(context, i) for i in ends]
        llama_cpp.llama_batch_free(batch)
        logits = [np.ctypeslib.as_array(row, (vocabulary,)) for row in rows]
        return np.array([row.argmax() for row in logits], "int32")

    def generate(ids, new):
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max = len(ids)
        options.n_ctx = len(ids) * (ids.shape[1] + new)
        options.n_batch = max(ids.size, 512)
        options.n_threads = options.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, options)
        found = [feed(context, ids, 0)]
        while len(found) < new:
            position = ids.shape[1] + len(found) - 1
            found.append(feed(context, found[-1][:, None], position))
        llama_cpp.llama_free(context)
        return np.stack(found, axis=1)

    generate.uses = model, quiet  # They live as long as the function.
    return generate


def work(contender, checkpoint, sizes):
    """Runs a worker: answers each request, a line of JSON on standard input."""
    # Output of libraries must not mix with the answers.
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    kind, _, variant = contender.rpartition(":")
    backend, _, dtype = variant.partition("/")
    if backend == "transformers":
        generate = load_transformers(checkpoint, dtype)
    elif backend == "llama.cpp":
        generate = load_llama_cpp(checkpoint, dtype)
    else:
        load = load_keras_hub if kind else load_ours
        generate = load(checkpoint, dtype)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request == "limit":
            answer = memory_rate.bandwidth(backend, weights_dtype(contender), *sizes)
        else:
            batch, prompt, new, vocabulary = request
            random = np.random.default_rng(1)
            ids = random.integers(3, vocabulary, (batch, prompt)).astype("int32")
            start = time.perf_counter()
            tokens = generate(ids, new)
            seconds = time.perf_counter() - start
            answer = {"seconds": seconds, "tokens": np.asarray(tokens).tolist()}
        print(json.dumps(answer), file=answers, flush=True)


# ----- In the process that measures


class Contender:
    """A process that answers requests, one at a time."""

    def __init__(self, name, checkpoint, options, cache):
        self.name = name
        variant = name.rpartition(":")[2]
        backend = variant.partition("/")[0]
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend
            if backend in ("jax", "torch", "tensorflow")
            else "torch",
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        command = [sys.executable, __file__, name, str(checkpoint)]
        command += [str(options.width), str(options.intermediate)]
        self.process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
        )
        self._answer()

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} failed; --verbose shows why")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], tuple(map(int, sys.argv[3:])))
