"""The choice of the next token in each slot of an `Engine`, by its own controls."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.layer_programs import layer_programs
from keras_openllama.generation.sampling.arrays import (
    SamplingArrays,
    resolve_seed,
    sampling_arrays,
    uniform_numbers,
)
from keras_openllama.generation.sampling.config import SamplingConfig
from keras_openllama.generation.sampling.samplers import undefined_tokens
from keras_openllama.generation.sampling.token_choice import (
    ChosenTokens,
    add_logprobs,
    choose_tokens,
)

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Numbers of top log-probabilities are rounded up to a multiple, for fewer programs.
TOP_LOGPROBS_MULTIPLE = 8


class ChosenToken(NamedTuple):
    """A token, with natural log-probabilities of the model if they are requested.

    Attributes:
        token_id: the token.
        logprob: its log-probability, or `None`.
        top_logprobs: pairs of the most likely tokens and their log-probabilities.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class SlotSampler:
    """The sampling controls of the sequences in the slots.

    Args:
        model: `OpenLlamaCausalLM`.
        num_slots: number of slots.
    """

    def __init__(self, model: CausalLM, num_slots: int) -> None:
        self._size = model.backbone.vocabulary_size
        self._undefined = undefined_tokens(model)
        self._num_slots = num_slots
        self._controls = [None] * num_slots
        self._programs = layer_programs(model)

    def open(
        self,
        slot: int,
        config: SamplingConfig,
        prompt_ids: Sequence[int],
        stop_token_ids: Sequence[int],
        max_new_tokens: int,
        sample: int = 0,
    ) -> None:
        """Sets the controls of a new sequence.

        Args:
            slot: number of the slot.
            config: the controls.
            prompt_ids: token ids of the prompt.
            stop_token_ids: ids that end the sequence.
            max_new_tokens: most tokens that will be chosen.
            sample: number of the sequence among those with the same seed.

        Raises:
            ValueError: for token ids outside of the vocabulary.
        """
        arrays = sampling_arrays([config], [prompt_ids], self._size, stop_token_ids)
        uniforms = uniform_numbers(resolve_seed(config.seed), sample, max_new_tokens)
        self._controls[slot] = _Controls(
            arrays,
            uniforms,
            counts=np.zeros(self._size, "int32"),
            is_plain=config.is_plain_greedy,
        )

    def choose(
        self,
        logits: np.ndarray,
        slots: Sequence[int],
        top_logprobs: Sequence[int | None],
        allowed: Sequence[np.ndarray | None],
    ) -> list[ChosenToken]:
        """Chooses a token in each of some slots.

        Args:
            logits: float32 `(len(slots), vocabulary_size)`; may be modified.
            slots: numbers of the slots.
            top_logprobs: for each, how many top log-probabilities are requested, or
                `None` for none at all.
            allowed: for each, bool `(vocabulary_size,)` of the allowed tokens, or
                `None` for all.

        Returns:
            The tokens.
        """
        if self._undefined:
            logits[:, self._undefined] = -np.inf
        controls = [self._controls[slot] for slot in slots]
        is_plain = all(control.is_plain for control in controls)
        if is_plain and all(x is None for x in (*top_logprobs, *allowed)):
            tokens = [ChosenToken(int(token)) for token in logits.argmax(axis=-1)]
        else:
            tokens = self._choose_by_controls(logits, controls, top_logprobs, allowed)
        for slot, chosen in zip(slots, tokens, strict=True):
            self.accept(slot, [chosen.token_id])
        return tokens

    def accept(self, slot: int, token_ids: Sequence[int]) -> None:
        """Appends tokens to the sequence in a slot.

        Args:
            slot: number of the slot.
            token_ids: the tokens; `choose` has appended those that it returned.
        """
        control = self._controls[slot]
        np.add.at(control.counts, list(token_ids), 1)
        control.step += len(token_ids)

    def choose_run(
        self,
        logits: np.ndarray,
        slot: int,
        proposed: Sequence[int],
        top_logprobs: int | None = None,
    ) -> list[ChosenToken]:
        """Chooses the tokens after proposed ones, and appends none of them.

        Args:
            logits: float32 `(number, vocabulary_size)`, after each of the last
                `number` of the last token of the sequence and the proposed ones; may be
                modified.
            slot: number of the slot.
            proposed: token ids that may follow the sequence.
            top_logprobs: see `choose`.

        Returns:
            A token for each row of `logits`, given that the proposed ones before it
            are right.
        """
        if self._undefined:
            logits[:, self._undefined] = -np.inf
        control, number = self._controls[slot], len(logits)
        if control.is_plain and top_logprobs is None:
            return [ChosenToken(int(token)) for token in logits.argmax(axis=-1)]
        first = len(proposed) + 1 - number
        controls = [control.after(proposed[: first + row]) for row in range(number)]
        return self._choose_by_controls(
            logits, controls, [top_logprobs] * number, [None] * number
        )

    def score(
        self, logits: np.ndarray, token_ids: Sequence[int], top_logprobs: int
    ) -> list[ChosenToken]:
        """Returns given tokens with their log-probabilities.

        Args:
            logits: float32 `(number, vocabulary_size)`; may be modified.
            token_ids: `number` token ids, one for each row.
            top_logprobs: see `choose`.

        Returns:
            The tokens.
        """
        if self._undefined:
            logits[:, self._undefined] = -np.inf
        filler = (1 << (len(token_ids) - 1).bit_length()) - len(token_ids)
        found = self._run(
            _scorer(self._padded_number([top_logprobs])),
            logits=np.pad(logits, ((0, filler), (0, 0))),
            tokens=np.array([*token_ids, *[0] * filler], "int32"),
        )
        return [_chosen(found, row, top_logprobs) for row in range(len(token_ids))]

    def _choose_by_controls(self, logits, controls, top_logprobs, allowed):
        # Padded to a power of two, as the rows of a step.
        rows = 1 << (len(controls) - 1).bit_length()
        if len(controls) <= self._num_slots < rows:
            rows = self._num_slots
        padded = [*controls, *controls[-1:] * (rows - len(controls))]
        columns = zip(*(control.arrays for control in padded), strict=True)
        arrays = SamplingArrays(*map(np.concatenate, columns))
        for row, mask in enumerate(allowed):
            if mask is not None:
                arrays.bias[row, ~mask] = -np.inf
        numbers = [number for number in top_logprobs if number is not None]
        inputs = dict(
            logits=np.pad(logits, ((0, rows - len(logits)), (0, 0))),
            arrays=arrays,
            counts=np.stack([control.counts for control in padded]),
            uniforms=np.array([x.uniforms[x.step] for x in padded], "float32"),
            step=np.array([control.step for control in padded], "int32"),
        )
        choose = _chooser(self._padded_number(numbers) if numbers else None)
        found = self._run(choose, **inputs)
        return [_chosen(found, *row) for row in enumerate(top_logprobs)]

    def _run(self, program, **inputs):
        if keras.config.backend() == "torch":
            found = program(**tree.map_structure(ops.convert_to_tensor, inputs))
        else:
            found = self._programs.run(program, **inputs)
        return ChosenTokens(*(as_numpy(x) if len(x) else () for x in found))

    def _padded_number(self, numbers):
        multiples = -(-max(numbers) // TOP_LOGPROBS_MULTIPLE)
        return min(self._size, multiples * TOP_LOGPROBS_MULTIPLE)


@functools.cache
def _chooser(num_top_logprobs):
    return functools.partial(choose_tokens, num_top_logprobs=num_top_logprobs)


@functools.cache
def _scorer(num_top_logprobs):
    return functools.partial(add_logprobs, num_top_logprobs=num_top_logprobs)


@dataclasses.dataclass
class _Controls:
    """The controls of one sequence, and what it has chosen."""

    arrays: SamplingArrays
    uniforms: np.ndarray
    counts: np.ndarray
    is_plain: bool
    step: int = 0

    def after(self, token_ids: Sequence[int]) -> _Controls:
        """The controls after further tokens."""
        counts = self.counts.copy()
        np.add.at(counts, list(token_ids), 1)
        step = self.step + len(token_ids)
        return dataclasses.replace(self, counts=counts, step=step)


def _chosen(found, row, number):
    token = int(found.tokens[row])
    if number is None:
        return ChosenToken(token)
    pairs = ()
    if number:
        ids, logprobs = found.top_tokens[row, :number], found.top_logprobs[row, :number]
        pairs = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
    return ChosenToken(token, float(found.logprobs[row]), pairs)
