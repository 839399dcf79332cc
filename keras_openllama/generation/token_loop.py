"""The cache of keys and values, and the loop that chooses a token at a time.

A row's prompt without its last token, its prefix, goes into the cache first (prefill).
From then on one token a row is fed and the next one chosen, beginning with the prompt's
last token. All rows share the columns: prefixes fill them from the left (shorter ones
leave a gap, which the mask hides), and the token fed in step `s` goes to column
`start + s` in every row, where `start` is the longest prefix. So a step writes one
slice, whatever the lengths, and a row computes exactly what it computes alone; its
rotary positions are its own.

The cache is a tuple with one pair of tensors per layer, each `(num_key_value_heads *
batch, columns, head_dim)`, updated in place; `layers/cached_attention.py` says why.

With XLA, prefill and decoding are one program for each number of rows and columns, and
both numbers come in few sizes: a prompt of any length takes as many chunks as it needs.
"""

import functools

import keras
import numpy as np
from keras import ops, tree

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.backend.jit import compile_function, while_loop
from keras_openllama.backend.keras_hub import GreedySampler, RandomSampler, TopPSampler
from keras_openllama.generation.sharding import (
    constrain_sharding,
    device_platform,
    sharded_zeros,
    state_shardings,
    to_device,
)
from keras_openllama.layers.cached_attention import MASKED_SCORE
from keras_openllama.text.token_arrays import PAD_TOKEN_ID, pad_sequences

SMALLEST_CACHE = 256  # Ours: below it, memory and time are those of the weights.
STOP_SLOTS = 4  # Ours: stop ids are padded to a multiple, to compile once.


def padded_cache_length(columns):
    """Columns of a compiled program: the next power of two, 256 at least."""
    return max(SMALLEST_CACHE, 1 << (columns - 1).bit_length())


def padded_batch_size(rows):
    """Rows of a compiled program: 1, or the next power of two from 4 on."""
    return 1 if rows == 1 else max(4, 1 << (rows - 1).bit_length())


def prefill_chunks(platform, rows, columns):
    """Sizes of the chunks in which prefixes go into the cache, the largest first.

    On a CPU 256 tokens are near the peak rate of matrix products, and 32 cost about two
    steps of decoding. An accelerator reads the weights in the time in which it computes
    some 256 tokens, whatever rows they are in: less costs as much. More at a time is
    faster, as far as memory for their scores allows.

    Args:
        platform: string, such as `"cpu"`, of the devices that hold the weights.
        rows, columns: int, of the program; powers of two.

    Returns:
        List of int. All but the last are below `columns`, and each divides it.
    """
    if platform == "cpu":
        sizes = {256, 32}
    else:
        sizes = {max(256, min(1024, 8192 // rows)), 256, max(32, 256 // rows)}
    fitting = [size for size in sizes if size < columns]
    return sorted(fitting, reverse=True) or [columns]


def forward_with_cache(backbone, tokens, rows, cache, column):
    """Puts tokens into the cache and computes their hidden states.

    Args:
        backbone: `OpenLlamaBackbone`.
        tokens: int `(batch, length)`, one per row or a chunk of the prefixes.
        rows: dict of `"prefix_lengths"` and `"final_lengths"`, int `(batch,)` or
            `(1,)`, and `"start"`, int scalar; see the top of this file.
        cache: see the top of this file.
        column: int scalar, the column of the first of these tokens.

    Returns:
        Hidden states `(batch, length, hidden_dim)` after the final norm, and the cache.
    """
    seen = used_columns(cache, column + tokens.shape[1])
    positions, bias = positions_and_bias(rows, column, tokens.shape, seen[0][0].shape)
    hidden, seen = run_layers(
        backbone, tokens, positions, rows["final_lengths"], bias, seen, column
    )
    return hidden, cache if keras.config.backend() == "torch" else seen


def used_columns(cache, end):
    """What of the cache is to be read: all with XLA, the first columns on PyTorch."""
    if keras.config.backend() == "torch":
        return tuple(tuple(x[:, : int(end)] for x in pair) for pair in cache)
    return cache


def positions_and_bias(rows, column, shape, cache_shape):
    """Rotary positions of fed tokens, and which columns each of them sees.

    Args:
        rows, column: see `forward_with_cache`.
        shape: `(batch, length)` of the tokens.
        cache_shape: shape of the keys in the cache.

    Returns:
        int `(batch, length)`, and the `bias` of `cached_attention.attend_cached`.
    """
    prefix, start = rows["prefix_lengths"][:, None], rows["start"]
    fed = (column + ops.arange(shape[1], dtype="int32"))[None]
    positions = ops.where(fed < start, fed, prefix + fed - start)
    seen = ops.arange(cache_shape[1], dtype="int32")[None]
    filled = ops.logical_or(seen < prefix, seen >= start)[:, None]
    visible = ops.logical_and(filled, seen[:, None] <= fed[:, :, None])
    bias = ops.where(visible, 0.0, MASKED_SCORE)
    repeats = cache_shape[0] // bias.shape[0]  # Heads, and beams of one row.
    return ops.broadcast_to(positions, shape), ops.tile(bias, (repeats, 1, 1))


def run_layers(backbone, tokens, positions, final_lengths, bias, cache, column):
    """Runs the network over tokens; see `forward_with_cache`."""
    cos, sin = backbone.rotary_embedding(positions, final_lengths)
    x = backbone.token_embedding(tokens)
    init_cache = []
    for layer, key_value in zip(backbone.transformer_layers, cache, strict=True):
        x, key_value = layer(x, cos, sin, bias, cache=key_value, column=column)
        init_cache.append(tuple(key_value))
    return backbone.final_norm(x), tuple(init_cache)


def init_cache(backbone, rows, columns):
    """An empty cache for so many rows and columns."""
    shape = (backbone.num_key_value_heads * rows, columns, backbone.head_dim)
    dtype = backbone.compute_dtype
    if keras.config.backend() == "jax":
        make = functools.partial(sharded_zeros, shape, dtype, backbone)
    else:
        make = functools.partial(ops.zeros, shape, dtype)
    return tuple((make(), make()) for _ in backbone.transformer_layers)


def is_any_of(tokens, stop_ids):
    """Which of `tokens` `(batch,)` are among `stop_ids` `(number,)`."""
    return ops.any(ops.equal(tokens[:, None], stop_ids), axis=-1)


def keeps_every_token(sampler):
    """Whether a top-p sampler keeps all tokens.

    KerasHub's then still leaves out those beyond a sum that rounding takes past 1.
    """
    return type(sampler) is TopPSampler and sampler.k is None and sampler.p >= 1


class TokenLoop:
    """Chooses a token at a time: greedy, random, top-k, top-p and samplers like them.

    `start` puts the prompts on the device; `advance` runs until a given step, or until
    all rows are done. The state is a dict of tensors that stays on the device: `tokens`
    `(batch, columns)`, `prefilled` and `step` (int scalars), `done` `(batch,)`, and
    `cache`.

    Args:
        model: `OpenLlamaCausalLM`.
    """

    def __init__(self, model):
        self.model = model
        self.advance = compile_function(self._advance, model, donate=("state",))

    def start(self, prompts, limits):
        """Returns the state of prompts that nothing was done with, and its constants.

        Args:
            prompts: list of lists of int, none empty.
            limits: list of int, the tokens to add to each row at most.
        """
        longest = max(map(len, prompts))
        columns = padded_cache_length(longest + max(limits))
        filler = padded_batch_size(len(prompts)) - len(prompts)
        tokens, rows = pad_prompts(
            prompts + [[PAD_TOKEN_ID]] * filler, limits + [0] * filler, columns
        )
        state = {
            "tokens": tokens,
            "prefilled": np.int32(0),
            "step": np.int32(0),
            "done": rows["limits"] == 0,
        }
        everywhere = state_shardings(self.model.backbone)[1]
        state, rows = tree.map_structure(
            lambda x: to_device(x, everywhere), (state, rows)
        )
        state["cache"] = init_cache(self.model.backbone, len(rows["limits"]), columns)
        return state, rows

    def _advance(self, state, rows, stop_ids, until):
        state = self._placed(state)
        # Without JAX there is no number that was measured on anything but a CPU.
        on_jax = keras.config.backend() == "jax"
        platform = device_platform(self.model.backbone) if on_jax else "cpu"
        chunks = prefill_chunks(platform, *state["tokens"].shape)
        for chunk in chunks:
            state = self._prefill(state, rows, chunk, is_last=chunk == chunks[-1])

        def goes_on(state):
            return ops.logical_and(
                state["step"] < until, ops.logical_not(ops.all(state["done"]))
            )

        def step(state):
            column = rows["start"] + state["step"]
            fed = ops.take(state["tokens"], column, axis=1)[:, None]
            hidden, cache = forward_with_cache(
                self.model.backbone, fed, rows, state["cache"], column
            )
            logits = self.model.lm_head(hidden)[:, 0]
            return self.sample_next({**state, "cache": cache}, logits, rows, stop_ids)

        return self._placed(while_loop(self.model, goes_on, step, state))

    def _placed(self, state):
        by_heads, everywhere = state_shardings(self.model.backbone)
        rest = {name: value for name, value in state.items() if name != "cache"}
        return {
            **constrain_sharding(rest, everywhere),
            "cache": constrain_sharding(state["cache"], by_heads),
        }

    def _prefill(self, state, rows, chunk, is_last):
        """Feeds the prefixes in chunks; the last size may go beyond their end."""
        backbone, overshoot = self.model.backbone, 0 if is_last else chunk - 1

        def goes_on(state):
            return state["prefilled"] + overshoot < rows["start"]

        def feed_chunk(state):
            column = state["prefilled"]
            shape = (state["tokens"].shape[0], chunk)
            tokens = ops.slice(state["tokens"], (0, column), shape)
            _, cache = forward_with_cache(
                backbone, tokens, rows, state["cache"], column
            )
            return {**state, "cache": cache, "prefilled": column + chunk}

        return while_loop(self.model, goes_on, feed_chunk, state)

    def sample_next(self, state, logits, rows, stop_ids):
        """Takes the next token of each row from its logits `(batch, vocabulary)`."""
        sampler, logits = self.model.sampler, ops.cast(logits, "float32")
        if type(sampler) is GreedySampler:
            chosen = ops.argmax(logits, axis=-1)
        else:
            probabilities = sampler.compute_probabilities(logits)
            if keeps_every_token(sampler):
                chosen = RandomSampler.get_next_token(sampler, probabilities)
            else:
                chosen = sampler.get_next_token(probabilities)
        chosen = ops.where(state["done"], PAD_TOKEN_ID, ops.cast(chosen, "int32"))
        step = state["step"] + 1
        done = ops.logical_or(is_any_of(chosen, stop_ids), step >= rows["limits"])
        return {
            **state,
            "tokens": ops.slice_update(
                state["tokens"],
                (0, rows["start"] + step),
                ops.cast(chosen, "int32")[:, None],
            ),
            "step": step,
            "done": ops.logical_or(state["done"], done),
        }


def pad_prompts(prompts, limits, columns):
    """Prompts as an array `(batch, columns)`, and their lengths.

    The last token of each row stands in the first column after the longest prefix.
    """
    lengths = np.array([len(prompt) for prompt in prompts], "int32")
    limits = np.array(limits, "int32")
    start = lengths.max() - 1
    tokens = pad_sequences([prompt[:-1] for prompt in prompts], columns)["token_ids"]
    tokens[:, start] = [prompt[-1] for prompt in prompts]
    rows = {
        "prefix_lengths": lengths - 1,
        "final_lengths": lengths + limits,
        "limits": limits,
        "start": start,
    }
    return tokens, rows


def sample_tokens(loop, prompts, limits, stop_token_ids, stride=None):
    """Runs a `TokenLoop`; see `generate.generate_tokens`."""
    state, rows = loop.start(prompts, limits)
    slots = max(1, -(-len(stop_token_ids) // STOP_SLOTS)) * STOP_SLOTS
    stop_ids = np.full(slots, -1, "int32")  # No token is -1.
    stop_ids[: len(stop_token_ids)] = stop_token_ids
    stop_ids = to_device(stop_ids, state_shardings(loop.model.backbone)[1])
    first = max(map(len, prompts))
    seen = 0
    running = [limit > 0 for limit in limits]
    while any(running):
        until = min(max(limits), seen + (stride or max(limits)))
        state = loop.advance(
            state=state, rows=rows, stop_ids=stop_ids, until=np.int32(until)
        )
        step = int(state["step"])
        tokens = to_numpy(state["tokens"])[: len(prompts)]
        new = tokens[:, first + seen : first + step].tolist()
        for i, limit in enumerate(limits):
            ids = cut_at_stop_id(new[i][: max(0, limit - seen)], stop_token_ids)
            new[i] = ids if running[i] else []
            stopped = bool(ids) and ids[-1] in stop_token_ids
            running[i] = running[i] and not stopped and step < limit
        yield new
        seen = step


def cut_at_stop_id(ids, stop_token_ids):
    """The tokens up to the first stop id, it included."""
    ends = [i + 1 for i, token_id in enumerate(ids) if token_id in stop_token_ids]
    return ids[: min(ends, default=len(ids))]
