"""The batches of pretraining, from prepared data, and its validation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from keras_openllama.data import mixture as mixtures
from keras_openllama.data.prepared_data import PreparedData
from keras_openllama.data.token_stream import TokenStream
from keras_openllama.runs.interruption import reading_data
from keras_openllama.runs.recipe import Recipe
from keras_openllama.training.step_metrics import LossSums, perplexity_from_loss


class TokenData:
    """`trainer.TrainData` of prepared data.

    Args:
        data: The prepared data.
        recipe: The recipe.
        mixture: The mixture of the sources.
    """

    def __init__(self, data: PreparedData, recipe: Recipe, mixture: mixtures.Mixture):
        self._data, self._recipe, self._mixture = data, recipe, mixture

    def _stream(self, **processes):
        recipe = self._recipe
        return TokenStream(
            self._data,
            recipe.sequence_length,
            recipe.batch_size,
            seed=recipe.seed,
            mixture=self._mixture,
            packing=recipe.packing,
            mask_documents=recipe.mask_documents,
            **processes,
        )

    @functools.cached_property
    def _process_stream(self):
        return self._stream()

    @functools.cached_property
    def _global_stream(self):
        if jax.process_count() == 1:
            return self._process_stream
        return self._stream(process_count=1, process_index=0)

    @functools.cached_property
    def validation(self) -> TokenValidation:
        """The held-out documents."""
        return TokenValidation(self._data, self._recipe, self._mixture)

    def batches(self, from_step: int) -> Iterable[Any]:
        """Returns the batches of this process after `from_step` steps."""
        return self._process_stream.dataset(from_step=from_step)

    def sequences_read(self, step: int) -> list:
        """Identifies the sequences of step `step` (from 0) on all processes."""
        return self._global_stream.sequences_read(step)

    def tokens(self, steps: int) -> int:
        """Returns the number of tokens in the first `steps` steps."""
        return steps * self._recipe.tokens_per_step


class TokenValidation:
    """`trainer.ValidationData` of prepared data; evaluates the same batches each time.

    Args:
        data: The prepared data.
        recipe: The recipe.
        mixture: The mixture; its last weights weight the means over sources.

    Attributes:
        sources: Names of the sources that have held-out documents.
    """

    def __init__(self, data: PreparedData, recipe: Recipe, mixture: mixtures.Mixture):
        self._data, self._recipe = data, recipe
        self._weights = dict(mixture.schedule[-1][1])
        self._streams = {
            name: self._stream(name)
            for name in self._weights
            if name in data.sources and data.split_info(name, "validation")["documents"]
        }
        self.sources = list(self._streams)

    def _stream(self, source):
        return TokenStream(
            self._data,
            self._recipe.sequence_length,
            self._recipe.batch_size,
            seed=self._recipe.seed,
            mixture=mixtures.mixture_from_weights({source: 1.0}),
            sources=[source],
            packing=self._recipe.packing,
            mask_documents=self._recipe.mask_documents,
            split="validation",
        )

    def measure(
        self, evaluate: Callable[[Any], tuple[LossSums, Any]]
    ) -> dict[str, Any]:
        """Evaluates the held-out batches of each source.

        Args:
            evaluate: Function from a batch to the sums over its targets, and the sum
                of their weights.

        Returns:
            `loss` (nats per token), `perplexity` and `bits_per_byte`, means weighted by
            the mixture, and `sources`, the same of each source with target tokens.
            Without any, loss and perplexity are NaN.
        """
        sources = {
            name: self._measure_source(name, stream, evaluate)
            for name, stream in self._streams.items()
        }
        sources = {name: found for name, found in sources.items() if found}
        if not sources:  # The mean over nothing is not a number.
            return {"loss": math.nan, "perplexity": math.nan, "sources": {}}
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

    def _measure_source(self, name, stream, evaluate):
        # At most one epoch: a small source would only repeat.
        once = math.ceil(1 / stream.epochs_at(1)[name] - 1e-6)  # Tolerates rounding.
        nats = targets = 0.0
        for step in range(min(self._recipe.validation_batches, once)):
            with reading_data():
                batch = stream.batch(step)
            sums, weight = evaluate(batch)
            nats, targets = nats + float(sums.loss), targets + float(weight)
        if not targets:
            return None
        loss = nats / targets
        split = self._data.split_info(name, "validation")
        predicted = split["tokens"]
        if (
            self._recipe.mask_documents
        ):  # The first token of a document is not a target.
            predicted -= split["documents"]
        return {
            "loss": loss,
            "perplexity": perplexity_from_loss(loss),
            "bits_per_byte": loss / math.log(2) * predicted / split["bytes"],
        }
