"""Keys and values of prompts that were read, for later prompts that begin alike."""

from __future__ import annotations

import collections
import math
import threading
import weakref
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from keras import tree

from keras_openllama.generation.weights_state import WeightsState
from keras_openllama.utils.validation import check_integer

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM


class CachedPrefix(NamedTuple):
    """A sequence in a `PromptCache`.

    Attributes:
        tokens: int32 `(length,)`.
        arrays: keys and values of each layer, in the memory of the backend.
        variant: what else the keys and values depend on: the rotary angles with dynamic
            RoPE scaling, and the adapters.
        nbytes: bytes of the arrays.
    """

    tokens: np.ndarray
    arrays: Any
    variant: Hashable
    nbytes: int


class PromptCache:
    """Saves the KV caches of sequences, so that a common beginning is read only once.

    That is the previous turns of a chat, a system prompt, or examples. If the sequences
    exceed the budget, the least recently used ones are removed. A cache belongs to one
    model, and is emptied when the weights have changed.

    Args:
        max_bytes: most bytes of keys and values. A token takes
            `2 * num_layers * num_key_value_heads * head_dim` numbers.

    Attributes:
        max_bytes: the budget.
        nbytes: bytes in use.
        hits: number of prompts with a saved beginning.
        misses: number of other prompts.

    Example:
        >>> from keras_openllama.generation.prompt_cache import PromptCache
        >>> import numpy as np
        >>> cache = PromptCache(max_bytes=1000)
        >>> cache.add([1, 5, 7], [(np.zeros((2, 3, 8)), np.zeros((2, 3, 8)))])
        >>> _, length = cache.find([1, 5, 8, 9])
        >>> length
        2
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = check_integer("max_bytes", max_bytes)
        self.nbytes = self.hits = self.misses = 0
        self._entries: collections.OrderedDict[Hashable, CachedPrefix] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()
        self._model = self._weights = None

    def __len__(self) -> int:
        """Number of saved sequences."""
        return len(self._entries)

    def clear(self) -> None:
        """Removes all sequences."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def use_with(self, model: CausalLM) -> None:
        """Makes a model the cache's own, and empties it if the weights have changed.

        Args:
            model: `OpenLlamaCausalLM`.

        Raises:
            ValueError: if the cache belongs to another model.
        """
        if self._model is None:
            self._model, self._weights = weakref.ref(model), WeightsState(model)
        elif self._model() is not model:
            raise ValueError(
                "`cache` has keys and values of another model. Use a new PromptCache "
                f"for each model. Received: cache={self!r}"
            )
        if self._weights.update():
            self.clear()

    def find(
        self, tokens: Sequence[int], variant: Hashable = None
    ) -> tuple[Any, int] | tuple[None, int]:
        """Looks for the sequence with the longest common beginning.

        Args:
            tokens: token ids.
            variant: see `CachedPrefix`.

        Returns:
            Its arrays, and the number of tokens at the beginning that are equal;
            `(None, 0)` if there is none.
        """
        array = np.asarray(tokens, "int32")
        with self._lock:
            best, best_length = None, 0
            for key, entry in self._entries.items():
                if entry.variant == variant:
                    length = common_length(entry.tokens, array)
                    if length > best_length:
                        best, best_length = key, length
            if best is None:
                self.misses += 1
                return None, 0
            self.hits += 1
            self._entries.move_to_end(best)
            return self._entries[best].arrays, best_length

    def add(self, tokens: Sequence[int], arrays: Any, variant: Hashable = None) -> None:
        """Saves a sequence; does nothing if it alone exceeds the budget.

        It replaces sequences that are its beginning.

        Args:
            tokens: token ids.
            arrays: keys and values of each layer, nested.
            variant: see `CachedPrefix`.
        """
        array = np.asarray(tokens, "int32")
        entry = CachedPrefix(array, arrays, variant, bytes_of(arrays))
        if entry.nbytes > self.max_bytes:
            return
        with self._lock:
            for key, old in list(self._entries.items()):
                is_beginning = common_length(old.tokens, array) == len(old.tokens)
                if old.variant == variant and is_beginning:
                    self._remove(key)
            self._entries[variant, array.tobytes()] = entry
            self.nbytes += entry.nbytes
            while self.nbytes > self.max_bytes:
                self._remove(next(iter(self._entries)))

    def contains(self, tokens: Sequence[int], variant: Hashable = None) -> bool:
        """Returns whether a sequence, or a longer one that begins so, is saved.

        Args:
            tokens: token ids.
            variant: see `CachedPrefix`.
        """
        array = np.asarray(tokens, "int32")
        with self._lock:
            return any(
                entry.variant == variant
                and common_length(entry.tokens, array) == len(array)
                for entry in self._entries.values()
            )

    def _remove(self, key):
        self.nbytes -= self._entries.pop(key).nbytes


def common_length(first: np.ndarray, second: np.ndarray) -> int:
    """Returns how many tokens at the beginning of two sequences are equal.

    Args:
        first: int `(length,)`.
        second: int `(other length,)`.

    Example:
        >>> common_length(np.array([1, 5, 7]), np.array([1, 5, 8, 9]))
        2
    """
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def bytes_of(arrays: Any) -> int:
    """Returns the number of bytes of nested arrays or tensors of any backend.

    Args:
        arrays: nested arrays.

    Example:
        >>> bytes_of([(np.zeros((2, 3), "float32"), np.zeros(4, "int8"))])
        28
    """

    def item_bytes(dtype):
        return dtype.itemsize if hasattr(dtype, "itemsize") else dtype.size

    return sum(math.prod(x.shape) * item_bytes(x.dtype) for x in tree.flatten(arrays))
