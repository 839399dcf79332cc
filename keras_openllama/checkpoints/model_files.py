"""Decides which directories an export may replace: those that hold only a model."""

import json
from pathlib import Path

_CONFIGS = ("config.json", "adapter_config.json", "genai_config.json")
_ASSETS = "assets"
# Names of the files that exports and `save_adapters` write.
_NAMES = (
    *_CONFIGS,
    "adapter_model.safetensors",
    "generation_config.json",
    "model.onnx",
    "model.onnx.data",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "README.md",
    "metadata.json",
    "task.json",
    "preprocessor.json",
    "model*.weights.h5",
    "model.weights.json",
    "task.weights.h5",
    _ASSETS,
    "assets/tokenizer",
)


def foreign_content(directory: Path) -> str | None:
    """Describes what a directory contains that no export writes.

    `utils.staging.staged` refuses to replace a directory for which this returns a
    description.

    Args:
        directory: Path of an existing directory.

    Returns:
        A description such as `"holds 'thesis.tex'"`, or `None` if the directory holds
        only a model.

    Example:
        >>> _ = Path("thesis.tex").write_text("")
        >>> foreign_content(Path("."))
        "holds 'thesis.tex'"
    """
    paths = sorted(directory.iterdir())
    if (directory / _ASSETS).is_dir():
        paths += (directory / _ASSETS).iterdir()
    for path in paths:
        if not any(map(path.match, _NAMES)):
            return f"holds {str(path.relative_to(directory))!r}"
    if not any(_is_config(directory / name) for name in _CONFIGS):
        return f"has no {_CONFIGS[0]} of a model"
    return None


def _is_config(path):
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    keys = {"model_type", "registered_name", "peft_type", "search"}
    return isinstance(config, dict) and bool(keys & {*config})
