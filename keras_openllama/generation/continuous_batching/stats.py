"""Counters of an `Engine`."""

from __future__ import annotations

import collections
import dataclasses

# Times to the first token that are kept, the latest ones.
KEPT_SAMPLES = 1024


@dataclasses.dataclass
class EngineStats:
    """What an `Engine` has done, and does.

    Only the thread of the engine changes the numbers. Read at any time, they may be of
    different moments.

    Attributes:
        queued: requests that wait for a slot.
        active: slots in use.
        submitted: requests since the start.
        rejected: requests that the full queue rejected.
        finished: number of ended requests by their `finish_reason`.
        prompt_tokens: tokens of the prompts whose prefill began.
        cached_tokens: tokens of prompts that were not computed, because the prompt
            cache or another slot had them.
        generated_tokens: new tokens.
        steps: decoding steps.
        time_to_first_token_sum: seconds from submission to the first token, of all
            requests with one.
        time_to_first_token_count: number of these requests.
        time_to_first_token: the latest of these times.
    """

    queued: int = 0
    active: int = 0
    submitted: int = 0
    rejected: int = 0
    finished: collections.Counter = dataclasses.field(
        default_factory=collections.Counter
    )
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    time_to_first_token_sum: float = 0.0
    time_to_first_token_count: int = 0
    time_to_first_token: collections.deque = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=KEPT_SAMPLES)
    )

    def add_first_token(self, seconds: float) -> None:
        """Adds the time to the first token of a request.

        Args:
            seconds: the time since its submission.
        """
        self.time_to_first_token_sum += seconds
        self.time_to_first_token_count += 1
        self.time_to_first_token.append(seconds)
