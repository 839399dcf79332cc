"""OpenLLaMA in Keras 3, on JAX, TensorFlow and PyTorch.

Public are the four classes below and the modules `config`, `convert`, `distribution`,
`evaluation`, `layers`, `optimizers` and `presets`. The rest of the package is private
to it, and may move.
"""

import importlib
import os
import sys

__version__ = "0.2.0"

# Public name -> module. Imported at first use, so that the command line can show its
# help, and tools can read the version, without waiting for Keras.
_MODULES = {
    "OpenLlamaBackbone": "models.backbone",
    "OpenLlamaTokenizer": "models.tokenizer",
    "OpenLlamaCausalLMPreprocessor": "models.causal_lm_preprocessor",
    "OpenLlamaCausalLM": "models.causal_lm",
}

_NAMESPACES = (
    *("config", "convert", "distribution", "evaluation"),
    *("layers", "optimizers", "presets"),
)

__all__ = ["__version__", *_MODULES, *_NAMESPACES]


if "keras" not in sys.modules:
    # Keras's own default is TensorFlow. Whoever sets the variable, or has imported
    # Keras already, has chosen.
    os.environ.setdefault("KERAS_BACKEND", "jax")


def __getattr__(name):
    if name in _NAMESPACES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return sorted(__all__)
