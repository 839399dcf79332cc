"""The only import of KerasHub: its base classes, and names that it does not export.

`import keras_hub` imports TensorFlow if it is installed, and the wheel of keras-hub
depends on it: 6 to 9 seconds and about 1 GB, which users of JAX and PyTorch do not
need. Keras and KerasHub also import it when they read or write a configuration, for
type checks. So TensorFlow is hidden meanwhile, unless it is the backend or was already
imported. Afterwards `import tensorflow` works as usual.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from keras_openllama.backend.keras_private import (
    preserve_tensorflow_availability,
    quiet_lazy_tensorflow,
)
from keras_openllama.backend.quiet import ignore_quantize_warnings
from keras_openllama.utils.types import PathLike

_TENSORFLOW_MODULES = ("tensorflow", "tensorflow_text")


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Makes `import tensorflow` raise `ImportError` inside the block.

    It has no effect if TensorFlow is the backend, or was already imported.
    """
    if keras.config.backend() == "tensorflow" or "tensorflow" in sys.modules:
        yield
        return
    # Keras caches whether TensorFlow is available. It must not cache this state.
    with preserve_tensorflow_availability():
        # `None` in `sys.modules` makes Python's import raise `ModuleNotFoundError`.
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
        BeamSampler,
        ContrastiveSampler,
        GreedySampler,
        RandomSampler,
        Sampler,
        SpeculativeSampler,
        TopKSampler,
        TopPSampler,
    )
    from keras_hub.src.samplers.serialization import get as get_sampler
    from keras_hub.src.utils.preset_utils import KerasPresetLoader, KerasPresetSaver
    from keras_hub.src.utils.python_utils import classproperty


ignore_quantize_warnings()
quiet_lazy_tensorflow()


def save_configurations(task: CausalLM, directory: PathLike) -> None:
    """Writes everything that `save_to_preset` writes except the weights.

    Args:
        task: A `CausalLM`.
        directory: Path of an existing directory.
    """
    saver = KerasPresetSaver(directory)
    with without_tensorflow():
        saver._save_serialized_object(task, "task.json")
        saver._save_serialized_object(task.backbone, "config.json")
        saver._save_metadata(task.backbone)
        correct_metadata(directory)
        if task.preprocessor is not None:
            task.preprocessor.save_to_preset(directory)


def correct_metadata(directory: PathLike) -> None:
    """Writes the name of KerasHub's task to the `metadata.json` of a preset.

    KerasHub writes the name of the first base class of each task, which is a mixin.

    Args:
        directory: Path of a directory that `save_to_preset` wrote; nothing happens if
            it has no tasks.
    """
    path = Path(directory, "metadata.json")
    metadata = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "tasks" not in metadata:
        return
    metadata["tasks"] = [CausalLM.__name__]
    path.write_text(json.dumps(metadata, indent=4), encoding="utf-8")


def lora_rank(backbone: Backbone) -> int | None:
    """Returns the rank given to `enable_lora`: `Backbone._lora_rank` of KerasHub."""
    return backbone._lora_rank


def resolve_dtype(loader: PresetLoader, dtype: Any) -> Any:
    """Returns the dtype policy of a preset's backbone: `PresetLoader._resolve_dtype`.

    Args:
        loader: A `PresetLoader`.
        dtype: The user's `dtype`, or `None`.
    """
    return loader._resolve_dtype(loader.config, {"dtype": dtype})


class PresetLoader(KerasPresetLoader):
    """Loads directories that were saved under a mixed dtype policy, too.

    Overrides `KerasPresetLoader._resolve_dtype`, which raises for `"mixed_bfloat16"`.
    """

    def _resolve_dtype(self, config, kwargs):
        saved = (config.get("config", {}).get("dtype") or {}).get("config", {})
        if kwargs.get("dtype") is None and saved.get("name", "").startswith("mixed_"):
            return keras.config.dtype_policy()  # As for any other float dtype.
        return super()._resolve_dtype(config, kwargs)


Backbone = keras_hub.models.Backbone
CausalLM = keras_hub.models.CausalLM
CausalLMPreprocessor = keras_hub.models.CausalLMPreprocessor
Preprocessor = keras_hub.models.Preprocessor
Tokenizer = keras_hub.tokenizers.Tokenizer

__all__ = [
    "Backbone",
    "BeamSampler",
    "CausalLM",
    "CausalLMPreprocessor",
    "ContrastiveSampler",
    "GreedySampler",
    "Preprocessor",
    "PresetLoader",
    "RandomSampler",
    "Sampler",
    "SpeculativeSampler",
    "Tokenizer",
    "TopKSampler",
    "TopPSampler",
    "classproperty",
    "correct_metadata",
    "get_sampler",
    "lora_rank",
    "resolve_dtype",
    "save_configurations",
    "without_tensorflow",
]
