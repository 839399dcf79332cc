"""Pretraining recipes: the settings of a preset, and the source of each value.

The JSON file of a preset gives each setting and its source under `"recipe"`. A YAML
file overrides the preset, and the command line overrides both. Reading a recipe imports
neither Keras nor a backend.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from keras_openllama import presets
from keras_openllama.config import PACKINGS
from keras_openllama.runs import device_settings
from keras_openllama.runs.train_config import TrainConfig, checked_field
from keras_openllama.utils import validation
from keras_openllama.utils.text_files import decode_text
from keras_openllama.utils.types import PathLike

COMMAND_LINE = "command line"
DEFAULT = "default: heuristic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(TrainConfig):
    """How to pretrain: training settings, data settings and meshes.

    The file of a preset gives the source of each of its values. The defaults are
    heuristics.

    Attributes:
        mixture: Name in `presets/mixtures/` or path of a JSON file; `None` selects the
            mixture stored with the data.
        packing: `"concatenate"` or `"best_fit"`, see `TokenStream`.
        mask_documents: Whether tokens attend only within their own document.
        meshes: Mesh by number of devices (as a string): sizes of the axes `"data"`,
            `"fsdp"` and `"model"`.
        planned: Memory settings by number of devices (as a string):
            `"sequences_per_device"`, the sequences that a device processes at once,
            from which `micro_batches` follows, and `"rematerialize"`. See
            `ResolvedRecipe.for_devices`.
        precision: `"mixed_bfloat16"` or `"float32"`.
        validation_batches: Batches per validation.

    Raises:
        ValueError: if a setting is invalid, or conflicts with another one.

    Example:
        >>> recipe = preset_recipe("7b").replace(batch_size=1024)
        >>> recipe.tokens_per_step
        2097152
        >>> recipe.mesh_for(256)
        {'data': 4, 'fsdp': 64, 'model': 1}
    """

    mixture: str | None = checked_field(
        validation.name_or_json_path(presets.mixture_names)
    )
    packing: str = checked_field(validation.one_of(*PACKINGS))
    mask_documents: bool = checked_field(validation.one_of(False, True), False)
    meshes: dict = dataclasses.field(metadata={"check": device_settings.check_meshes})
    planned: dict = dataclasses.field(
        default_factory=dict, metadata={"check": device_settings.check_planned}
    )
    precision: str = checked_field(
        validation.one_of("mixed_bfloat16", "float32"), "mixed_bfloat16"
    )
    validation_batches: int = checked_field(validation.integer_at_least(1), 8)

    def replace(self, **changes: Any) -> Recipe:
        """Returns a copy with some settings replaced; no other setting changes.

        Args:
            **changes: New values by setting.

        Returns:
            The new recipe, validated.

        Raises:
            ValueError: for an unknown setting, or an invalid value.
        """
        _check_known(changes)
        return dataclasses.replace(self, **changes)

    def mesh_for(self, num_devices: int) -> dict[str, int]:
        """Returns the mesh for a number of devices.

        Args:
            num_devices: Number of devices.

        Returns:
            Sizes of the axes: `"data"`, the number of replicas of the model; `"fsdp"`,
            the devices that shard a replica and the batch; `"model"`, the devices that
            split each matrix (tensor parallelism). If the recipe has no mesh for this
            number, all devices form the axis `"fsdp"`, which is a heuristic;
            `ResolvedRecipe.mesh_source` tells the two cases apart.
        """
        num_devices = validation.check_integer("num_devices", num_devices)
        fsdp = {"data": 1, "fsdp": num_devices, "model": 1}
        return dict(self.meshes.get(str(num_devices), fsdp))


SETTINGS = {field.name: field for field in dataclasses.fields(Recipe)}


def _checked(name, value):
    field = SETTINGS[name]
    try:
        return field.metadata["check"](name, value)
    except ValueError as error:
        number = _whole_number(value) if field.type == "int" else None
        if number is None:
            raise
        # YAML 1.1 parses 5e5 as a string, and 5.0e+5 as a float.
        raise ValueError(f"{error}. Write it in digits: {number}") from error


def _whole_number(value):
    """Returns a non-negative integer that was written as a float, or `None`."""
    if not isinstance(value, (str, float)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number >= 0 and number.is_integer() else None


def _check_known(names: Iterable[str]) -> None:
    for name in names:
        if name not in SETTINGS:
            nearest = difflib.get_close_matches(str(name), SETTINGS, n=1, cutoff=0.5)
            hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(
                f"A recipe has no setting {name!r}. {hint}Its settings: "
                f"{', '.join(SETTINGS)}."
            )


@dataclasses.dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe, and the source of each of its settings.

    Attributes:
        preset: Full name of the preset that the recipe is based on.
        recipe: The settings.
        sources: Source by setting: the one given in the preset's file, the path of the
            YAML file, `"command line"` or `"default: heuristic"`.
    """

    preset: str
    recipe: Recipe
    sources: dict[str, str]

    def for_devices(
        self, num_devices: int, mesh: Mapping[str, int] | None = None
    ) -> ResolvedRecipe:
        """Returns the recipe as it runs on a number of devices.

        The recipe's `planned` entry for this number sets `micro_batches` and
        `rematerialize`, unless a file or the command line sets them. It is ignored if
        the precision or the sequence length differs from the preset's, because memory
        was planned for those.

        Args:
            num_devices: Number of devices.
            mesh: Sizes of the mesh axes; the recipe's mesh by default.

        Returns:
            The recipe with these settings, or `self` if nothing was planned.

        Example:
            >>> resolved = resolve_recipe("7b_v2")
            >>> resolved.for_devices(256).recipe.rematerialize
            'products'
        """
        recipe, base = self.recipe, _resolved_preset(self.preset)
        plan = recipe.planned.get(str(num_devices))
        mesh = mesh or recipe.mesh_for(num_devices)
        batch_shards = mesh["data"] * mesh["fsdp"]
        differs = any(  # A sequence needs another amount of memory than planned.
            getattr(recipe, name) != getattr(base.recipe, name)
            for name in ("precision", "sequence_length")
        )
        if plan is None or differs or recipe.batch_size % batch_shards:
            return self
        per_shard = recipe.batch_size // batch_shards
        # The smallest divisor that makes a micro-batch small enough.
        divisors = (n for n in range(1, per_shard + 1) if per_shard % n == 0)
        at_once = plan["sequences_per_device"]
        planned = {
            "micro_batches": next(n for n in divisors if per_shard <= n * at_once),
            "rematerialize": plan["rematerialize"],
        }
        changes = {
            name: value
            for name, value in planned.items()
            if self.sources[name] == base.sources[name]
        }
        sources = dict.fromkeys(changes, self.sources["planned"])
        return ResolvedRecipe(
            self.preset, recipe.replace(**changes), {**self.sources, **sources}
        )

    def mesh_source(self, num_devices: int) -> str:
        """Returns the source of `recipe.mesh_for(num_devices)`.

        Args:
            num_devices: Number of devices.

        Returns:
            The source of the recipe's meshes, or a note that the mesh is a heuristic.
        """
        if str(num_devices) in self.recipe.meshes:
            return self.sources["meshes"]
        return (
            f"heuristic: FSDP over all devices; the recipe has no mesh for "
            f"{num_devices} devices"
        )

    def table(self) -> str:
        """Formats settings, values and sources as a table of at most 100 columns.

        Returns:
            The lines of the table. Long values and sources are shortened there only.
        """
        rows = [("setting", "value", "from")]
        for name in SETTINGS:
            value = _format_value(name, getattr(self.recipe, name))
            rows.append((name, value, _short_source(self.sources[name])))
        left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
        right = 100 - left - middle - 4
        return "\n".join(
            f"{name:{left}}  {value:{middle}}  {_shortened(source, right)}".rstrip()
            for name, value, source in rows
        )

    def to_json(self) -> dict[str, Any]:
        """Returns value and source of each setting as a dict that JSON can store."""
        values = dataclasses.asdict(self.recipe)
        return {
            "preset": self.preset,
            "recipe": {
                name: {"value": values[name], "source": self.sources[name]}
                for name in SETTINGS
            },
        }


def preset_recipe(preset: str) -> Recipe:
    """Returns the recipe of a preset, without any overrides.

    Args:
        preset: Name or short form, such as `"open_llama_7b"` or `"7b"`.

    Returns:
        The recipe.

    Raises:
        ValueError: if the preset is unknown, or has no recipe.

    Example:
        >>> preset_recipe("13b").learning_rate
        0.00015
    """
    return resolve_recipe(preset).recipe


def resolve_recipe(
    preset: str,
    *,
    file: PathLike | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ResolvedRecipe:
    """Returns the recipe of a preset, overridden by a file and by the command line.

    If `steps` is overridden and is not above the preset's `warmup_steps`, and
    `warmup_steps` is not overridden too, the warmup becomes a tenth of the steps, and
    its source says so. No other setting changes implicitly.

    Args:
        preset: Name or short form.
        file: YAML file that maps settings to values.
        overrides: Values by setting, from the command line. They override the file.

    Returns:
        The recipe and the source of each setting.

    Raises:
        ValueError: if the preset or a setting is unknown, or a value is invalid.
        OSError: if the file cannot be read.

    Example:
        >>> resolved = resolve_recipe("7b", overrides={"steps": 20})
        >>> resolved.recipe.warmup_steps
        2
        >>> resolved.sources["steps"]
        'command line'
    """
    base = _resolved_preset(preset)
    recipe = base.recipe
    layers = [] if file is None else [(str(file), _read_yaml(file))]
    layers.append((COMMAND_LINE, overrides or {}))
    changes, sources = {}, dict(base.sources)
    for source, values in layers:
        changes |= _checked_values(source, values)
        sources |= dict.fromkeys(values, source)
    steps = changes.get("steps", recipe.steps)
    if "warmup_steps" not in changes and recipe.warmup_steps >= steps:
        # At least one step, unless there is only one step in total.
        changes["warmup_steps"] = min(max(1, steps // 10), steps - 1)
        sources["warmup_steps"] = (
            f"heuristic: a tenth of the steps, shortened from {recipe.warmup_steps}"
        )
    return ResolvedRecipe(base.preset, recipe.replace(**changes), sources)


def _checked_values(source, values):
    """Validates the values of a file or the command line; errors name the source."""
    try:
        _check_known(values)
        return {name: _checked(name, value) for name, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _resolved_preset(name):
    preset = presets.find(name)
    known = [other.name for other in presets.registry().values() if other.recipe]
    if preset is None or not preset.recipe:
        problem = "Unknown preset" if preset is None else "No recipe is known for"
        nearest = presets.nearest_preset(name) if preset is None else None
        hint = f"Did you mean {nearest!r}? " if nearest else ""
        raise ValueError(
            f"{problem} {name!r}. {hint}Presets with a recipe: {', '.join(known)}."
        )
    return _parse_recipe(preset.name, preset.recipe, f"The recipe of {preset.name}")


def _parse_recipe(preset, settings, where):
    """Parses settings with their sources; error messages start with `where`."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where} must be a dict. Received: {str(settings)[:200]!r}")
    for name, entry in settings.items():
        if not isinstance(entry, dict) or {*entry} != {"value", "source"}:
            raise ValueError(
                f"{where} must give 'value' and 'source' of each setting. Received: "
                f"{name}={entry!r}"
            )
    missing = [
        name
        for name, field in SETTINGS.items()
        if field.default is field.default_factory and name not in settings
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}. Add them.")
    values = {name: entry["value"] for name, entry in settings.items()}
    sources = {name: entry["source"] for name, entry in settings.items()}
    recipe = Recipe(**_checked_values(where, values))
    sources = {**dict.fromkeys(SETTINGS, DEFAULT), **sources}
    return ResolvedRecipe(preset, recipe, sources)


def _read_yaml(path):
    import yaml  # Of the extra `train`; `pretrain --help` works without.

    text = decode_text(Path(path).read_bytes(), path)
    try:
        values = yaml.safe_load(text)
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if values is None:  # The file has only comments.
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must map settings to values, such as 'steps: 1000'. Received: "
            f"{str(values)[:200]!r}"
        )
    keys = [key.value for key, _ in node.value]
    duplicates = sorted({key for key in keys if keys.count(key) > 1})
    if duplicates:  # PyYAML silently takes the last one.
        raise ValueError(
            f"{path} sets {', '.join(duplicates)} twice. Remove one of them."
        )
    return values


# ----- Formatting of the table


def _format_value(name, value):
    if name in ("meshes", "planned") and value:
        counts = [int(number) for number in value]
        span = "-".join(map(str, sorted({min(counts), max(counts)})))
        value = f"{span} chips"
    return _shortened("none" if value in (None, {}) else str(value), 24)


def _short_source(source):
    """Shortens GitHub URLs to `owner/repository/path` or `owner/repository#number`."""
    source = re.sub(r"https://github\.com/(\S+?/\S+?)/issues/(\d+)", r"\1#\2", source)
    return re.sub(
        r"https://github\.com/([^/\s]+/[^/\s]+)(/blob/[^/\s]+)?", r"\1", source
    )


def _shortened(text, width):
    """Cuts prose at its end, and text without spaces, such as a path, in its middle."""
    if len(text) <= width:
        return text
    if " " in text[:width]:
        return textwrap.shorten(text, width, placeholder=" …")
    tail = width // 2
    return f"{text[: width - tail - 1]}…{text[-tail:]}"
