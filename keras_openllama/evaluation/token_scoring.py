"""Log-probabilities of the tokens of many sequences, with shared prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.backend.jit import compile_function, while_loop
from keras_openllama.evaluation import prefix_tries
from keras_openllama.evaluation.prefix_tries import TrieBatch
from keras_openllama.generation.kv_cache import padded_batch_size
from keras_openllama.generation.sharding import batch_sharding, to_device
from keras_openllama.utils.validation import check_integer

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

# Heuristic: tokens of a packed sequence whose logits are in memory at the same time.
CHUNK = 32
# Heuristic: 4096 tokens per batch are enough for matrix products at full speed.
DEFAULT_BATCH_SIZE = 8


class TokenScorer:
    """Computes log-probabilities of the tokens of sequences.

    Common prefixes of sequences are computed once (see `prefix_tries`). Logits are
    computed for the scored tokens only, one chunk at a time, and only two numbers per
    token are copied from the device.

    Args:
        lm: the model.
        batch_size: number of packed sequences of 512 tokens in a batch. Programs are
            compiled for the sizes 1, 4, 8, 16 and so on.

    Raises:
        ValueError: if `batch_size` is not a positive integer.

    Example:
        >>> scorer = TokenScorer(lm)
        >>> sequences = [[1, 300, 301], [1, 300, 302]]
        >>> for batch in scorer.make_batches(sequences):
        ...     scores = scorer.score_batch(batch, sequences, score_from=[1, 1])
        >>> log_probs, greedy = scores[0]
        >>> log_probs.shape
        (2,)
    """

    def __init__(self, lm: OpenLlamaCausalLM, batch_size: int = DEFAULT_BATCH_SIZE):
        self.lm = lm
        self.batch_size = check_integer("batch_size", batch_size)
        scaling = lm.backbone.rope_scaling
        # Dynamic scaling depends on the length of each sequence, and a packed sequence
        # has only one length.
        self.share_prefixes = scaling is None or scaling["rope_type"] != "dynamic"
        self._program = compile_function(self._score, lm)

    def make_batches(
        self,
        sequences: Sequence[Sequence[int]],
        indices: Sequence[int] | None = None,
    ) -> list[TrieBatch]:
        """Packs sequences into batches, see `prefix_tries.make_batches`."""
        return prefix_tries.make_batches(
            sequences, self.batch_size, self.share_prefixes, indices
        )

    def score_batch(
        self,
        batch: TrieBatch,
        sequences: Sequence[Sequence[int]],
        score_from: Sequence[int],
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Scores the sequences of a batch.

        Args:
            batch: a batch of `make_batches`.
            sequences: token ids of each sequence, as passed to `make_batches`.
            score_from: for each sequence, the index of the first token to score. It is
                at least 1, since no token precedes the first.

        Returns:
            For each index of a sequence, two arrays of shape `(scored tokens,)`: the
            log-probability of each token given all previous tokens (float32, nats), and
            whether it is the most likely token (bool).

        Raises:
            ValueError: if a value of `score_from` is less than 1.
        """
        least = min(score_from[index] for index in batch.sequence_indices)
        if least < 1:
            raise ValueError(
                "`score_from` must be at least 1: the first token of a sequence has no "
                f"score, since no token precedes it. Received: {least}"
            )
        targets = [
            prefix_tries.TrieTargets(trie, sequences, score_from)
            for trie in batch.tries
        ]
        log_probs, greedy = map(to_numpy, self._program(**self._inputs(batch, targets)))
        return {
            index: (log_probs[i, places], greedy[i, places])
            for i, trie_targets in enumerate(targets)
            for index, places in trie_targets.indices_by_sequence().items()
        }

    def _inputs(self, batch, targets):
        sharding, multiple = batch_sharding(self.lm.backbone)
        batch_size = len(batch.tries)
        if keras.config.backend() != "torch":
            batch_size = padded_batch_size(batch_size)
        batch_size = -(-batch_size // multiple) * multiple
        inputs = prefix_tries.batch_arrays(batch, batch_size)
        count = max(map(len, targets))
        # May exceed the length, if many tokens follow the same context.
        slots = -(-max(1, count) // batch.length) * batch.length
        inputs["nodes"] = np.zeros((batch_size, slots), "int32")
        inputs["targets"] = np.zeros((batch_size, slots), "int32")
        for i, trie_targets in enumerate(targets):
            inputs["nodes"][i, : len(trie_targets)] = trie_targets.nodes
            inputs["targets"][i, : len(trie_targets)] = trie_targets.tokens
        inputs = {name: to_device(x, sharding) for name, x in inputs.items()}
        return inputs | {"count": np.int32(count)}

    def _score(self, token_ids, ends, lengths, nodes, targets, count):
        node = ops.arange(token_ids.shape[1], dtype="int32")
        query, key = node[None, :, None], node[None, None, :]
        mask = ops.logical_and(key <= query, query < ends[:, None])[:, None]
        hidden = self.lm.backbone.hidden_states(
            token_ids, node[None] < lengths[:, None], mask=mask
        )

        def has_more(state):
            return state["done"] < count

        def score_chunk(state):
            done = state["done"]
            shape = nodes.shape[0], CHUNK
            part = (ops.slice(x, (0, done), shape) for x in (nodes, targets))
            log_probs, greedy = self._score_chunk(hidden, *part)
            return {
                "done": done + CHUNK,
                "log_probs": ops.slice_update(state["log_probs"], (0, done), log_probs),
                "greedy": ops.slice_update(state["greedy"], (0, done), greedy),
            }

        state = {
            "done": ops.zeros((), "int32"),
            "log_probs": ops.zeros(nodes.shape, "float32"),
            "greedy": ops.zeros(nodes.shape, "bool"),
        }
        state = while_loop(self.lm, has_more, score_chunk, state)
        return state["log_probs"], state["greedy"]

    def _score_chunk(self, hidden, nodes, targets):
        states = ops.take_along_axis(hidden, nodes[..., None], axis=1)
        logits = ops.cast(self.lm.lm_head(states), "float32")
        chosen = ops.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        greedy = ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), targets)
        return chosen - ops.logsumexp(logits, axis=-1), greedy
