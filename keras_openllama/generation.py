"""Decoding: key/value caches, prefill, and the loops that choose tokens.

The cache is a tuple with one pair of tensors per layer, each `(batch,
num_key_value_heads, columns, head_dim)`, updated in place. All rows share the columns:
prompts fill the first `prompt_columns` from the left (shorter ones leave a gap, which
the mask hides), and the token fed in step `s` goes to column `prompt_columns + s` in
every row. So a step writes one slice, whatever the lengths, and a row computes exactly
what it computes alone; its rotary positions are its own.

Both sizes come in few steps (`bucket`), so that few programs are compiled.
"""

import functools
import warnings

import keras
import numpy as np
from keras import ops, tree

from keras_openllama._keras_hub import GreedySampler, Sampler, SpeculativeSampler
from keras_openllama.compiled import compile_function, while_loop
from keras_openllama.layers.attention import causal_mask
from keras_openllama.prompts import PAD_TOKEN_ID, as_arrays
from keras_openllama.text_arrays import to_numpy

SMALLEST_BUCKET = 32  # Ours: below it, compiling costs more than padding saves.
STOP_SLOTS = 4  # Ours: stop ids are padded to a multiple, to compile once.


def bucket(length):
    """The least allowed size of at least `length`: four sizes per power of two.

    Example:
        bucket(65) == 80 and bucket(129) == 160
    """
    step = max(SMALLEST_BUCKET, 1 << max(length - 1, 1).bit_length()) // 8
    return max(SMALLEST_BUCKET, -(-length // step) * step)


def prefill(backbone, token_ids, final_lengths, columns):
    """Runs the prompts and fills the cache with their keys and values.

    Args:
        backbone: `OpenLlamaBackbone`.
        token_ids: int `(batch, prompt_columns)`, padded on the right. Padding needs no
            mask: real tokens come before it and never see it.
        final_lengths: int `(batch,)`, see `RotaryEmbedding`.
        columns: int, columns of the cache.

    Returns:
        Hidden states `(batch, prompt_columns, hidden_dim)` after the final norm, and
        the cache.
    """
    length = token_ids.shape[1]
    positions = ops.arange(length, dtype="int32")[None]
    cos, sin = backbone.rotary_embedding(positions, final_lengths)
    mask = causal_mask(positions)
    x = backbone.token_embedding(token_ids)
    padding = ((0, 0), (0, 0), (0, columns - length), (0, 0))
    cache = []
    for layer in backbone.transformer_layers:
        x, key_value = layer(x, cos, sin, mask)
        cache.append(tuple(ops.pad(t, padding) for t in key_value))
    return backbone.final_norm(x), tuple(cache)


def decode(backbone, tokens, rows, cache, column):
    """Feeds one token per row.

    Args:
        backbone: `OpenLlamaBackbone`.
        tokens: int `(batch,)`.
        rows: dict of `"lengths"` (int `(batch,)`, tokens of the prompt that count),
            `"final_lengths"` (int `(batch,)`) and `"prompt_columns"` (int `(batch,)`,
            the same number in each row).
        cache: see the top of this file.
        column: int scalar, the column that these tokens take.

    Returns:
        Hidden states `(batch, hidden_dim)` after the final norm, and the cache.
    """
    columns = ops.arange(cache[0][0].shape[2], dtype="int32")[None]
    lengths, start = rows["lengths"][:, None], rows["prompt_columns"][:, None]
    in_prompt = columns < lengths
    generated = ops.logical_and(columns >= start, columns <= column)
    mask = ops.logical_or(in_prompt, generated)[:, None, None]
    positions = lengths + column - start
    cos, sin = backbone.rotary_embedding(positions, rows["final_lengths"])
    x = backbone.token_embedding(tokens[:, None])
    new_cache = []
    for layer, key_value in zip(backbone.transformer_layers, cache, strict=True):
        x, key_value = layer(x, cos, sin, mask, cache=key_value, column=column)
        new_cache.append(tuple(key_value))
    return backbone.final_norm(x)[:, 0], tuple(new_cache)


def last_positions(hidden, lengths):
    """The hidden state of each row's last token, `(batch, hidden_dim)`."""
    index = ops.cast(lengths - 1, "int32")[:, None, None]
    return ops.take_along_axis(hidden, index, axis=1)[:, 0]


def is_in(tokens, stop_ids):
    """Which of `tokens` `(batch, ...)` are among `stop_ids` `(number,)`."""
    return ops.any(ops.equal(tokens[..., None], stop_ids), axis=-1)


class TokenLoop:
    """Chooses a token at a time: greedy, random, top-k, top-p and samplers like them.

    `start` runs the prompts and chooses the first tokens; `advance` goes on to a given
    step, or until all rows are done. The state is a dict of tensors that stays on the
    device: `tokens` `(batch, columns)`, `step`, `done` `(batch,)`, the cache.

    Args:
        model: `OpenLlamaCausalLM`.
    """

    def __init__(self, model):
        self.model = model
        self.start = compile_function(self._start, model, static=("columns",))
        self.advance = compile_function(self._advance, model, donate=("state",))

    def _start(self, token_ids, rows, stop_ids, columns):
        backbone = self.model.backbone
        hidden, cache = prefill(backbone, token_ids, rows["final_lengths"], columns)
        logits = self.model.lm_head(last_positions(hidden, rows["lengths"]))
        prompt_columns = token_ids.shape[1]
        tokens = ops.pad(token_ids, ((0, 0), (0, columns - prompt_columns)))
        state = {
            "tokens": tokens,
            "step": ops.zeros((), "int32"),
            "done": ops.equal(rows["limits"], 0),
            "cache": cache,
        }
        return self._choose(state, logits, rows, stop_ids)

    def _advance(self, state, rows, stop_ids, until):
        def cond(state):
            return ops.logical_and(
                state["step"] < until, ops.logical_not(ops.all(state["done"]))
            )

        def body(state):
            column = rows["prompt_columns"][0] + state["step"] - 1
            fed = ops.take(state["tokens"], column, axis=1)
            hidden, cache = decode(
                self.model.backbone, fed, rows, state["cache"], column
            )
            state = {**state, "cache": cache}
            return self._choose(state, self.model.lm_head(hidden), rows, stop_ids)

        return while_loop(self.model, cond, body, state)

    def _choose(self, state, logits, rows, stop_ids):
        """Takes the next token of each row from its logits."""
        sampler, logits = self.model.sampler, ops.cast(logits, "float32")
        if type(sampler) is GreedySampler:
            chosen = ops.argmax(logits, axis=-1)
        else:
            chosen = sampler.get_next_token(sampler.compute_probabilities(logits))
        chosen = ops.where(state["done"], PAD_TOKEN_ID, ops.cast(chosen, "int32"))
        column = rows["prompt_columns"][0] + state["step"]
        step = state["step"] + 1
        done = ops.logical_or(is_in(chosen, stop_ids), step >= rows["limits"])
        return {
            **state,
            "tokens": ops.slice_update(
                state["tokens"], (0, column), ops.cast(chosen, "int32")[:, None]
            ),
            "step": step,
            "done": ops.logical_or(state["done"], done),
        }


class SearchLoop:
    """Runs samplers that steer the whole search themselves: beam and contrastive.

    They follow KerasHub's protocol: called once, with a function that computes the
    logits of the next token. They feed the last prompt token again, so it does not
    count among the cached ones.

    Args:
        model: `OpenLlamaCausalLM`.
    """

    def __init__(self, model):
        self.model = model
        self.run = compile_function(
            self._run, model, static=("columns", "stop_token_ids")
        )

    def _run(self, token_ids, rows, columns, stop_token_ids):
        """Returns the tokens `(batch, columns)`, the new ones after the prompts'."""
        model, backbone = self.model, self.model.backbone
        batch, prompt_columns = token_ids.shape
        hidden, cache = prefill(backbone, token_ids, rows["final_lengths"], columns)
        rows = {**rows, "lengths": rows["lengths"] - 1}

        def next_logits(prompt, cache, index):
            fed = ops.take(prompt, index - 1, axis=1)
            layers, rows = cache["layers"], cache["rows"]
            hidden, layers = decode(backbone, fed, rows, layers, index)
            cache = {"layers": layers, "rows": rows}
            return model.lm_head(hidden), hidden, cache

        # The buffer's last prompt column holds each row's last token.
        last = ops.take_along_axis(token_ids, rows["lengths"][:, None], axis=1)
        prompt = ops.concatenate([token_ids[:, :-1], last], axis=1)
        prompt = ops.pad(prompt, ((0, 0), (0, columns - 1 - prompt_columns)))
        # Padding repeats the first state: a copy changes no maximum of similarities.
        real = ops.arange(prompt_columns)[None] <= rows["lengths"][:, None]
        hidden = ops.where(real[:, :, None], hidden, hidden[:, :1])
        hidden = ops.pad(hidden, ((0, 0), (0, columns - 1 - prompt_columns), (0, 0)))
        mask = ops.broadcast_to(
            (ops.arange(columns - 1) < prompt_columns)[None], (batch, columns - 1)
        )
        return model.sampler(
            next_logits,
            prompt,
            cache={"layers": cache, "rows": rows},
            index=prompt_columns,
            mask=mask,
            stop_token_ids=stop_token_ids,
            hidden_states=hidden,
            model=model,
        )


def steers_search(sampler):
    """Whether a sampler has a loop of its own, rather than choosing single tokens.

    Raises:
        ValueError: for a sampler that `generate` cannot run.
    """
    if not isinstance(sampler, Sampler):
        raise ValueError(
            "`sampler` must be the name or an instance of a "
            f"`keras_hub.samplers.Sampler`. Received: sampler={sampler!r}"
        )
    if isinstance(sampler, SpeculativeSampler):
        raise ValueError(
            "`SpeculativeSampler` needs a draft model beside this one, which "
            "`generate` has no argument for. Use another sampler, such as 'greedy'. "
            f"Received: sampler={sampler!r}"
        )
    if getattr(sampler, "return_all_beams", False):
        raise ValueError(
            "`generate` returns one continuation a prompt. Use a sampler with "
            f"return_all_beams=False. Received: sampler={sampler!r}"
        )
    return type(sampler).__call__ is not Sampler.__call__


def new_tokens(loop, prompts, limits, stop_token_ids, stride=None):
    """Runs a loop on prompts and yields the tokens that it adds.

    Args:
        loop: `TokenLoop` or `SearchLoop`.
        prompts: list of lists of int, one per row, none empty.
        limits: list of int, the tokens to add to each row at most.
        stop_token_ids: list of int; a row ends with the first of them.
        stride: int, tokens between two yields; `None` yields once, at the end.

    Yields:
        For each row the list of its new tokens since the last time, the stop id
        included.
    """
    _warn_of_slow_bfloat16(loop.model.compute_dtype)
    if max(limits) == 0:
        yield [[] for _ in prompts]
    elif isinstance(loop, SearchLoop):
        # One by one: KerasHub's searches go on with a finished row until the others
        # are finished too, which changes its result.
        yield [
            _search(loop, prompt, limit, stop_token_ids) if limit else []
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
    else:
        yield from _choose_tokens(loop, prompts, limits, stop_token_ids, stride)


@functools.cache
def _warn_of_slow_bfloat16(compute_dtype):
    """Says once that XLA's bfloat16 is slow on a CPU: 1.8 against 25 GB/s (ours)."""
    if keras.config.backend() != "jax" or compute_dtype != "bfloat16":
        return
    if keras.distribution.list_devices()[0].startswith("cpu"):
        warnings.warn(
            "bfloat16 is several times slower than float32 on a CPU with JAX. Load the "
            "model with dtype='float32', or use KERAS_BACKEND=torch for bfloat16.",
            stacklevel=6,
        )


def _search(loop, prompt, limit, stop_token_ids):
    token_ids, rows = _to_device([prompt], [limit])
    prompt_columns = token_ids.shape[1]
    tokens = loop.run(
        token_ids=token_ids,
        rows=rows,
        # The search ends where its buffer ends. One column more, since the last
        # prompt token is fed again.
        columns=prompt_columns + limit + 1,
        stop_token_ids=tuple(stop_token_ids) or None,
    )
    return _until_stop(to_numpy(tokens)[0, prompt_columns:].tolist(), stop_token_ids)


def _choose_tokens(loop, prompts, limits, stop_token_ids, stride):
    token_ids, rows = _to_device(prompts, limits)
    prompt_columns = token_ids.shape[1]
    slots = max(1, -(-len(stop_token_ids) // STOP_SLOTS)) * STOP_SLOTS
    stop_ids = np.full(slots, -1, "int32")  # No token is -1.
    stop_ids[: len(stop_token_ids)] = stop_token_ids
    state = loop.start(
        token_ids=token_ids,
        rows=rows,
        stop_ids=stop_ids,
        columns=bucket(prompt_columns + max(limits)),
    )
    seen, step = 0, 1
    running = [limit > 0 for limit in limits]
    while any(running):
        until = max(limits) if stride is None else seen + stride
        if step < until:
            state = loop.advance(
                state=state, rows=rows, stop_ids=stop_ids, until=np.int32(until)
            )
            step = int(state["step"])
        tokens = to_numpy(state["tokens"])
        new = tokens[:, prompt_columns + seen : prompt_columns + step].tolist()
        for i, limit in enumerate(limits):
            ids = _until_stop(new[i][: max(0, limit - seen)], stop_token_ids)
            new[i] = ids if running[i] else []
            stopped = bool(ids) and ids[-1] in stop_token_ids
            running[i] = running[i] and not stopped and step < limit
        yield new
        seen = step


def _to_device(prompts, limits):
    """Prompts as an array padded to a bucket, and what `decode` knows of each row."""
    lengths = np.array([len(prompt) for prompt in prompts], "int32")
    columns = bucket(int(lengths.max()))
    token_ids = as_arrays(prompts, columns)["token_ids"]
    limits = np.array(limits, "int32")
    rows = {
        "lengths": lengths,
        "final_lengths": lengths + limits,
        "limits": limits,
        "prompt_columns": np.full_like(lengths, columns),
    }
    return tree.map_structure(ops.convert_to_tensor, (token_ids, rows))


def _until_stop(ids, stop_token_ids):
    """The tokens up to the first stop id, it included."""
    ends = [i + 1 for i, token_id in enumerate(ids) if token_id in stop_token_ids]
    return ids[: min(ends, default=len(ids))]
