"""The one door to KerasHub: its base classes, and every private name we lean on.

`import keras_hub` imports TensorFlow whenever it is installed, and keras-hub's wheel
always brings it: 6 to 9 seconds and about 1 GB that users of JAX and PyTorch have no
use for. So TensorFlow is hidden while KerasHub is imported, unless it is the backend
or somebody imported it or KerasHub already. `import tensorflow` works as ever
afterwards.
"""

import contextlib
import sys

import keras

_TENSORFLOW_MODULES = ("tensorflow", "tensorflow_text")


@contextlib.contextmanager
def _tensorflow_hidden():
    """Makes `import tensorflow` raise `ImportError` inside the block."""
    wanted = keras.config.backend() == "tensorflow"
    already_paid = "tensorflow" in sys.modules or "keras_hub" in sys.modules
    if wanted or already_paid:
        yield
        return
    # `None` in `sys.modules` is Python's own way of saying "not importable".
    for name in _TENSORFLOW_MODULES:
        sys.modules[name] = None
    try:
        yield
    finally:
        for name in _TENSORFLOW_MODULES:
            del sys.modules[name]


with _tensorflow_hidden():
    import keras_hub
    from keras_hub.samplers import (
        GreedySampler,
        RandomSampler,
        Sampler,
        SpeculativeSampler,
        TopPSampler,
    )
    from keras_hub.src.samplers.serialization import get as get_sampler
    from keras_hub.src.utils.preset_utils import KerasPresetLoader, KerasPresetSaver
    from keras_hub.src.utils.python_utils import classproperty


def save_configurations(task, directory):
    """Writes all of a task that `save_to_preset` writes, but its weights.

    Args:
        task: a `CausalLM`.
        directory: path of a directory.
    """
    saver = KerasPresetSaver(directory)
    saver._save_serialized_object(task, "task.json")
    saver._save_serialized_object(task.backbone, "config.json")
    saver._save_metadata(task.backbone)
    if task.preprocessor is not None:
        task.preprocessor.save_to_preset(directory)


Backbone = keras_hub.models.Backbone
CausalLM = keras_hub.models.CausalLM
CausalLMPreprocessor = keras_hub.models.CausalLMPreprocessor
Preprocessor = keras_hub.models.Preprocessor
Tokenizer = keras_hub.tokenizers.Tokenizer

__all__ = [
    "Backbone",
    "CausalLM",
    "CausalLMPreprocessor",
    "GreedySampler",
    "KerasPresetLoader",
    "Preprocessor",
    "RandomSampler",
    "Sampler",
    "SpeculativeSampler",
    "Tokenizer",
    "TopPSampler",
    "classproperty",
    "get_sampler",
    "save_configurations",
]
