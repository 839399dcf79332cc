"""Measures what quantized weights cost in quality, beside the types of llama.cpp.

    python examples/fetch_corpus.py
    python benchmarks/quantization.py
    python benchmarks/quantization.py --cache
    python benchmarks/quantization.py --generation

Rounds the matrices of a model by each scheme, and computes in float32 with the rounded
weights. Prints for each scheme

- the bits per weight of the projections, scales included;
- the perplexity of the texts, and its ratio to that of the float32 weights, less one;
- the mean KL divergence of the next-token distribution from that of float32.

Q8_0 and Q4_0 are rounded by the `gguf` package, as llama.cpp does. Every scheme of
4 bits has token embedding and head in 8 bits, except those with "all": llama.cpp's Q4_0
of these models has 4 bits there, too, unless told otherwise.

GPTQ is calibrated on the texts that `open_llama_nano` was trained on, of which none is
in the held-out texts: 128 sequences of 256 tokens, evenly spaced.

`--cache` measures a KV cache of 8 bits instead, beside one in float32: the bytes of
each, and the same figures. The tokens are fed through the cache, as in generation.

`--generation` measures what `generate` computes on this CPU, with the products and the
attention that it uses: these round activations to 8 bits, and the cache to 16 or 8.
"""

import argparse
import functools
import json
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import gguf
import numpy as np
from keras import ops
from keras.quantizers import GPTQConfig

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.backend.jit import compile_function
from keras_openllama.backend.keras_private import (
    embeddings_variable,
    flatten_layers,
    kernel_variable,
)
from keras_openllama.generation.kv_cache import (
    PromptLayout,
    forward_with_cache,
    init_cache,
    padded_cache_length,
)
from keras_openllama.generation.onnx_runtime.decoder import OnnxCache
from keras_openllama.generation.onnx_runtime.token_loop import OnnxTokenLoop
from keras_openllama.layers.embedding import Embedding
from keras_openllama.layers.quantizable import QuantizableLayer
from keras_openllama.quantization import quantize_matrix

CORPUS = Path("~/.cache/keras_openllama/corpus").expanduser()
WINDOW = 256
CHUNK = 64  # Tokens that are fed to the cache at once.
BATCH = 16


def ours(bits, group_size, symmetric=True):
    def quantize(weights):
        matrix = quantize_matrix(weights, bits, group_size, symmetric)
        return matrix.dequantize(), 8 * matrix.nbytes / weights.size

    return quantize


def of_gguf(name):
    kind = gguf.GGMLQuantizationType[name]

    def quantize(weights):
        data = gguf.quantize(weights, kind)
        return gguf.dequantize(data, kind), 8 * data.nbytes / weights.size

    return quantize


def keep(weights):
    return weights, 32.0


INT8 = ours(8, None)
# Name -> how projections, and how embedding and head are rounded.
SCHEMES = {
    "float32": (keep, keep),
    "int8, per output": (INT8, INT8),
    "int8, groups of 128": (ours(8, 128), ours(8, 128)),
    "int8, groups of 32": (ours(8, 32), ours(8, 32)),
    "Q8_0": (of_gguf("Q8_0"), of_gguf("Q8_0")),
    "int4, groups of 32": (ours(4, 32), INT8),
    "int4, groups of 32, zero points": (ours(4, 32, False), INT8),
    "int4, groups of 64": (ours(4, 64), INT8),
    "int4, groups of 64, zero points": (ours(4, 64, False), INT8),
    "int4, groups of 128": (ours(4, 128), INT8),
    "int4, groups of 128, zero points": (ours(4, 128, False), INT8),
    "Q4_0, 8 bits in embedding and head": (of_gguf("Q4_0"), INT8),
    "int4, groups of 32, all": (ours(4, 32), ours(4, 32)),
    "Q4_0, all": (of_gguf("Q4_0"), of_gguf("Q4_0")),
}
# Name -> options of GPTQ.
CALIBRATED = {
    f"{name}, GPTQ{', activation order' if order else ''}": {
        "group_size": group_size,
        "symmetric": "zero points" not in name,
        "activation_order": order,
    }
    for name, group_size in (
        ("int4, groups of 32", 32),
        ("int4, groups of 32, zero points", 32),
        ("int4, groups of 128", 128),
        ("int4, groups of 128, zero points", 128),
    )
    for order in (False, True)
}


def main():
    options = parse_options()
    lm = OpenLlamaCausalLM.from_preset(options.preset, dtype="float32")
    windows = tokenize(lm, options.texts, options.windows)
    if options.cache:
        measure_caches(lm, windows, options.preset)
        return
    if options.generation:
        measure_generation(lm, windows, options.preset)
        return
    layers = [la for la in flatten_layers(lm) if isinstance(la, QuantizableLayer)]
    original = [ops.convert_to_numpy(variable(la).value).copy() for la in layers]
    reference = list(log_probabilities(lm.score, windows))
    float_loss, _ = compare(reference, reference, windows)

    def report(name, model, bits):
        found = log_probabilities(model.score, windows)
        loss, divergence = compare(found, reference, windows)
        ratio = np.exp(loss - float_loss) - 1
        print(
            f"| {name} | {bits:.2f} | {np.exp(loss):.3f} | {100 * ratio:+.3f} % "
            f"| {divergence:.5f} |",
            flush=True,
        )

    print(f"{windows.size} tokens in windows of {WINDOW}, {options.preset}")
    print("| weights | bits | perplexity | ratio - 1 | KL divergence, nats |")
    print("|---|---|---|---|---|")
    for name, scheme in SCHEMES.items():
        if options.only in name:
            report(name, lm, round_weights(layers, original, scheme))
    texts = calibration_texts(options.calibration)
    for name, arguments in CALIBRATED.items():
        if options.only in name:
            report(name, *calibrate(options.preset, texts, arguments))


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="open_llama_nano", help="(%(default)s)")
    parser.add_argument(
        "--texts", type=Path, default=CORPUS / "heldout", help="directory of .txt"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        default=CORPUS / "train",
        help='directory of .jsonl with "text" in each line',
    )
    parser.add_argument("--only", default="", help="only schemes with this in the name")
    parser.add_argument(
        "--windows", type=int, default=192, help="windows of tokens (%(default)s)"
    )
    parser.add_argument("--cache", action="store_true", help="measure the KV cache")
    parser.add_argument(
        "--generation", action="store_true", help="measure what `generate` computes"
    )
    return parser.parse_args()


def variable(layer):
    embedding = isinstance(layer, Embedding)
    return embeddings_variable(layer) if embedding else kernel_variable(layer)


def tokenize(lm, directory, count):
    """Windows that start with `<s>`, evenly from each text."""
    tokenizer = lm.preprocessor.tokenizer
    files = sorted(directory.glob("*.txt"))
    if not files:
        raise SystemExit(f"There is no .txt in {directory}: see --help.")
    windows = []
    for file in files:
        ids = list(map(int, tokenizer(file.read_text("utf-8"))))
        parts = [ids[i : i + WINDOW - 1] for i in range(0, len(ids), WINDOW - 1)]
        whole = [part for part in parts if len(part) == WINDOW - 1]
        windows += whole[: count // len(files)]
    return np.array([[tokenizer.start_token_id, *part] for part in windows], "int32")


def round_weights(layers, original, scheme):
    """Assigns rounded weights. Returns the bits per weight of the projections."""
    sizes = []
    for layer, weights in zip(layers, original, strict=True):
        is_projection = layer.quantization_role == "projection"
        rounded, bits = scheme[0 if is_projection else 1](weights)
        variable(layer).assign(rounded)
        if is_projection:
            sizes.append((bits, weights.size))
    bits, counts = np.array(sizes).T
    return (bits * counts).sum() / counts.sum()


def measure_caches(lm, windows, preset):
    """Prints the table of `--cache`."""
    reference = None
    print(f"{windows.size} tokens in windows of {WINDOW}, {preset}")
    print("| cache | bytes per token | perplexity | ratio - 1 | KL divergence, nats |")
    print("|---|---|---|---|---|")
    for dtype in (None, "int8"):
        cache = init_cache(lm.backbone, 1, WINDOW, dtype)
        size = sum(ops.convert_to_numpy(x).nbytes for layer in cache for x in layer)
        score = functools.partial(score_through_cache, lm, cache_program(lm), dtype)
        found = list(log_probabilities(score, windows))
        reference = reference or found
        loss, divergence = compare(found, reference, windows)
        if dtype is None:
            float_loss = loss
        print(
            f"| {dtype or 'float32'} | {size // WINDOW} | {np.exp(loss):.4f} "
            f"| {100 * (np.exp(loss - float_loss) - 1):+.4f} % | {divergence:.6f} |",
            flush=True,
        )


def cache_program(lm):
    """Compiles a function that feeds tokens and returns their logits and the cache."""

    def feed(tokens, prompt_layout, cache, column):
        inputs = tokens, prompt_layout, cache, column
        hidden, cache = forward_with_cache(lm.backbone, *inputs)
        return lm.lm_head(hidden), cache

    return compile_function(feed, lm)


def score_through_cache(lm, program, dtype, windows):
    """Logits as of `lm.score`, with all keys and values read from the cache."""
    batch, length = windows.shape
    lengths = np.full(batch, length, "int32")
    prompt_layout = PromptLayout(lengths, np.int32(length), lengths, lengths)
    cache = init_cache(lm.backbone, batch, padded_cache_length(length), dtype)
    logits = []
    for column in range(0, length, CHUNK):
        chunk, cache = program(
            tokens=windows[:, column : column + CHUNK],
            prompt_layout=prompt_layout,
            cache=cache,
            column=np.int32(column),
        )
        logits.append(chunk)
    return ops.concatenate(logits, axis=1)


def measure_generation(lm, windows, preset):
    """Prints the table of `--generation`."""
    reference = list(log_probabilities(lm.score, windows))
    float_loss, _ = compare(reference, reference, windows)
    print(
        f"{windows.size} tokens in windows of {WINDOW}, {preset}, float32 "
        f"{np.exp(float_loss):.3f}"
    )
    print("| weights | cache | perplexity | ratio - 1 | KL divergence, nats |")
    print("|---|---|---|---|---|")
    for weights in ("bfloat16", "int8", "int4"):
        for kv_cache_dtype in (None, "int8"):
            is_float = weights == "bfloat16"
            model = OpenLlamaCausalLM.from_preset(
                preset, dtype="bfloat16" if is_float else "float32"
            )
            if not is_float:
                model.quantize(weights)
            model.compile(kv_cache_dtype=kv_cache_dtype)
            loop = model.make_generate_function()
            if not isinstance(loop, OnnxTokenLoop):
                raise SystemExit(
                    f"{weights} with cache {kv_cache_dtype} has no compiled attention "
                    "here: see docs/quantization.md."
                )
            decoder = loop.decoder()
            score = functools.partial(score_in_generation, decoder)
            found = log_probabilities(score, windows)
            loss, divergence = compare(found, reference, windows)
            print(
                f"| {weights} | {decoder.cache_dtype} | {np.exp(loss):.3f} "
                f"| {100 * (np.exp(loss - float_loss) - 1):+.3f} % "
                f"| {divergence:.5f} |",
                flush=True,
            )


def score_in_generation(decoder, windows):
    """Logits as of `lm.score`, by the decoder of `generate`."""
    cache = OnnxCache(decoder, 1, windows.shape[1])
    number = windows.shape[1]
    return np.stack([cache.feed(0, row, 0, num_logits=number) for row in windows])


def calibration_texts(directory):
    lines = [
        line
        for file in sorted(directory.glob("*.jsonl"))
        for line in file.read_text("utf-8").splitlines()
    ]
    return [json.loads(line)["text"] for line in lines]


def calibrate(preset, texts, arguments):
    """Returns a model by GPTQ, and the bits per weight of its projections."""
    lm = OpenLlamaCausalLM.from_preset(preset, dtype="float32")
    tokenizer = lm.preprocessor.tokenizer
    lm.quantize(
        config=GPTQConfig(
            texts, tokenizer, num_samples=128, sequence_length=WINDOW, **arguments
        )
    )
    matrices = [
        layer.quantized_matrix()
        for layer in flatten_layers(lm.backbone)
        if getattr(layer, "quantization_role", None) == "projection"
    ]
    size = sum(np.prod(matrix.shape) for matrix in matrices)
    return lm, 8 * sum(matrix.nbytes for matrix in matrices) / size


def log_probabilities(score, windows):
    for start in range(0, len(windows), BATCH):
        logits = ops.convert_to_numpy(score(windows[start : start + BATCH]))
        shifted = logits - logits.max(axis=-1, keepdims=True)
        yield shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(found, reference, windows):
    """Mean loss of the tokens, and mean KL divergence from the reference."""
    losses, divergences = [], []
    for batch, (log_p, log_q) in enumerate(zip(reference, found, strict=True)):
        ids = windows[batch * BATCH : (batch + 1) * BATCH, 1:]
        losses.append(-np.take_along_axis(log_q[:, :-1], ids[..., None], -1))
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1)[:, :-1])
    return (float(np.concatenate(x).mean()) for x in (losses, divergences))


if __name__ == "__main__":
    main()
