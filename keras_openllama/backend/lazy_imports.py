"""Delays the execution of modules that Keras imports and this package does not use.

`import keras` and `import keras_hub` import scikit-learn, Matplotlib, pandas, Grain and
NLTK if they are installed, for wrappers, plots, metrics and tables, and JAX imports
SciPy for sparse solvers. With all extras installed that is more than half of the time
and of the modules. From the import of this package until KerasHub is imported, the
modules of `_LAZY_MODULES` are created empty, and executed when one of their names is
first looked up. So everything works as usual, and only who uses `keras.wrappers` waits
for scikit-learn.

Modules that were imported before this package are not affected.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

_SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"
# They are imported as modules, and none of their names is used during that import.
_LAZY_MODULES = frozenset(
    (
        "keras.visualization",  # Matplotlib
        "keras.src.visualization",
        "keras.wrappers",  # scikit-learn
        "keras.src.trainers.data_adapters.array_slicing",  # pandas, for `fit`
        "keras_hub.metrics",  # NLTK
        "jax.experimental.sparse.linalg",  # SciPy
        *(_SPLASH, f"{_SPLASH}.splash_attention_kernel"),
        f"{_SPLASH}.splash_attention_mask",
        *("IPython", "grain", "kagglehub", "kagglesdk"),
    )
)
# Of the names that Python adds to modules, those that code may define. Others, such as
# `__path__`, are looked up by Python's imports and by `inspect` in every module.
_DUNDER_NAMES = ("__all__", "__version__")


class _LazyModule(types.ModuleType):
    """A module that is executed when a name is missing."""

    def __getattr__(self, name: str) -> Any:
        submodule = f"{self.__name__}.{name}"
        if submodule in _LAZY_MODULES:
            return importlib.import_module(submodule)
        if not name.startswith("__") or name in _DUNDER_NAMES:
            self.__spec__.loader.execute(self)
        return types.ModuleType.__getattribute__(self, name)

    def __dir__(self) -> list[str]:
        self.__spec__.loader.execute(self)
        return list(types.ModuleType.__dir__(self))


class _LazyLoader:
    """Loads a module without executing it.

    `importlib.util.LazyLoader` is not thread-safe before Python 3.11.9, and executes a
    module at any look-up, also those of `inspect` in all modules.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._lock = threading.RLock()
        self._is_executing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # Such as `get_source`.

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _LazyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Does nothing: `execute` does what this method usually does."""

    def execute(self, module: types.ModuleType) -> None:
        with self._lock:
            # Another thread was faster, or the module looks for a name in itself.
            if type(module) is not _LazyModule or self._is_executing:
                return
            self._is_executing = True
            try:
                self._loader.exec_module(module)
                module.__spec__.loader = module.__loader__ = self._loader
                module.__class__ = types.ModuleType
            finally:
                self._is_executing = False


class _LazyFinder:
    """Finds the modules of `_LAZY_MODULES` as Python does, with a lazy loader."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name not in _LAZY_MODULES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:  # `None`: a namespace package.
            spec.loader = _LazyLoader(spec.loader)
        return spec


_finder = _LazyFinder()


def install_lazy_imports() -> None:
    """Makes the modules of `_LAZY_MODULES` lazy if they are imported after this call.

    Does nothing if KerasHub was already imported.
    """
    if "keras_hub" not in sys.modules and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def remove_lazy_imports() -> None:
    """Restores Python's imports. Lazy modules stay so until they are used."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
