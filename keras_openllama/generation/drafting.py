"""Drafts: proposals of the next tokens, which the model then verifies at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from keras_openllama.generation.continuous_batching.single_slot import (
    SequenceOptions,
    open_slot,
    write_prefix,
)
from keras_openllama.generation.kv_cache import MAX_VERIFIED
from keras_openllama.utils.validation import check_integer, raise_invalid

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Proposals of a sequence, see `Draft.proposals`.
Proposals: TypeAlias = Generator[list[int], tuple[list[int], int], None]

# One token that is not proposed is verified with the proposed ones.
MAX_PROPOSED = MAX_VERIFIED - 1


@dataclasses.dataclass
class DraftStats:
    """What became of the proposals of a draft, over all calls of `generate`.

    Attributes:
        proposed: number of proposed tokens.
        accepted: number of those that the model chose, too.
        steps: how often the model ran after the prompts.
        tokens: number of new tokens.

    Example:
        >>> DraftStats(proposed=10, accepted=8, steps=4, tokens=12).acceptance_rate
        0.8
    """

    proposed: int = 0
    accepted: int = 0
    steps: int = 0
    tokens: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Part of the proposed tokens that were accepted, from 0 to 1."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens for each time that the model ran; 1 without a draft."""
        return self.tokens / self.steps if self.steps else 0.0

    def add(self, proposed: int, accepted: int, tokens: int) -> None:
        """Adds a step."""
        self.proposed += proposed
        self.accepted += accepted
        self.tokens += tokens
        self.steps += 1


@runtime_checkable
class Draft(Protocol):
    """Proposes tokens.

    Attributes:
        max_tokens: most tokens that are proposed at once.
        stats: a `DraftStats`, which the caller of `proposals` updates.
    """

    max_tokens: int
    stats: DraftStats

    def check(self, model: CausalLM) -> None:
        """Raises a `ValueError` if the draft does not suit a model."""

    def proposals(self, options: SequenceOptions) -> Proposals:
        """Returns a generator of proposals for one sequence.

        It is primed by `next`. Then `send((new_ids, number))` passes the tokens that
        were appended to the sequence since, and returns at most `number` proposed ones,
        from 1.
        """


class PromptLookup:
    """Proposes what followed the last tokens where they occurred before.

    It finds the most recent earlier occurrence of the last tokens in the prompt and the
    new text. That suits text that repeats: summaries, edits of code, answers from a
    document.

    Args:
        max_tokens: most tokens that are proposed at once, from 1 to 15.
        max_ngram: how many last tokens are searched for first.
        min_ngram: how many are searched for at least.

    Attributes:
        stats: a `DraftStats`.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> draft = PromptLookup(max_tokens=7)
        >>> text = lm.generate("The sea, the sea, the", max_new_tokens=8, draft=draft)
        >>> text == lm.generate("The sea, the sea, the", max_new_tokens=8)
        True
        >>> draft.stats.tokens
        8

    Source: https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(
        self, max_tokens: int = MAX_PROPOSED, max_ngram: int = 3, min_ngram: int = 1
    ) -> None:
        self.max_tokens = check_integer("max_tokens", max_tokens, most=MAX_PROPOSED)
        self.max_ngram = check_integer("max_ngram", max_ngram)
        self.min_ngram = check_integer("min_ngram", min_ngram, most=self.max_ngram)
        self.stats = DraftStats()

    def check(self, model: CausalLM) -> None:
        """See `Draft.check`: it suits every model."""

    def proposals(self, options: SequenceOptions) -> Proposals:
        """See `Draft.proposals`."""
        index = NgramIndex(self.min_ngram, self.max_ngram)
        index.append(options.prompt_ids)
        new_ids, number = yield []
        while True:
            index.append(new_ids)
            new_ids, number = yield index.continuation(number)


class NgramIndex:
    """Finds the most recent earlier occurrence of the last tokens of a sequence.

    Args:
        shortest: number of tokens of the shortest n-grams.
        longest: number of tokens of the longest ones.

    Example:
        >>> index = NgramIndex(shortest=1, longest=3)
        >>> index.append([5, 6, 7, 8, 5, 6])
        >>> index.continuation(5)
        [7, 8, 5, 6, 7]
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._next = {}  # N-gram -> the position after it.
        self._ids = []

    def append(self, token_ids: Sequence[int]) -> None:
        """Appends tokens to the sequence."""
        ids = self._ids
        for token_id in token_ids:
            # Only now has the last n-gram a continuation.
            for size in self._sizes:
                if size <= len(ids):
                    self._next[tuple(ids[-size:])] = len(ids)
            ids.append(token_id)

    def continuation(self, number: int) -> list[int]:
        """Returns what followed the last tokens before, if they occurred before.

        Args:
            number: how many tokens. What follows the end of the sequence is what was
                just proposed, so that short loops go on.

        Returns:
            So many token ids, or none.
        """
        for size in self._sizes:
            start = self._next.get(tuple(self._ids[-size:]))
            if start is not None and size <= len(self._ids):
                found = self._ids[start : start + number]
                period = len(found)
                while len(found) < number:
                    found.append(found[-period])
                return found
        return []


class DraftModel:
    """Proposes what a smaller model chooses, with the random numbers of the sequence.

    Args:
        lm: an `OpenLlamaCausalLM` with the vocabulary of the model that verifies.
        num_tokens: most tokens that are proposed at once, from 1 to 15.

    Attributes:
        stats: a `DraftStats`.

    Raises:
        ValueError: for numbers out of range, or another object than a model.

    Example:
        >>> from keras_openllama import OpenLlamaCausalLM
        >>> small = OpenLlamaCausalLM.from_preset("open_llama_nano", dtype="bfloat16")
        >>> draft = DraftModel(small, num_tokens=3)
        >>> lm.generate("The sea", max_new_tokens=6, draft=draft)
        'The sea shines, and the sea'
        >>> draft.stats.steps < draft.stats.tokens
        True

    Source: Leviathan et al., arXiv:2211.17192. Proposals and choices share their random
    numbers, so no correction of rejected proposals is needed.
    """

    def __init__(self, lm: CausalLM, num_tokens: int = 4) -> None:
        if not hasattr(lm, "make_generate_function"):
            raise_invalid("lm", lm, "an `OpenLlamaCausalLM`")
        self.lm = lm
        self.max_tokens = check_integer("num_tokens", num_tokens, most=MAX_PROPOSED)
        self.stats = DraftStats()

    def check(self, model: CausalLM) -> None:
        """See `Draft.check`: both models must have the same tokens."""
        sizes = [lm.backbone.vocabulary_size for lm in (model, self.lm)]
        tokenizers = [
            lm.preprocessor.tokenizer.fingerprint
            for lm in (model, self.lm)
            if lm.preprocessor is not None
        ]
        if len(set(sizes)) > 1 or len(set(tokenizers)) > 1:
            raise ValueError(
                "`draft` must be a model with the same tokenizer and vocabulary size "
                "as the model that generates. Received: vocabulary sizes "
                f"{sizes[1]} (draft) and {sizes[0]}, fingerprints of the tokenizers "
                f"{[f'{value:.12}' for value in tokenizers[::-1]]}"
            )

    def proposals(self, options: SequenceOptions) -> Proposals:
        """See `Draft.proposals`."""
        decoder, sampler = open_slot(self.lm, options)
        ids, cached = list(options.prompt_ids), 0
        new_ids, number = yield []
        while True:
            ids += new_ids
            sampler.accept(0, new_ids)
            # The last proposed token was never fed.
            agreed = min(cached, len(ids) - 1)
            logits = _feed(decoder, ids, agreed)
            proposed = []
            while True:
                (chosen,) = sampler.choose_run(logits, 0, proposed)
                proposed.append(chosen.token_id)
                if len(proposed) == number:
                    break
                logits = decoder.step([0], proposed[-1:])
            length = len(ids)
            new_ids, number = yield proposed
            cached = length + common_prefix(proposed[:-1], new_ids)


def _feed(decoder, ids, start):
    """Feeds a sequence from a position on and returns the logits after its end."""
    if len(ids) - start > MAX_VERIFIED:
        write_prefix(decoder, ids[start:-1], start)
        start = len(ids) - 1
    if len(ids) - start == 1:
        decoder.lengths[0] = start
        return decoder.step([0], ids[-1:])
    return decoder.verify(0, ids[start:], start)[-1:]


def common_prefix(proposed: Sequence[int], token_ids: Sequence[int]) -> int:
    """Returns how many first tokens are equal.

    Args:
        proposed: token ids.
        token_ids: others, maybe more or fewer.

    Example:
        >>> common_prefix([5, 6, 7], [5, 6, 8, 9])
        2
    """
    pairs = zip(proposed, token_ids, strict=False)
    different = (i for i, pair in enumerate(pairs) if pair[0] != pair[1])
    return next(different, min(len(proposed), len(token_ids)))
