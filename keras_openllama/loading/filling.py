"""Models that were built without weights are given those of a checkpoint."""

from keras_openllama.checkpoints.matching import listed
from keras_openllama.checkpoints.tensors import ReadAhead, in_file_order
from keras_openllama.loading.casting import value_for
from keras_openllama.loading.uninitialized import fill, finish
from keras_openllama.utils.progress import progress_bar


class Weights:
    """The weights of a checkpoint, for one model that was built without any.

    Use as a context manager around the building of the model: they are read from the
    disk meanwhile.

    Args:
        tensors: dict of `tensors.StoredTensor`s by variable path.

    Example:

    ```python
    tensors = transformers.read_tensors(Directory(path), arguments)
    with Weights(tensors) as weights:
        with without_weights() as variables:
            model = OpenLlamaCausalLM(OpenLlamaBackbone(**arguments))
        weights.fill(model, variables)
    ```
    """

    def __init__(self, tensors):
        self._tensors = tensors
        # The head of a tied model is the embedding: one tensor, two weights.
        unique = {id(stored): stored for stored in tensors.values()}
        self._ahead = ReadAhead(in_file_order(unique.values()))
        self._bytes = sum(stored.nbytes for stored in unique.values())

    def __enter__(self):
        self._ahead.__enter__()
        return self

    def __exit__(self, *error):
        self._ahead.__exit__(*error)

    def fill(self, model, variables):
        """Puts each tensor into its variable, one at a time.

        At any moment there is at most one tensor in memory beside the model's own.

        Args:
            model: `OpenLlamaBackbone` or `OpenLlamaCausalLM`.
            variables: the list that `without_weights` yielded.

        Raises:
            ValueError: if the model has other weights than the checkpoint, or a value
                does not fit into its dtype.
        """
        own = {weight.path: weight for weight in model.weights}
        unnamed = set(own) ^ set(self._tensors)
        if unnamed:
            raise ValueError(
                "These weights of the model are not those of an OpenLLaMA network "
                f"without adapters or quantisation: {listed(unnamed)}. Load it as "
                "floating-point numbers, and call `enable_lora` or `quantize` "
                "afterwards."
            )
        targets = {}
        for path, stored in self._tensors.items():
            targets.setdefault(id(stored), []).append(own[path])
        with progress_bar("Loading weights", self._bytes) as bar:
            for stored in self._ahead:
                for variable in targets[id(stored)]:
                    fill(variable, _value(variable, stored))
                stored.drop()
                bar.update(stored.nbytes)
        finish(model, variables)


def _value(variable, stored):
    try:
        return value_for(variable, stored.array())
    except ValueError as error:
        raise ValueError(f"{stored.name} in {stored.file.path}: {error}.") from error
