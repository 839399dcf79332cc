"""The only import of KerasHub: its base classes, and the names that it does not export.

`import keras_hub` imports TensorFlow whenever it is installed, and keras-hub's wheel
always brings it: 6 to 9 seconds and about 1 GB that users of JAX and PyTorch have no
use for. Keras and KerasHub do so as well when they read or write a configuration, only
to see that something is of none of its types. So TensorFlow is hidden meanwhile, unless
it is the backend or somebody imported it already. `import tensorflow` works as ever
afterwards.
"""

import contextlib
import sys

import keras

from keras_openllama.backend.keras_private import preserve_tensorflow_availability

_TENSORFLOW_MODULES = ("tensorflow", "tensorflow_text")


@contextlib.contextmanager
def without_tensorflow():
    """Makes `import tensorflow` raise `ImportError` inside the block.

    Not where TensorFlow is the backend, or has been imported already.
    """
    if keras.config.backend() == "tensorflow" or "tensorflow" in sys.modules:
        yield
        return
    # Keras remembers whether there is one, and must not remember this.
    with preserve_tensorflow_availability():
        # `None` in `sys.modules` is Python's own way of saying "not importable".
        for name in _TENSORFLOW_MODULES:
            sys.modules[name] = None
        try:
            yield
        finally:
            for name in _TENSORFLOW_MODULES:
                del sys.modules[name]


with without_tensorflow():
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
    with without_tensorflow():
        saver._save_serialized_object(task, "task.json")
        saver._save_serialized_object(task.backbone, "config.json")
        saver._save_metadata(task.backbone)
        if task.preprocessor is not None:
            task.preprocessor.save_to_preset(directory)


def lora_rank(backbone):
    """The rank that `enable_lora` was given: `Backbone._lora_rank` of KerasHub."""
    return backbone._lora_rank


def resolve_dtype(loader, dtype):
    """The dtype policy of a preset's backbone: `PresetLoader._resolve_dtype`.

    Args:
        loader: `KerasPresetLoader`.
        dtype: what the user passed, or `None`.
    """
    return loader._resolve_dtype(loader.config, {"dtype": dtype})


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
    "lora_rank",
    "resolve_dtype",
    "save_configurations",
    "without_tensorflow",
]
