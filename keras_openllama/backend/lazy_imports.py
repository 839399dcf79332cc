"""Delays the import of modules that Keras imports and this package does not use.

`import keras` and `import keras_hub` import scikit-learn, Matplotlib, pandas, Grain and
NLTK if they are installed, for wrappers, plots, metrics and tables, and JAX imports
SciPy for sparse solvers. With all extras installed that is more than half of the time
and of the modules. While Keras or KerasHub is imported, the modules of `_LAZY_MODULES`
are created empty. Afterwards they are not in `sys.modules`, so the first who imports
one, or looks up one of its names, executes it as usual: only who uses `keras.wrappers`
waits for scikit-learn, and sees the error if it is broken.

Modules that were imported before this package are not affected.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

_IMPORTERS = ("keras", "keras_hub")
_DYNAMO = "torch._dynamo"
_SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"
# They are imported as modules, and none of their names is used during that import, but
# for `torch._dynamo.disable`.
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
        _DYNAMO,  # SymPy, ONNX and torch.distributed, for `torch.compile`.
    )
)
# Of the names that Python adds to modules, those that code may define or needs. Others,
# such as `__path__`, are looked up in every module by `inspect`.
_DUNDER_NAMES = ("__all__", "__spec__", "__version__")


def _disable_lazily(**options: Any) -> Callable[[Callable], Callable]:
    """`torch._dynamo.disable`, which decorates functions of Keras.

    It has no effect before `torch._dynamo` is imported, since nothing is compiled.
    """

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            dynamo = sys.modules.get(_DYNAMO)
            called = dynamo.disable(function, **options) if dynamo else function
            return called(*args, **kwargs)

        return call

    return decorate


class _LazyModule(types.ModuleType):
    """A module that is imported when one of its names is missing."""

    def __getattr__(self, name: str) -> Any:
        submodule = f"{self.__name__}.{name}"
        if submodule in _LAZY_MODULES:
            return importlib.import_module(submodule)
        if submodule == f"{_DYNAMO}.disable" and _DYNAMO in _finder.empty:
            return _disable_lazily
        if not name.startswith("__") or name in _DUNDER_NAMES:
            self._execute()
        return types.ModuleType.__getattribute__(self, name)

    def __dir__(self) -> list[str]:
        self._execute()
        return list(types.ModuleType.__dir__(self))

    def _execute(self) -> None:
        name = self.__name__
        _finder.release(name)
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"{name} is installed, but cannot be imported: {error}. Repair the "
                "package that this error comes from, or uninstall it.",
                name=name,
            ) from error


class _Loader:
    """A loader with another loader's methods, except those of its subclasses.

    `importlib.util.LazyLoader` is not thread-safe before Python 3.11.9, and executes a
    module at any look-up, also those of `inspect` in all modules.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # Such as `get_source`.

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)


class _ImporterLoader(_Loader):
    """Executes Keras or KerasHub, while `_LAZY_MODULES` are created empty."""

    def exec_module(self, module: types.ModuleType) -> None:
        with _finder.lazy():
            super().exec_module(module)


class _EmptyLoader(_Loader):
    """Creates an empty module."""

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = _finder.empty[spec.name] = _LazyModule(spec.name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Does nothing: the module stays empty."""


class _FillingLoader(_Loader):
    """Executes a module that was created empty: others have references to it."""

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _finder.released[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        module.__class__ = types.ModuleType
        del _finder.released[module.__name__]


class _LazyFinder:
    """Finds modules as Python does, and replaces the loaders of some.

    Attributes:
        empty: name -> empty module, of those in `sys.modules`.
        released: name -> empty module, of those whose next import executes them.
    """

    def __init__(self) -> None:
        self.empty: dict[str, _LazyModule] = {}
        self.released: dict[str, _LazyModule] = {}
        self._is_lazy = False

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name in self.released:
            loader = _FillingLoader
        elif name in _LAZY_MODULES and self._is_lazy and target is None:
            loader = _EmptyLoader
        elif name in _IMPORTERS:
            loader = _ImporterLoader
        else:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:  # `None`: a namespace package.
            spec.loader = loader(spec.loader)
        return spec

    @contextlib.contextmanager
    def lazy(self) -> Iterator[None]:
        """Modules of `_LAZY_MODULES` that are imported in this block are empty."""
        was_lazy, self._is_lazy = self._is_lazy, True
        try:
            yield
        finally:
            self._is_lazy = was_lazy
            if not was_lazy:
                for name in list(self.empty):
                    self.release(name)

    def release(self, name: str) -> None:
        """Makes the next import of an empty module execute it."""
        module = self.empty.pop(name, None)
        if module is not None and sys.modules.get(name) is module:
            self.released[name] = module
            del sys.modules[name]
            del module.__spec__  # `importlib.reload` looks it up: so it is executed.


_finder = _LazyFinder()


def install_lazy_imports() -> None:
    """Makes the modules of `_LAZY_MODULES` lazy in the next import of Keras."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
