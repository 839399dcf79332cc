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
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import random_llama  # benchmarks/random_llama.py

import train  # benchmarks/train.py

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
QUANTIZED = ("int8", "int4")
INT8_CACHE = "+int8_cache"  # Suffix of a contender.
# The types of llama.cpp that ours are compared with.
LLAMA_CPP_TYPES = {"bfloat16": "f16", "int8": "q8_0", "int4": "q4_0"}
LIMIT_BYTES = 400e6  # Matrices for the limit: larger than any CPU cache.


def sizes_of(options):
    """Arguments of `OpenLlamaBackbone`."""
    return {
        **train.keras_sizes(options),
        "num_key_value_heads": options.key_value_heads,
        "max_sequence_length": options.context,
    }


# ----- The contenders, each in its own process


def load_ours(checkpoint, dtype):
    """Returns a function of token ids and the number of new tokens; this package."""
    from keras_openllama import OpenLlamaCausalLM

    int8_cache, dtype = dtype.endswith(INT8_CACHE), dtype.removesuffix(INT8_CACHE)
    options = {"dtype": dtype}
    if dtype in QUANTIZED:
        options = {"dtype": "bfloat16", "quantization": dtype}
    lm = OpenLlamaCausalLM.from_preset(checkpoint, preprocessor=None, **options)
    if int8_cache:
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


def jax_products(dtype, k, n, count):
    """Yields functions that multiply `count` matrices by a vector of size `k`; JAX."""
    import jax
    import jax.numpy as jnp

    def product(x, w):
        return jax.lax.dot_general(x, w, (((1,), (w.shape.index(k),)), ((), ())))

    def two_rows(x, w):  # The only fast form in bfloat16.
        x = jax.lax.optimization_barrier(jnp.concatenate([x, x]))
        dimensions = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(w, x, dimensions, preferred_element_type="float32")
        return jax.lax.optimization_barrier(y)

    x = jnp.ones((1, k), dtype)
    for shape in ((k, n), (n, k)):
        matrices = [jnp.full(shape, i, dtype) for i in range(count)]
        for form in (product, two_rows) if shape == (n, k) else (product,):
            run = jax.jit(lambda x, ws, form=form: [form(x, w) for w in ws])
            yield lambda f=run, ws=matrices: jax.block_until_ready(f(x, ws))


def tensorflow_products(dtype, k, n, count):
    """The same on TensorFlow, with and without XLA."""
    import tensorflow as tf

    x = tf.ones((1, k), dtype)
    for transposed in (False, True):
        shape = (n, k) if transposed else (k, n)
        matrices = [tf.Variable(tf.ones(shape, dtype)) for _ in range(count)]
        for jit in (False, True):
            run = tf.function(
                lambda ws=matrices, t=transposed: [
                    tf.matmul(x, w, transpose_b=t) for w in ws
                ],
                jit_compile=jit,
            )
            yield lambda f=run: f()[-1].numpy()


def torch_products(dtype, k, n, count):
    """The same on PyTorch: plain, transposed, blocks of outputs, oneDNN's layout."""
    import torch

    x = torch.ones((1, k), dtype=getattr(torch, dtype))
    for transposed in (False, True):
        shape = (n, k) if transposed else (k, n)
        matrices = [torch.ones(shape, dtype=x.dtype) for _ in range(count)]
        matrices = [w.T if transposed else w for w in matrices]
        yield lambda ws=matrices: [x @ w for w in ws]
        if transposed and n % 64 == 0:
            blocks = [w.T.view(-1, 64, k).transpose(1, 2) for w in matrices]
            yield lambda ws=blocks: [x @ w for w in ws]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pack = torch.ops.mkldnn._reorder_linear_weight
        product = torch.ops.mkldnn._linear_pointwise
        matrices = [pack(torch.ones((n, k), dtype=x.dtype)) for _ in range(count)]
        yield lambda ws=matrices: [product(x, w, None, "none", [], "") for w in ws]


def weights_dtype(contender):
    """The dtype in the name of a contender."""
    return contender.rpartition("/")[2].removesuffix(INT8_CACHE)


def bytes_per_weight(dtype):
    """Bytes of a weight in a contender's products; scales are included."""
    return {
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "int8": 1 + 2 / 32,
        "int4": 0.5 + 2 / 32,
    }[dtype]


def bandwidth(backend, dtype, width, ff):
    """The best rate of matrix-vector products in any memory layout, in bytes/s."""
    if dtype in QUANTIZED:  # The rate of the memory.
        dtypes = ("float32", "bfloat16")
        return max(bandwidth(backend, dtype, width, ff) for dtype in dtypes)
    size = bytes_per_weight(dtype)
    count = int(LIMIT_BYTES / (width * ff * size))
    products = {"jax": jax_products, "torch": torch_products}
    products = products.get(backend, tensorflow_products)
    best = 0.0
    for k, n in ((width, ff), (ff, width)):
        for run in products(dtype, k, n, count):
            run()
            times = []
            for _ in range(5):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            best = max(best, count * k * n * size / statistics.median(times))
    return best


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
            answer = bandwidth(backend, weights_dtype(contender), *sizes)
        else:
            batch, prompt, new, vocabulary = request
            random = np.random.default_rng(1)
            ids = random.integers(3, vocabulary, (batch, prompt)).astype("int32")
            start = time.perf_counter()
            tokens = generate(ids, new)
            seconds = time.perf_counter() - start
            answer = {"seconds": seconds, "tokens": np.asarray(tokens).tolist()}
        print(json.dumps(answer), file=answers, flush=True)


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
        command = [sys.executable, __file__, "--worker", name, str(checkpoint)]
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


def is_ours(contender):
    """Whether a contender is this package."""
    return contender.partition("/")[0] in ("jax", "torch", "tensorflow")


def measure(options, directory):
    """Measures all contenders. Returns a dict for each contender and batch size."""
    checkpoint = directory / "model"
    weights = random_llama.write_checkpoint(checkpoint, sizes_of(options), "float32")
    cache = directory / "compiled"
    request = [options.batch[0], options.prompt, options.new, options.vocabulary]
    contenders, first, second = [], {}, {}
    for name in options.contender:
        print(f"starting {name}", file=sys.stderr, flush=True)
        try:
            contender = Contender(name, checkpoint, options, cache)
            first[name] = contender.ask(request)["seconds"]
            if name.startswith("jax"):
                contender.close()
                contender = Contender(name, checkpoint, options, cache)
                second[name] = contender.ask(request)["seconds"]
        except RuntimeError as error:
            if is_ours(name):
                raise
            # The others may not be installed.
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            continue
        contenders.append(contender)
    results = []
    for batch in options.batch:
        times = {c.name: ([], []) for c in contenders}
        limits = {c.name: [] for c in contenders}
        tokens = {}
        for round_number in range(options.rounds + 1):
            print(f"batch {batch}, round {round_number}", file=sys.stderr, flush=True)
            for c in contenders:
                for new, seconds in zip((1, options.new), times[c.name], strict=True):
                    request = [batch, options.prompt, new, options.vocabulary]
                    answer = c.ask(request)
                    tokens[c.name] = answer["tokens"]
                    if round_number:  # The first one compiles.
                        seconds.append(answer["seconds"])
                if is_ours(c.name) and round_number:
                    limits[c.name].append(c.ask("limit"))
        for c in contenders:
            prefill, total = map(statistics.median, times[c.name])
            dtype = weights_dtype(c.name)
            decode = batch * (options.new - 1) / max(total - prefill, 1e-9)
            result = {
                "contender": c.name,
                "batch": batch,
                "prompt": options.prompt,
                "new": options.new,
                "tokens_per_second": batch * options.new / total,
                "prefill_seconds": prefill,
                "decode_tokens_per_second": decode,
                "first_seconds": first[c.name],
                "first_seconds_next_process": second.get(c.name),
                "tokens": tokens[c.name],
            }
            if limits[c.name]:
                rate = statistics.median(limits[c.name])
                result["limit_gigabytes_per_second"] = rate / 1e9
                result["limit_tokens_per_second"] = (
                    batch * rate / (weights * bytes_per_weight(dtype))
                )
            results.append(result)
    for contender in contenders:
        contender.close()
    return results


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
    options.key_value_heads = options.key_value_heads or options.heads

    with tempfile.TemporaryDirectory() as directory:
        results = measure(options, Path(directory))
    print("\n".join(table(results)))
    if options.json:
        sizes = {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(
            json.dumps({"options": sizes, "results": results}, indent=1)
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], tuple(map(int, sys.argv[4:])))
    else:
        main()
