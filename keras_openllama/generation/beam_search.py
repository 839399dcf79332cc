"""Samplers that steer the whole search themselves: beam and contrastive search."""

import numpy as np
from keras import ops, tree

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.backend.jit import compile_function
from keras_openllama.backend.keras_hub import Sampler, SpeculativeSampler
from keras_openllama.generation.sharding import state_shardings, to_device
from keras_openllama.generation.token_loop import (
    cut_at_stop_id,
    forward_with_cache,
    init_cache,
    pad_prompts,
)
from keras_openllama.layers.cached_attention import heads_first

PROMPT_LENGTH_MULTIPLE = (
    32  # Ours: prompts are padded to a multiple, so that fewer compile anew.
)


def is_search_sampler(sampler):
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


class SearchLoop:
    """Runs beam and contrastive search, a row at a time.

    They follow KerasHub's protocol: called once, with a function that computes the
    logits of the next token, and with a cache that begins with the axis of the beams.
    They go on until their buffer is full, so they compile for each number of tokens.

    Args:
        model: `OpenLlamaCausalLM`.
    """

    def __init__(self, model):
        self.model = model
        self.run = compile_function(
            self._run, model, static=("prompt_columns", "stop_token_ids")
        )

    def search(self, prompt, limit, stop_token_ids):
        """The new tokens of one prompt, a list of int; the stop id is its last."""
        prompt_columns = (
            -(-len(prompt) // PROMPT_LENGTH_MULTIPLE) * PROMPT_LENGTH_MULTIPLE
        )
        columns = prompt_columns + limit
        tokens, rows = pad_prompts([prompt], [limit], columns)
        # In the padded prompt the last token stands in the last column.
        tokens[:, prompt_columns - 1] = prompt[-1]
        rows["start"] = np.int32(prompt_columns - 1)
        everywhere = state_shardings(self.model.backbone)[1]
        tokens, rows = tree.map_structure(
            lambda array: to_device(array, everywhere), (tokens, rows)
        )
        tokens = self.run(
            tokens=tokens,
            rows=rows,
            cache=init_cache(self.model.backbone, 1, columns),
            prompt_columns=prompt_columns,
            stop_token_ids=tuple(stop_token_ids) or None,
        )
        return cut_at_stop_id(
            to_numpy(tokens)[0, prompt_columns:].tolist(), stop_token_ids
        )

    def _run(self, tokens, rows, cache, prompt_columns, stop_token_ids):
        model, backbone = self.model, self.model.backbone
        columns = tokens.shape[1]
        prompt = tokens[:, :prompt_columns]
        hidden, cache = forward_with_cache(backbone, prompt, rows, cache, np.int32(0))

        def next_logits(prompt, cache, index):
            fed = ops.take(prompt, index - 1, axis=1)[:, None]
            cache = tree.map_structure(heads_first, cache)
            hidden, cache = forward_with_cache(backbone, fed, rows, cache, index - 1)
            cache = tree.map_structure(lambda x: beams_first(x, len(prompt)), cache)
            return model.lm_head(hidden)[:, 0], hidden[:, 0], cache

        # Padding repeats the first state: a copy changes no maximum of similarities.
        place = ops.arange(prompt_columns)
        real = ops.logical_or(place < rows["prefix_lengths"][0], place == rows["start"])
        hidden = ops.where(real[None, :, None], hidden, hidden[:, :1])
        return model.sampler(
            next_logits,
            tokens,
            cache=tree.map_structure(lambda x: beams_first(x, 1), cache),
            index=prompt_columns,
            mask=(ops.arange(columns) < prompt_columns)[None],
            stop_token_ids=stop_token_ids,
            hidden_states=ops.pad(
                hidden, ((0, 0), (0, columns - prompt_columns), (0, 0))
            ),
            model=model,
        )


def beams_first(x, beams):
    """`(heads * beams, columns, head_dim)` as `(beams, heads, columns, head_dim)`."""
    heads = x.shape[0] // beams
    return ops.swapaxes(ops.reshape(x, (heads, beams, *x.shape[1:])), 0, 1)
