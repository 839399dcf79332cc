"""OpenLLaMA in Keras 3, on JAX, TensorFlow and PyTorch.

The public API is the classes below and the modules `config`, `convert`,
`distribution`, `evaluation`, `layers`, `optimizers`, `presets` and `quantization`.
`data.token_stream.TokenStream` is public, too. Everything else is private and may
change.
"""

import importlib
import os
import sys
from typing import Any

from keras_openllama.backend.lazy_imports import install_lazy_imports

__version__ = "0.2.0"

# Public name -> module. Imported lazily, so that `--help` and reading the version do
# not wait for Keras.
_MODULES = {
    "OpenLlamaBackbone": "models.backbone",
    "OpenLlamaTokenizer": "models.tokenizer",
    "OpenLlamaCausalLMPreprocessor": "models.causal_lm_preprocessor",
    "OpenLlamaCausalLM": "models.causal_lm",
    "SamplingConfig": "generation.sampling.config",
    "Generation": "generation.generation_result",
    "PromptLookup": "generation.drafting",
    "DraftModel": "generation.drafting",
}

_NAMESPACES = (
    *("config", "convert", "distribution", "evaluation"),
    *("layers", "optimizers", "presets", "quantization"),
)

__all__ = ["__version__", *_MODULES, *_NAMESPACES]


if "keras" not in sys.modules:
    # Keras defaults to TensorFlow. A user who set the variable, or imported Keras
    # first, has chosen a backend.
    os.environ.setdefault("KERAS_BACKEND", "jax")
install_lazy_imports()


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
