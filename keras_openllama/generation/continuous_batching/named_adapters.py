"""Several sets of LoRA adapters of one model, which requests choose by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keras_openllama.layers.lora import adapted_layers

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.layers.projection import Adapters, Projection
    from keras_openllama.utils.types import PathLike


# No name of a set: a change of the adapters has failed.
_UNKNOWN = ""


class NamedAdapters:
    """Sets of LoRA adapters in memory, of which the model has one or none.

    Their ranks, alphas and layers may differ. The weights of the model exist once. To
    give the model another set copies nothing; a program is compiled for each
    combination of rank, alpha and layers.

    Args:
        model: `OpenLlamaCausalLM` without adapters.

    Attributes:
        model: as above.
        active: name of the set that the model has; `None` for no adapters.

    Raises:
        ValueError: if the model has adapters.

    Example:
        >>> from keras_openllama import OpenLlamaCausalLM
        >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
        >>> lm.backbone.enable_lora(4)
        >>> lm.save_adapters("polite_adapters")
        >>> lm.merge_lora(reversible=False)
        >>> adapters = NamedAdapters(lm)
        >>> adapters.load("polite", "polite_adapters")
        >>> adapters.use("polite")
        >>> lm.backbone.get_config()["lora"]["rank"]
        4
    """

    def __init__(self, model: CausalLM) -> None:
        if adapted_layers(model.backbone):
            raise ValueError(
                "Adapters by name need a model that has none yet. Load the model again "
                f"without adapters. Received: model={model!r}"
            )
        self.model = model
        self._sets: dict[str, list[tuple[Projection, Adapters]]] = {}
        self.active: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sets, in the order in which they were loaded."""
        return tuple(self._sets)

    def load(self, name: str, path: PathLike, revision: str | None = None) -> None:
        """Reads adapters from files. Afterwards the model has none.

        Args:
            name: name of the new set.
            path: see `OpenLlamaCausalLM.load_adapters`, as for the rest.
            revision: see there.

        Raises:
            ValueError: for a name that is in use, or as `load_adapters`.
            OSError: as `load_adapters`.
        """
        if name in self._sets:
            raise ValueError(
                "`name` must be unique among the adapters of a model. Received: "
                f"name={name!r} and path={str(path)!r}"
            )
        self.use(None)
        try:
            self.model.load_adapters(path, revision)
        except Exception:
            self._remove()
            raise
        layers = adapted_layers(self.model.backbone)
        self._sets[name] = [(layer, layer.remove_adapters()) for layer in layers]

    def use(self, name: str | None) -> None:
        """Gives the model a set of adapters, or none.

        Args:
            name: name of the set; `None` for the model without adapters.

        Raises:
            ValueError: for an unknown name.
        """
        self.check(name)
        if name == self.active:
            return
        self.active = _UNKNOWN  # Until the change is complete.
        self._remove()
        for layer, adapters in self._sets.get(name, ()):
            layer.restore_adapters(adapters)
        self.active = name

    def _remove(self):
        for layer in adapted_layers(self.model.backbone):
            layer.remove_adapters()

    def check(self, name: str | None) -> None:
        """Checks a name.

        Args:
            name: name of a set, or `None`.

        Raises:
            ValueError: for an unknown name.
        """
        if name is not None and name not in self._sets:
            raise ValueError(
                f"`adapter` must be None or one of {', '.join(self._sets)}. Received: "
                f"adapter={name!r}"
            )
