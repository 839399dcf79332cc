"""LLaMA in EasyLM's conventions, straight from a file: the reference for conversions.

Kernels are `(inputs, outputs)`; a rotary angle turns two numbers that stand side by
side, as one complex number. In float64, so that only the conversion can differ.
Source: https://github.com/young-geng/EasyLM, `EasyLM/models/llama/llama_model.py`.
"""

import flax.serialization
import msgpack
import numpy as np


def read_stream(path, prefix=()):
    """The arrays of a streaming checkpoint, by key without the prefix."""
    arrays = {}
    with open(path, "rb") as file:
        for key, value in msgpack.Unpacker(file, max_buffer_size=0):
            if tuple(key[: len(prefix)]) == prefix:
                arrays["/".join(key[len(prefix) :])] = flax.serialization.from_bytes(
                    None, value
                )
    return arrays


def logits(arrays, token_ids, heads, key_value_heads, theta=10000.0, epsilon=1e-6):
    """Returns the logits `(length, vocabulary)` of one sequence of token ids."""
    weights = {name: array.astype(np.float64) for name, array in arrays.items()}
    layers = 1 + max(int(n.split("/")[2]) for n in weights if "/h/" in n)
    x = weights["transformer/wte/embedding"][token_ids]
    for i in range(layers):
        layer = {
            name.removeprefix(f"transformer/h/{i}/"): array
            for name, array in weights.items()
            if name.startswith(f"transformer/h/{i}/")
        }
        normed = _norm(x, layer["attention_norm/kernel"], epsilon)
        x = x + _attention(normed, layer, heads, key_value_heads, theta)
        normed = _norm(x, layer["ffn_norm/kernel"], epsilon)
        gate = normed @ layer["feed_forward/w1/kernel"]
        up = normed @ layer["feed_forward/w3/kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["feed_forward/w2/kernel"]
    x = _norm(x, weights["transformer/ln_f/kernel"], epsilon)
    return x @ weights["lm_head/kernel"]


def _norm(x, scale, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def _attention(x, layer, heads, key_value_heads, theta):
    length = len(x)
    query, key, value = (
        (x @ layer[f"attention/{name}/kernel"]).reshape(length, count, -1)
        for name, count in (
            ("wq", heads),
            ("wk", key_value_heads),
            ("wv", key_value_heads),
        )
    )
    query, key = _rotate(query, theta), _rotate(key, theta)
    key, value = (np.repeat(t, heads // key_value_heads, axis=1) for t in (key, value))
    scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, value).reshape(length, -1)
    return mixed @ layer["attention/wo/kernel"]


def _rotate(x, theta):
    head_dim = x.shape[-1]
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.outer(np.arange(len(x)), frequencies)
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    rotated = pairs * np.exp(1j * angles)[:, None]
    return np.stack([rotated.real, rotated.imag], -1).reshape(x.shape)
