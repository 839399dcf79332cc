"""New tokens of a sequence on the host, and where they end."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class NewTokens(NamedTuple):
    """New tokens of a sequence.

    Attributes:
        ids: their ids.
        logprobs: their log-probabilities; empty if they are not wanted, as the next.
        top_logprobs: for each of them the most likely tokens at its position, with
            their log-probabilities, in descending order.
    """

    ids: list[int]
    logprobs: Sequence[float] = ()
    top_logprobs: Sequence[dict[int, float]] = ()

    @classmethod
    def joined(cls, parts: Iterable[NewTokens]) -> NewTokens:
        """Joins successive tokens of a sequence.

        Args:
            parts: the tokens.

        Example:
            >>> NewTokens.joined([NewTokens([5, 6]), NewTokens([7])]).ids
            [5, 6, 7]
        """
        columns = zip(*parts, strict=True)
        return cls(*(list(itertools.chain.from_iterable(c)) for c in columns))


def cut_at_stop_id(ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    """Returns the tokens up to and including the first stop id.

    Args:
        ids: token ids.
        stop_token_ids: ids that end a sequence.

    Returns:
        A part of `ids`, or all of them.

    Example:
        >>> cut_at_stop_id([5, 2, 7], [2])
        [5, 2]
    """
    ends = [i + 1 for i, token_id in enumerate(ids) if token_id in stop_token_ids]
    return ids[: min(ends, default=len(ids))]
