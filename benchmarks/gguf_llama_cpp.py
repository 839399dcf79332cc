"""Compares llama.cpp with this package on GGUF files that this package writes.

    pip install --target DIR llama-cpp-python        # compiles llama.cpp: 20 minutes
    PYTHONPATH=DIR python benchmarks/gguf_llama_cpp.py

Writes models in each type of GGUF: the preset, and random ones with heads of 100,
grouped heads and scaled RoPE. llama.cpp and this package load each file. Compared are

- the token ids of texts with odd characters;
- the logits of a text of 60 tokens, as the largest difference relative to the largest
  logit, and the mean KL divergence of the next-token distributions;
- 32 tokens of greedy decoding: how many of them are the same before the first that
  differs.

llama.cpp computes quantized products in its own way: it rounds the activations to
float16 for F16, to bfloat16 for BF16, and to 8 bits for the quantized types, and this
package does not. (Its KV cache is float32 here.) So logits are equal up to float32's
rounding for F32 only, and the other limits below are wider. The program fails if a
limit is exceeded.
"""

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM
from keras_openllama.checkpoints.formats import GGUF_QUANTIZATIONS

TEXTS = (
    "The sea was calm, and the ship lay still upon it.",
    " a  b\n\n\tc   ",
    "naïve café, 日本語, 🙂\u200d, e\u0301, </s> and <s>",
    "def f(x):\n    return  x ** 2  # 12345",
    "",
)
PASSAGE = (
    "And it came to pass in those days that there went out a man of the hill country "
    "toward the sea, and he took with him bread and water and his two sons."
)
NEW_TOKENS = 32
# The largest relative difference of logits, and the largest mean KL divergence.
LIMITS = {"f32": (1e-5, 1e-10), "f16": (5e-3, 1e-5), "bf16": (4e-2, 1e-3)}
QUANTIZED_LIMITS = (0.1, 5e-3)
# Changes of the preset's architecture for random models.
RANDOM = {
    "head_dim 100": {"num_query_heads": 4, "hidden_dim": 320, "head_dim": 100},
    "grouped heads": {"num_query_heads": 8, "num_key_value_heads": 2},
    "scaled RoPE": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_max_wavelength": 500000.0,
        "layer_norm_epsilon": 1e-5,
    },
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="open_llama_nano", help="(%(default)s)")
    parser.add_argument(
        "--quantization", nargs="+", choices=GGUF_QUANTIZATIONS, help="(all)"
    )
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    options = parser.parse_args()
    try:
        import llama_cpp  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error}. Install llama.cpp:\n{__doc__.split(chr(10) * 2)[1]}")
    warnings.filterwarnings("ignore", "Blocks of .* do not divide the rows")
    preset = OpenLlamaCausalLM.from_preset(options.preset)
    models = {options.preset: preset}
    for name, changes in RANDOM.items():
        models[name] = random_model(preset, changes)
    print("model            type  ids   logits   KL        greedy")
    passed = True
    with tempfile.TemporaryDirectory() as directory:
        for name, lm in models.items():
            for quantization in options.quantization or GGUF_QUANTIZATIONS:
                path = Path(directory, f"{quantization}.gguf")
                lm.export_to_gguf(path, quantization, force=True)
                passed &= compare(name, quantization, path, options.threads)
    if not passed:
        sys.exit("A limit was exceeded.")


def random_model(preset, changes):
    """Returns a model of two layers with random weights and the preset's tokenizer."""
    arguments = {**preset.backbone.architecture(), "num_layers": 2, "head_dim": None}
    # Large enough that the next token is a clear choice.
    arguments |= {"initializer_std": 0.08, "num_key_value_heads": None, **changes}
    return OpenLlamaCausalLM(OpenLlamaBackbone(**arguments), preset.preprocessor)


def compare(name, quantization, path, threads):
    """Compares both programs on a file, and prints the result.

    Returns:
        Whether all limits hold.
    """
    from llama_cpp import GGML_TYPE_F32, Llama

    ours = OpenLlamaCausalLM.from_preset(path, dtype="float32", quantization=None)
    theirs = Llama(
        str(path),
        n_ctx=256,
        n_threads=threads,
        logits_all=True,
        verbose=False,
        type_k=GGML_TYPE_F32,  # The KV cache, which is float16 by default.
        type_v=GGML_TYPE_F32,
    )
    tokenizer = ours.preprocessor.tokenizer
    same_ids = all(
        theirs.tokenize(text.encode(), add_bos=True, special=False)
        == tokenizer(text, add_bos=True)
        for text in TEXTS
    )
    ids = tokenizer(PASSAGE, add_bos=True)
    theirs.eval(ids)
    expected = np.array(theirs.scores[: len(ids)])
    found = logits(ours, ids)
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    divergence = mean_divergence(expected, found)
    greedy = same_greedy_tokens(ours, theirs, ids[:16])
    largest = LIMITS.get(quantization, QUANTIZED_LIMITS)
    exact = quantization != "f32" or greedy == NEW_TOKENS
    passed = (
        same_ids and difference <= largest[0] and divergence <= largest[1] and exact
    )
    print(
        f"{name:16} {quantization:5} {'same' if same_ids else 'DIFFER':5} "
        f"{difference:.1e}  {divergence:.1e}   {greedy} of {NEW_TOKENS}"
        f"{'' if passed else '   FAILED'}",
        flush=True,
    )
    return passed


def logits(lm, ids):
    """Returns the logits after each token, of shape `(len(ids), vocabulary)`."""
    inputs = {
        "token_ids": np.array([ids], "int32"),
        "padding_mask": np.ones((1, len(ids)), bool),
    }
    return np.asarray(lm.predict_on_batch(inputs), "float32")[0]


def mean_divergence(expected, found):
    """Returns the mean KL divergence of two sets of distributions, given logits."""
    first, second = log_softmax(expected), log_softmax(found)
    return (np.exp(first) * (first - second)).sum(axis=-1).mean()


def log_softmax(values):
    values = np.asarray(values, "float64")
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def same_greedy_tokens(ours, theirs, prompt):
    """Returns the number of greedy tokens before the first that differs."""
    theirs.reset()
    expected = []
    for token in theirs.generate(prompt, temp=0.0, repeat_penalty=1.0):
        expected.append(token)
        if len(expected) == NEW_TOKENS:
            break
    # Ours are the same up to the first position where the most likely token differs.
    found = logits(ours, [*prompt, *expected])[len(prompt) - 1 : -1].argmax(axis=-1)
    different = np.flatnonzero(found != expected)
    return int(different[0]) if len(different) else NEW_TOKENS


if __name__ == "__main__":
    main()
