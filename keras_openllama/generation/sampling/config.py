"""`SamplingConfig`: how one request chooses its tokens."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from keras_openllama.utils.validation import check_integer, raise_invalid

# Logits divided by a temperature below this exceed the range of float32, or differ by
# no more than rounding.
ZERO_TEMPERATURE = 1e-6
_FLOAT32_MAX = 3.4e38


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a request chooses its tokens: the argument `sampling` of `generate`.

    The controls apply in this order: `logit_bias` and the repetition penalty; presence
    and frequency penalties; `banned_tokens` and `min_new_tokens`; then, unless the
    temperature is 0, temperature, `top_k`, `top_p` and `min_p`. Each uses the
    probabilities that the previous ones leave. Tokens whose logits are equal to that of
    the last token that `top_k` or `top_p` keeps are kept, too.

    Attributes:
        temperature: the logits are divided by it; 0 chooses the most likely token.
        top_k: number of the most likely tokens to choose from; `None` for all.
        top_p: total probability, in (0, 1], of the most likely tokens to choose from.
        min_p: minimum probability of a token, relative to that of the most likely one;
            in [0, 1].
        repetition_penalty: positive logits of tokens that the prompt or the new text
            contains are divided by it, and negative ones are multiplied; 1 has no
            effect.
        presence_penalty: subtracted from the logits of tokens that the new text
            contains.
        frequency_penalty: subtracted from the logit of a token once for each time that
            the new text contains it.
        logit_bias: numbers that are added to logits, by token id.
        banned_tokens: ids of tokens that are never chosen.
        min_new_tokens: number of new tokens before which no stop id is chosen. Stop
            strings end the text before, too.
        seed: the random numbers depend on it, and on nothing else; from -2**63 to
            2**64 - 1. `None` draws a seed from Python's `random`, which
            `keras.utils.set_random_seed` initializes.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> from keras_openllama import SamplingConfig
        >>> config = SamplingConfig(temperature=0.8, top_p=0.95, seed=1)
        >>> config.is_greedy, SamplingConfig(temperature=0).is_greedy
        (False, True)

    Source: top-k arXiv:1805.04833; top-p arXiv:1904.09751; min-p arXiv:2407.01082;
        repetition penalty arXiv:1909.05858; presence and frequency penalties: OpenAI's
        API reference.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(
        default_factory=dict, hash=False
    )
    banned_tokens: Sequence[int] = ()
    min_new_tokens: int = 0
    seed: int | None = None

    def __post_init__(self):
        self._check("temperature", "a number of at least 0", lambda x: x >= 0)
        self._check("top_p", "a number in (0, 1]", lambda x: 0 < x <= 1)
        self._check("min_p", "a number in [0, 1]", lambda x: 0 <= x <= 1)
        self._check("repetition_penalty", "a positive number", lambda x: x > 0)
        self._check("presence_penalty", "a number", lambda x: True)
        self._check("frequency_penalty", "a number", lambda x: True)
        self._set("logit_bias", _as_biases(self.logit_bias))
        self._set("banned_tokens", _as_ids(self.banned_tokens))
        self._check_integer("min_new_tokens", least=0, most=2**31 - 1)
        if self.top_k is not None:
            self._check_integer("top_k", least=1, most=2**31 - 1)
        if self.seed is not None:
            self._check_integer("seed", least=-(2**63), most=2**64 - 1)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is chosen: the temperature is 0."""
        return self.temperature < ZERO_TEMPERATURE

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the most likely token of the model is chosen, without controls."""
        return self.is_greedy and not (
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.banned_tokens
            or self.min_new_tokens
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, for Keras's serialization."""
        # Keys of JSON are strings, so the biases are pairs.
        return dataclasses.asdict(self) | {"logit_bias": [*self.logit_bias.items()]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SamplingConfig:
        """Returns the configuration of a result of `get_config`."""
        return cls(**config | {"logit_bias": dict(config["logit_bias"])})

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self, name, requirement, is_valid):
        value = getattr(self, name)
        if not (_is_finite(value) and is_valid(value)):
            raise_invalid(name, value, requirement)
        self._set(name, float(value))

    def _check_integer(self, name, least, most):
        self._set(name, check_integer(name, getattr(self, name), least, most))


def _is_finite(value):
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and abs(value) <= _FLOAT32_MAX


def _as_biases(biases):
    requirement = "a dict of token ids and finite numbers"
    if not isinstance(biases, Mapping):
        raise_invalid("logit_bias", biases, requirement)
    if not all(map(_is_finite, biases.values())):
        raise_invalid("logit_bias", dict(biases), requirement)
    return {
        check_integer("logit_bias", token, least=0): float(bias)
        for token, bias in biases.items()
    }


def _as_ids(ids):
    if isinstance(ids, (str, bytes)):
        raise_invalid("banned_tokens", ids, "a list of token ids")
    try:
        ids = tuple(ids)
    except TypeError:
        raise_invalid("banned_tokens", ids, "a list of token ids")
    return tuple(check_integer("banned_tokens", token, least=0) for token in ids)
