"""Loss, perplexity and bits per byte of the texts that were set aside, by source."""

import math

from keras_openllama.data import mixture as mixtures
from keras_openllama.data.token_stream import TokenStream
from keras_openllama.runs.interruption import reading_data


class Validation:
    """The validation batches of a data set: the same ones each time.

    Args:
        data: `prepared_data.PreparedData`.
        recipe: `recipe.Recipe`.
        mixture: `mixture.Mixture`; means are by its last weights.

    Attributes:
        sources: names of the sources that have documents set aside.
    """

    def __init__(self, data, recipe, mixture):
        self._data, self._recipe = data, recipe
        self._weights = dict(mixture.schedule[-1][1])
        self._streams = {
            name: self._stream(name)
            for name in self._weights
            if name in data.sources and data.split(name, "validation")["documents"]
        }
        self.sources = list(self._streams)

    def _stream(self, source):
        return TokenStream(
            self._data,
            self._recipe.sequence_length,
            self._recipe.batch_size,
            seed=self._recipe.seed,
            mixture=mixtures.from_weights({source: 1.0}),
            sources=[source],
            packing=self._recipe.packing,
            mask_documents=self._recipe.mask_documents,
            split="validation",
        )

    def measure(self, evaluate):
        """Evaluates.

        Args:
            evaluate: function from a batch to `step_metrics.Sums` and the sum of
                weights.

        Returns:
            Dict: `loss` (nats per token), `perplexity`, `bits_per_byte`, means by the
            weights of the sources, and `sources`, the same of each.
        """
        sources = {
            name: self._of_source(name, stream, evaluate)
            for name, stream in self._streams.items()
        }
        total = sum(self._weights[name] for name in sources)

        def mean(key):
            return sum(self._weights[n] * s[key] for n, s in sources.items()) / total

        loss = mean("loss")
        return {
            "loss": loss,
            "perplexity": _exp(loss),
            "bits_per_byte": mean("bits_per_byte"),
            "sources": sources,
        }

    def _of_source(self, name, stream, evaluate):
        # Not more than there is: a small source would only be read again.
        once = math.ceil(1 / stream.epochs_at(1)[name] - 1e-6)  # Without rounding up.
        nats = targets = 0.0
        for step in range(min(self._recipe.validation_batches, once)):
            with reading_data():
                batch = stream.batch(step)
            sums, weight = evaluate(batch)
            nats, targets = nats + float(sums.loss), targets + float(weight)
        loss = nats / targets
        split = self._data.split(name, "validation")
        predicted = split["tokens"]
        if self._recipe.mask_documents:  # The first token of a document is not.
            predicted -= split["documents"]
        return {
            "loss": loss,
            "perplexity": _exp(loss),
            "bits_per_byte": loss / math.log(2) * predicted / split["bytes"],
        }


def _exp(loss):
    return math.inf if loss > 700 else math.exp(loss)  # Beyond, `exp` overflows.
