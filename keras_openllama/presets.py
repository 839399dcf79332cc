"""The registry of presets.

The registry is the directory `presets/` of the repository, with one JSON file per
preset. A wheel contains it inside the package. Reading it imports neither Keras nor a
network library.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from pathlib import Path
from typing import Any

_PREFIX = "open_llama_"  # Short names omit it.


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model, as described by its JSON file.

    Attributes:
        name: Name, such as `"open_llama_7b_v2"`.
        description: One sentence.
        parameters: Number of parameters.
        config: Arguments of `OpenLlamaBackbone`.
        tokenizer: Version, file, ids of the control tokens, and `keeps_spaces`.
        weights: Handle by format, such as `{"transformers": "hf://user/repo"}`. A
            handle without `hf://` is a directory next to the JSON file.
        version: `"v1"` or `"v2"`.
        notice: Message to show when the preset is first loaded, or `None`.
        license: License of the weights.
        provenance: Origin of the model and its data.
        recipe: Settings for pretraining; empty if there is no recipe.

    Example:
        >>> find("3b_v2").config["hidden_dim"]
        3200
    """

    name: str
    description: str
    parameters: int
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    weights: dict[str, str]
    version: str
    notice: str | None
    license: str
    provenance: dict[str, Any]
    recipe: dict[str, Any]

    @property
    def tokenizer_version(self) -> str:
        """Version of the tokenizer, such as `"v2"`."""
        return self.tokenizer["version"]

    @property
    def handles(self) -> dict[str, str]:
        """Handle of the weights by format, the attribute `weights`."""
        return self.weights


def folder() -> Path:
    """Returns the directory of presets, of the wheel or of the checkout.

    Raises:
        FileNotFoundError: If the installation is incomplete.

    Example:
        >>> (folder() / "open_llama_nano.json").is_file()
        True
    """
    package = Path(__file__).parent
    for path in (package / "_presets", package.parent / "presets"):
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"The presets of {package} are missing. Install keras-openllama again."
    )


@functools.cache
def registry() -> dict[str, Preset]:
    """Returns all presets by name.

    Example:
        >>> registry()["open_llama_3b"].parameters
        3426473600
    """
    presets = {}
    for path in sorted(folder().glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        presets[data["name"]] = Preset(
            name=data["name"],
            description=data["description"],
            parameters=data["parameters"],
            config=data["architecture"],
            tokenizer=data["tokenizer"],
            weights=data["weights"],
            version=data["version"],
            notice=data.get("notice"),
            license=data["license"],
            provenance=data["provenance"],
            recipe=data.get("recipe", {}),
        )
    return presets


def mixture_names() -> list[str]:
    """Returns the sorted names of the data mixtures.

    Example:
        >>> mixture_names()
        ['nano', 'v1', 'v2']
    """
    return sorted(path.stem for path in folder().glob("mixtures/*.json"))


def descriptions() -> dict[str, dict[str, Any]]:
    """Returns `OpenLlamaCausalLM.presets`.

    Returns:
        Dicts with `"description"`, `"parameters"` and `"handles"`, by name of preset.

    Example:
        >>> descriptions()["open_llama_nano"]["handles"]
        {'transformers': 'open_llama_nano'}
    """
    return {
        name: {
            "description": preset.description,
            "parameters": preset.parameters,
            "handles": dict(preset.handles),
        }
        for name, preset in registry().items()
    }


def find(name: str) -> Preset | None:
    """Returns the preset of a name or short name, or `None`.

    Example:
        >>> find("7b_v2").name
        'open_llama_7b_v2'
    """
    return registry().get(name) or registry().get(f"{_PREFIX}{name}")


def nearest_preset(name: str) -> str | None:
    """Returns the known name that is most like a misspelled one, if any is.

    Example:
        >>> nearest_preset("7b_v22")
        'open_llama_7b_v2'
    """
    names = [*registry(), *(full.removeprefix(_PREFIX) for full in registry())]
    nearest = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return find(nearest[0]).name if nearest else None


def unknown_preset_error(name: str, argument: str = "preset") -> ValueError:
    """Returns the error for an unknown name; it suggests the closest known name.

    Args:
        name: The name received.
        argument: Name of the argument, for the message.

    Example:
        >>> "Did you mean 'open_llama_7b_v2'?" in str(unknown_preset_error("7b_v22"))
        True
    """
    nearest = nearest_preset(name)
    hint = f" Did you mean {nearest!r}?" if nearest else ""
    if name.count("/") == 1 and not name.startswith(("/", ".")):
        hint = f" A repository on the Hugging Face Hub is 'hf://{name}'."
    if Path(name).is_file():
        hint = (
            " It is a file: if it is a checkpoint of EasyLM, convert it with "
            "keras-openllama convert, or load it with "
            "`keras_openllama.convert.easylm.load`."
        )
    return ValueError(
        f"`{argument}` must be one of {', '.join(registry())}, the path of a "
        f"directory or GGUF file, or 'hf://user/repo'.{hint} Received: "
        f"{argument}={name!r}"
    )
