"""Log-probabilities of the tokens of many sequences, whatever they share."""

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.backend.jit import compile_function, while_loop
from keras_openllama.evaluation import prefix_tries
from keras_openllama.generation.sharding import batch_sharding, to_device
from keras_openllama.generation.token_loop import padded_batch_size
from keras_openllama.utils.validation import integer_at_least

# Ours: tokens of a row whose logits are in memory at once.
CHUNK = 32
DEFAULT_BATCH_SIZE = 8  # Ours: 4096 tokens at once, enough for full matrix products.


class TokenScorer:
    """Computes how likely a model holds the tokens of sequences.

    What sequences have in common is computed once (see `prefix_tries`); logits exist
    for the wanted tokens alone, a chunk at a time, and only two numbers of each leave
    the device.

    Args:
        lm: `OpenLlamaCausalLM`.
        batch_size: int, rows of 512 tokens that are computed at once; compiled programs
            come for 1, 4, 8, 16 and so on.

    Raises:
        ValueError: for a batch size that is none.

    Example:

    ```python
    scorer = TokenScorer(lm)
    for batch in scorer.plan(sequences):
        found = scorer.run(batch, sequences, wanted_from)
        for index, (log_probs, greedy) in found.items():
            print(sequences[index], log_probs.sum())
    ```
    """

    def __init__(self, lm, batch_size=DEFAULT_BATCH_SIZE):
        self.lm = lm
        self.batch_size = integer_at_least(1)("batch_size", batch_size)
        scaling = lm.backbone.rope_scaling
        # Dynamic scaling depends on a sequence's length, and sharing knows no length.
        self.share = scaling is None or scaling["rope_type"] != "dynamic"
        self._program = compile_function(self._score, lm)

    def plan(self, sequences, indices=None):
        """See `prefix_tries.batches`."""
        return prefix_tries.batches(sequences, self.batch_size, self.share, indices)

    def run(self, batch, sequences, wanted_from):
        """Scores the sequences of a batch.

        Args:
            batch: one of `plan`.
            sequences: list of lists of int, those of the plan.
            wanted_from: list of int by sequence: from which of its tokens on each is
                scored, 1 at least, since nothing comes before the first.

        Returns:
            Dict by number of the sequence of pairs: float32 log-probabilities (nats)
            of its wanted tokens, each after all before it; and whether each is the
            likeliest, bool.

        Raises:
            ValueError: if a first token is wanted.
        """
        if min(wanted_from[index] for index in batch.indices) < 1:
            raise ValueError(
                "Nothing comes before the first token of a sequence, so it has no "
                "score. Received: a 0 in `wanted_from`"
            )
        targets = [
            prefix_tries.Targets(row, sequences, wanted_from) for row in batch.rows
        ]
        log_probs, greedy = map(to_numpy, self._program(**self._inputs(batch, targets)))
        return {
            index: (log_probs[i, places], greedy[i, places])
            for i, row in enumerate(targets)
            for index, places in row.places().items()
        }

    def _inputs(self, batch, targets):
        sharding, multiple = batch_sharding(self.lm.backbone)
        rows = len(batch.rows)
        if keras.config.backend() != "torch":
            rows = padded_batch_size(rows)
        rows = -(-rows // multiple) * multiple
        inputs = prefix_tries.arrays(batch, rows)
        count = max(map(len, targets))
        # There may be more than columns, where many tokens follow one context.
        slots = -(-max(1, count) // batch.columns) * batch.columns
        inputs["parents"] = np.zeros((rows, slots), "int32")
        inputs["targets"] = np.zeros((rows, slots), "int32")
        for i, row in enumerate(targets):
            inputs["parents"][i, : len(row)] = row.parents
            inputs["targets"][i, : len(row)] = row.tokens
        inputs = {name: to_device(x, sharding) for name, x in inputs.items()}
        return inputs | {"count": np.int32(count)}

    def _score(self, token_ids, ends, lengths, parents, targets, count):
        column = ops.arange(token_ids.shape[1], dtype="int32")
        query, key = column[None, :, None], column[None, None, :]
        mask = ops.logical_and(key <= query, query < ends[:, None])[:, None]
        hidden = self.lm.backbone.hidden_states(
            token_ids, column[None] < lengths[:, None], mask=mask
        )

        def goes_on(state):
            return state["done"] < count

        def score_chunk(state):
            done = state["done"]
            shape = parents.shape[0], CHUNK
            part = (ops.slice(x, (0, done), shape) for x in (parents, targets))
            log_probs, greedy = self._score_chunk(hidden, *part)
            return {
                "done": done + CHUNK,
                "log_probs": ops.slice_update(state["log_probs"], (0, done), log_probs),
                "greedy": ops.slice_update(state["greedy"], (0, done), greedy),
            }

        state = {
            "done": ops.zeros((), "int32"),
            "log_probs": ops.zeros(parents.shape, "float32"),
            "greedy": ops.zeros(parents.shape, "bool"),
        }
        state = while_loop(self.lm, goes_on, score_chunk, state)
        return state["log_probs"], state["greedy"]

    def _score_chunk(self, hidden, parents, targets):
        states = ops.take_along_axis(hidden, parents[..., None], axis=1)
        logits = ops.cast(self.lm.lm_head(states), "float32")
        chosen = ops.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        greedy = ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), targets)
        return chosen - ops.logsumexp(logits, axis=-1), greedy
