"""The batches of pretraining: prepared tokens, and those that were set aside."""

import functools
import math

import jax

from keras_openllama.data import mixture as mixtures
from keras_openllama.data.token_stream import TokenStream
from keras_openllama.runs.interruption import reading_data
from keras_openllama.training.step_metrics import perplexity_from_loss


class TokenData:
    """`trainer.TrainData` of prepared tokens.

    Args:
        data: `prepared_data.PreparedData`.
        recipe: `recipe.Recipe`.
        mixture: `mixture.Mixture`.
    """

    def __init__(self, data, recipe, mixture):
        self._data, self._recipe, self._mixture = data, recipe, mixture

    def _stream(self, **hosts):
        recipe = self._recipe
        return TokenStream(
            self._data,
            recipe.sequence_length,
            recipe.batch_size,
            seed=recipe.seed,
            mixture=self._mixture,
            packing=recipe.packing,
            mask_documents=recipe.mask_documents,
            **hosts,
        )

    @functools.cached_property
    def _own(self):
        return self._stream()

    @functools.cached_property
    def _of_all_hosts(self):
        alone = jax.process_count() == 1
        return self._own if alone else self._stream(hosts=1, host=0)

    @functools.cached_property
    def validation(self):
        return TokenValidation(self._data, self._recipe, self._mixture)

    def batches(self, from_step):
        return self._own.dataset(from_step=from_step)

    def sequences_read(self, step):
        return self._of_all_hosts.sequences_read(step)

    def tokens(self, steps):
        return steps * self._recipe.tokens_per_step


class TokenValidation:
    """`trainer.ValidationData` of prepared tokens: the same batches each time.

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
            evaluate: function from a batch to `step_metrics.LossSums` and the sum of
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
            "perplexity": perplexity_from_loss(loss),
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
            "perplexity": perplexity_from_loss(loss),
            "bits_per_byte": loss / math.log(2) * predicted / split["bytes"],
        }
