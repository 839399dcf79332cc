"""Speculative decoding: a draft proposes tokens, the model verifies them at once.

One pass of the model over the last token and the proposed ones gives the logits after
each. The tokens are chosen from them as without a draft, with the same random numbers.
Those that were proposed are accepted, up to the first one that differs: it takes the
place of the proposed one. So the text is that without a draft, up to rounding, and each
pass yields at least one token.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from keras_openllama.generation.continuous_batching.single_slot import (
    SequenceOptions,
    open_slot,
    write_prefix,
)
from keras_openllama.generation.drafting import (
    Draft,
    common_prefix,
)
from keras_openllama.generation.new_tokens import NewTokens, cut_at_stop_id
from keras_openllama.generation.sampling.config import SamplingConfig
from keras_openllama.generation.sampling.samplers import is_greedy, is_search_sampler
from keras_openllama.generation.sampling.state import BatchSampling

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.generation.sampling.options import SamplingOptions

# Heuristics: tokens that are proposed first, and most steps without a proposal after
# rejected ones. Verifying costs little more than a step on most backends.
FIRST_PROPOSED = 3
LONGEST_PAUSE = 16


def resolve_sampling(
    model: CausalLM, options: SamplingOptions, num_prompts: int
) -> BatchSampling:
    """Returns how the sequences are sampled with a draft.

    Args:
        model: `OpenLlamaCausalLM`.
        options: the options of `generate`.
        num_prompts: number of prompts.

    Returns:
        The sampling of `options.num_samples` sequences for each prompt.

    Raises:
        ValueError: if the sampler of the model would choose tokens, and is not greedy;
            and as `SamplingOptions.resolve`.

    Example:
        >>> from keras_openllama.generation.sampling.options import SamplingOptions
        >>> resolve_sampling(lm, SamplingOptions(), num_prompts=1).configs[0].is_greedy
        True
    """
    sampling = options.resolve(model, num_prompts)
    if sampling is not None:
        return sampling
    sampler = model.sampler
    if is_search_sampler(sampler) or not is_greedy(sampler):
        raise ValueError(
            "`draft` needs greedy decoding or a `SamplingConfig`, but this model was "
            f"compiled with the sampler {type(sampler).__name__}. Pass `sampling`, or "
            "call `compile` with the sampler 'greedy'."
        )
    number = num_prompts * options.num_samples
    greedy = SamplingConfig(temperature=0)
    return BatchSampling([greedy] * number, [0] * number, [0] * number)


def generate_speculatively(
    model: CausalLM,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop_token_ids: Sequence[int],
    sampling: BatchSampling,
) -> list[Iterator[list[NewTokens]]]:
    """Returns an iterator over the new tokens of each prompt.

    Args:
        model: `OpenLlamaCausalLM`.
        draft: what proposes tokens.
        prompts: token ids of each prompt, at least one per prompt.
        limits: maximum number of new tokens for each prompt.
        stop_token_ids: ids that end a sequence.
        sampling: how to sample each sequence.

    Returns:
        Iterators as that of `TokenLoop.generate_with_logprobs` for one prompt. They are
        independent of each other; nothing is computed before they are advanced.

    Raises:
        ValueError: if the draft does not suit the model.
    """
    draft.check(model)
    return [
        _generate_one(
            model,
            draft,
            SequenceOptions(
                prompt_ids=prompt,
                limit=limit,
                sampling=dataclasses.replace(config, seed=seed),
                sample=sample,
                stop_token_ids=stop_token_ids,
            ),
            sampling.logprobs,
        )
        for prompt, limit, config, seed, sample in zip(
            prompts, limits, *sampling[:3], strict=True
        )
    ]


def _generate_one(model, draft, options, logprobs):
    if options.limit == 0:
        yield [NewTokens([])]
        return
    decoder, sampler = open_slot(model, options)
    write_prefix(decoder, options.prompt_ids[:-1], start=0)
    with contextlib.closing(draft.proposals(options)) as proposals:
        next(proposals)
        sequence = _Sequence(decoder, sampler, proposals, options, draft)
        while not sequence.is_ended:
            yield [sequence.advance(logprobs)]


class _Sequence:
    """One sequence in the slot of a decoder, and its draft.

    Attributes:
        is_ended: whether it has reached a stop id or its limit.
    """

    def __init__(self, decoder, sampler, proposals, options, draft):
        self._decoder, self._sampler = decoder, sampler
        self._proposals, self._stats = proposals, draft.stats
        self._options = options
        self._window = ProposalWindow(draft.max_tokens)
        self._ids = list(options.prompt_ids)
        self._seen = len(self._ids)  # By the draft.
        self.is_ended = False

    def advance(self, logprobs: int | None) -> NewTokens:
        """Runs the model once and returns the new tokens."""
        ids, options = self._ids, self._options
        left = options.final_length - len(ids)
        proposed = self._propose(min(self._window.length, left - 1))
        if proposed:
            fed = [ids[-1], *proposed]
            logits = self._decoder.verify(0, fed, start=len(ids) - 1)
        else:
            logits = self._decoder.step([0], ids[-1:])
        chosen = self._sampler.choose_run(logits, 0, proposed, logprobs)
        found = [token.token_id for token in chosen]
        accepted = common_prefix(proposed, found)
        new_ids = cut_at_stop_id(found[: accepted + 1], options.stop_token_ids)
        self._window.update(len(proposed), accepted)
        self._stats.add(len(proposed), min(accepted, len(new_ids)), len(new_ids))
        self._sampler.accept(0, new_ids)
        ids += new_ids
        self._decoder.lengths[0] = len(ids) - 1  # Forgets what was rejected.
        self.is_ended = (
            len(ids) == options.final_length or new_ids[-1] in options.stop_token_ids
        )
        return _with_logprobs(chosen[: len(new_ids)], logprobs)

    def _propose(self, number):
        if number < 1:
            return []
        new_ids, self._seen = self._ids[self._seen :], len(self._ids)
        return self._proposals.send((new_ids, number))


def _with_logprobs(chosen, number):
    ids = [token.token_id for token in chosen]
    if number is None:
        return NewTokens(ids)
    return NewTokens(
        ids,
        [token.logprob for token in chosen],
        [dict(token.top_logprobs) for token in chosen],
    )


class ProposalWindow:
    """How many tokens to propose next, from what became of the last ones.

    It grows while all are accepted. If none is, it shrinks, and then pauses, longer
    each time: text that a draft cannot predict is generated almost as without one.

    Args:
        most: most tokens at once.

    Attributes:
        length: number of tokens to propose; 0 during a pause.

    Example:
        >>> window = ProposalWindow(15)
        >>> for accepted in (3, 7, 0, 0):
        ...     window.update(window.length, accepted)
        ...     print(window.length)
        7
        15
        7
        0
    """

    def __init__(self, most: int) -> None:
        self._most, self._first = most, min(FIRST_PROPOSED, most)
        self._failures = self._pause = 0
        self.length = self._first

    def update(self, proposed: int, accepted: int) -> None:
        """Records a step.

        Args:
            proposed: how many tokens were proposed.
            accepted: how many of them were accepted.
        """
        if self._pause:
            self._pause -= 1
            self.length = 0 if self._pause else self._first
        if not proposed:
            return
        self._failures = 0 if accepted else self._failures + 1
        if accepted == proposed:
            self.length = min(self._most, 2 * self.length + 1)
        elif 2 * accepted < proposed:
            self.length = max(self._first, self.length // 2)
        if self._failures > 1:
            self._pause = min(LONGEST_PAUSE, 2 ** (self._failures - 2))
            self.length = 0
