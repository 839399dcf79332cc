"""The generation loop of samplers that run a search: beam and contrastive search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops, tree

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.backend.jit import compile_function
from keras_openllama.generation.kv_cache import (
    PromptLayout,
    forward_with_cache,
    init_cache,
    pad_prompts,
)
from keras_openllama.generation.new_tokens import cut_at_stop_id
from keras_openllama.generation.sampling.samplers import exclude_undefined_tokens
from keras_openllama.generation.sharding import state_shardings, to_device
from keras_openllama.layers.cached_attention import heads_first
from keras_openllama.utils.types import Tensor

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Heuristic: prompts are padded to a multiple of it, so that fewer lengths compile.
PROMPT_MULTIPLE = 32


class SearchLoop:
    """Runs beam or contrastive search, one prompt at a time.

    The loop follows KerasHub's sampler protocol. The sampler is called once, with a
    function that returns the logits of the next token, and with a KV cache whose first
    axis is that of the beams. It fills the whole sequence, so each number of new tokens
    is compiled separately.

    Args:
        model: `OpenLlamaCausalLM`.
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self._compiled_search = compile_function(
            self._search, model, static=("prompt_columns", "stop_token_ids")
        )

    def generate(
        self,
        prompts: list[list[int]],
        limits: list[int],
        stop_token_ids: Sequence[int],
        stride: int | None = None,
    ) -> Iterator[list[list[int]]]:
        """See `TokenLoop.generate`. Yields once: a search chooses its tokens last."""
        # One prompt at a time: in a batch, KerasHub's searches continue a finished
        # sequence until all others are finished, which changes its result.
        yield [
            self.search(prompt, limit, stop_token_ids) if limit else []
            for prompt, limit in zip(prompts, limits, strict=True)
        ]

    def search(
        self, prompt: list[int], limit: int, stop_token_ids: Sequence[int]
    ) -> list[int]:
        """Generates tokens after one prompt.

        Args:
            prompt: token ids, at least one.
            limit: maximum number of new tokens, at least 1.
            stop_token_ids: ids that end the sequence.

        Returns:
            The new tokens, up to and including the first stop id.

        Example:
            >>> import keras_hub
            >>> from keras_openllama import OpenLlamaCausalLM
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
            >>> new_tokens = SearchLoop(lm).search([1, 357, 1239], 2, [2])
            >>> len(new_tokens)
            2
        """
        prompt_columns = -(-len(prompt) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        columns = prompt_columns + limit
        tokens, prompt_layout = pad_prompts([prompt], [limit], columns)
        # In the padded prompt, the last token is in the last column.
        tokens[:, prompt_columns - 1] = prompt[-1]
        prompt_layout = prompt_layout._replace(start=np.int32(prompt_columns - 1))
        replicated = state_shardings(self.model.backbone)[1]
        tokens, prompt_layout = tree.map_structure(
            lambda array: to_device(array, replicated), (tokens, prompt_layout)
        )
        tokens = self._compiled_search(
            tokens=tokens,
            prompt_layout=prompt_layout,
            cache=init_cache(
                self.model.backbone, 1, columns, self.model.kv_cache_dtype
            ),
            prompt_columns=prompt_columns,
            stop_token_ids=tuple(stop_token_ids) or None,
        )
        new_tokens = to_numpy(tokens)[0, prompt_columns:].tolist()
        return cut_at_stop_id(new_tokens, stop_token_ids)

    def _search(
        self,
        tokens: Tensor,
        prompt_layout: PromptLayout,
        cache: Any,
        prompt_columns: int,
        stop_token_ids: tuple[int, ...] | None,
    ) -> Tensor:
        model, backbone = self.model, self.model.backbone
        columns = tokens.shape[1]
        prompt = tokens[:, :prompt_columns]
        hidden, cache = forward_with_cache(
            backbone, prompt, prompt_layout, cache, np.int32(0)
        )

        def next_logits(prompt, cache, index):
            inputs = ops.take(prompt, index - 1, axis=1)[:, None]
            cache = tree.map_structure(heads_first, cache)
            hidden, cache = forward_with_cache(
                backbone, inputs, prompt_layout, cache, index - 1
            )
            cache = tree.map_structure(lambda x: beams_first(x, len(prompt)), cache)
            logits = exclude_undefined_tokens(model, model.lm_head(hidden)[:, 0])
            return logits, hidden[:, 0], cache

        # Contrastive search takes a maximum of similarities over all states. Padding
        # repeats the first state, which does not change the maximum.
        column = ops.arange(prompt_columns)
        is_real = ops.logical_or(
            column < prompt_layout.prefix_lengths[0],
            column == prompt_layout.start,
        )
        hidden = ops.where(is_real[None, :, None], hidden, hidden[:, :1])
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


def beams_first(x: Tensor, beams: int) -> Tensor:
    """Splits the axis of heads and beams, with the beams first.

    Args:
        x: `(heads * beams, ...)`.
        beams: number of beams.

    Returns:
        `(beams, heads, ...)`.

    Example:
        >>> beams_first(ops.zeros((6, 32, 8)), beams=2).shape
        (2, 3, 32, 8)
    """
    heads = x.shape[0] // beams
    return ops.swapaxes(ops.reshape(x, (heads, beams, *x.shape[1:])), 0, 1)
