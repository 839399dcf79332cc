"""The registry of presets.

The registry is the folder `presets/` of the repository, one JSON file a preset, which
the wheel carries inside the package. Reading it imports neither Keras nor a network
library.
"""

import dataclasses
import difflib
import functools
import json
from pathlib import Path

_PREFIX = "open_llama_"  # Short forms drop it.


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model, as its JSON file describes it.

    Attributes:
        name: string, such as `"open_llama_7b_v2"`.
        description: string, one sentence.
        parameters: int, number of parameters.
        config: dict, arguments of `OpenLlamaBackbone`.
        tokenizer: dict: version, file, ids of the control tokens, `keeps_spaces`.
        weights: dict, handle by format, such as `{"transformers": "hf://user/repo"}`;
            what is no `hf://` is a directory beside the JSON file.
        version: string, `"v1"` or `"v2"`.
        notice: string that a user is told once, or `None`.
        license: string, the licence of the weights.
        provenance: dict: where model and data come from.
        recipe: dict, how it is pretrained; empty where there is no recipe.
    """

    name: str
    description: str
    parameters: int
    config: dict
    tokenizer: dict
    weights: dict
    version: str
    notice: str | None
    license: str
    provenance: dict
    recipe: dict

    @property
    def tokenizer_version(self):
        return self.tokenizer["version"]

    @property
    def handles(self):
        return self.weights

    @property
    def notes(self):
        return self.notice


def folder():
    """Path of the folder of presets: in the wheel, or else in the checkout."""
    package = Path(__file__).parent
    for path in (package / "_presets", package.parent / "presets"):
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"The presets are missing beside {package}. Install keras-openllama again."
    )


@functools.cache
def registry():
    """All presets.

    Returns:
        Dict of `Preset` by name.

    Example:

    ```python
    registry()["open_llama_3b"].parameters  # 3426473600
    ```
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


def mixture_names():
    """Names of the data mixtures in the folder of presets, in order."""
    return sorted(path.stem for path in folder().glob("mixtures/*.json"))


def descriptions():
    """What `OpenLlamaCausalLM.presets` shows.

    Returns:
        Dict by name of dicts with `"description"`, `"parameters"` and `"handles"`.
    """
    return {
        name: {
            "description": preset.description,
            "parameters": preset.parameters,
            "handles": dict(preset.handles),
        }
        for name, preset in registry().items()
    }


def find(name):
    """The preset of a name or short form, or `None`.

    Example:

    ```python
    find("7b_v2").name  # "open_llama_7b_v2"
    ```
    """
    return registry().get(name) or registry().get(f"{_PREFIX}{name}")


def unknown_preset_error(name):
    """The `ValueError` for a name that is no preset, with the nearest one that is."""
    names = list(registry())
    short = [full.removeprefix(_PREFIX) for full in names]
    nearest = difflib.get_close_matches(name.lower(), names + short, n=1, cutoff=0.5)
    hint = f" Did you mean {find(nearest[0]).name!r}?" if nearest else ""
    if name.count("/") == 1 and not name.startswith(("/", ".")):
        hint = f" A repository on the Hugging Face Hub is 'hf://{name}'."
    return ValueError(
        f"`preset` is none of {', '.join(names)}, and no directory of that path "
        f"exists.{hint} Received: preset={name!r}"
    )
