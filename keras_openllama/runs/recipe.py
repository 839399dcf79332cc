"""Recipes: how a preset is pretrained, and where each setting comes from.

The settings of a preset are in its JSON file under `"recipe"`, each with its source. A
YAML file and the command line change them, in this order. Reading them imports neither
Keras nor a backend.
"""

import dataclasses
import difflib
import re
import textwrap
from pathlib import Path

from keras_openllama import presets
from keras_openllama.config import PACKINGS
from keras_openllama.runs import device_settings
from keras_openllama.runs.train_config import TrainConfig, setting
from keras_openllama.utils import validation

COMMAND_LINE = "command line"
DEFAULT = "default: ours"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(TrainConfig):
    """How to pretrain: the settings of training, of the data and of the devices.

    Attributes (beside those of `TrainConfig`):
        mixture: string, a name of `presets/mixtures/` or the path of a JSON file;
            `None` is the data's own.
        packing: string, `"concatenate"` or `"best_fit"` (`TokenStream`).
        mask_documents: bool, whether tokens see their own document only.
        meshes: dict by number of chips, as a string, of dicts of ints: `"data"`,
            `"fsdp"`, `"model"`.
        planned: dict by number of chips, as a string, of dicts: `"rows"`, int, how many
            sequences of the batch a device takes at once, which makes `micro_batches`;
            and `"rematerialize"`, string. See `Resolved.on`.
        precision: string, `"mixed_bfloat16"` or `"float32"`.
        validation_batches: int, batches of a validation.

    Raises:
        ValueError: if a setting is none of these, or does not fit the others.

    Example:

    ```python
    recipe = from_preset("7b").replace(batch_size=1024)
    recipe.tokens_per_step  # 2097152
    recipe.mesh_for(256)  # {"data": 4, "fsdp": 64, "model": 1}
    ```

    Source: of every value of a preset, in its JSON file. The defaults are heuristics.
    """

    mixture: str | None = setting(validation.name_or_json_path(presets.mixture_names))
    packing: str = setting(validation.one_of(*PACKINGS))
    mask_documents: bool = setting(validation.one_of(False, True), False)
    meshes: dict = dataclasses.field(metadata={"check": device_settings.meshes})
    planned: dict = dataclasses.field(
        default_factory=dict, metadata={"check": device_settings.planned}
    )
    precision: str = setting(
        validation.one_of("mixed_bfloat16", "float32"), "mixed_bfloat16"
    )
    validation_batches: int = setting(validation.integer_at_least(1), 8)

    def replace(self, **changes):
        """The same with other settings; nothing else changes with them.

        Raises:
            ValueError: for an unknown setting, or a value that does not fit.
        """
        _check_known(changes)
        return dataclasses.replace(self, **changes)

    def mesh_for(self, chips):
        """How chips share the work.

        Args:
            chips: int, number of devices.

        Returns:
            Dict of ints: `"data"` groups that hold the model once each, `"fsdp"` chips
            that share it and split the batch further, `"model"` chips that split each
            matrix. It is the recipe's mesh for that number or else, which is ours,
            FSDP over all chips; `Resolved.mesh_source` says which.
        """
        validation.integer_at_least(1)("chips", chips)
        fsdp = {"data": 1, "fsdp": chips, "model": 1}
        return dict(self.meshes.get(str(chips), fsdp))


SETTINGS = {field.name: field for field in dataclasses.fields(Recipe)}


def _checked(name, value):
    return SETTINGS[name].metadata["check"](name, value)


def _check_known(names):
    for name in names:
        if name not in SETTINGS:
            nearest = difflib.get_close_matches(str(name), SETTINGS, n=1, cutoff=0.5)
            hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(
                f"A recipe has no setting {name!r}. {hint}Its settings: "
                f"{', '.join(SETTINGS)}."
            )


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A recipe, and where each of its settings comes from.

    Attributes:
        preset: string, full name of the preset that it began with.
        recipe: `Recipe`.
        sources: dict of strings by setting: the preset's source, the path of the YAML
            file, `"command line"` or `"default: ours"`.
    """

    preset: str
    recipe: Recipe
    sources: dict

    def on(self, chips, mesh=None):
        """The recipe as so many chips run it.

        What is planned for them gives `micro_batches` and `rematerialize`, where a file
        or the command line do not; but not for another precision or length of rows than
        it was planned with.

        Args:
            chips: int, number of devices.
            mesh: dict of ints; the recipe's if `None`.

        Returns:
            `Resolved`.
        """
        recipe, published = self.recipe, _published(self.preset)
        plan = recipe.planned.get(str(chips))
        mesh = mesh or recipe.mesh_for(chips)
        groups = mesh["data"] * mesh["fsdp"]
        larger = any(  # More memory for each row than was planned.
            getattr(recipe, name) != getattr(published.recipe, name)
            for name in ("precision", "sequence_length")
        )
        if plan is None or larger or recipe.batch_size % groups:
            return self
        rows = recipe.batch_size // groups
        # The fewest parts of a device's rows that are small enough.
        parts = (n for n in range(1, rows + 1) if rows % n == 0)
        planned = {
            "micro_batches": next(n for n in parts if rows <= n * plan["rows"]),
            "rematerialize": plan["rematerialize"],
        }
        changes = {
            name: value
            for name, value in planned.items()
            if self.sources[name] == published.sources[name]
        }
        sources = dict.fromkeys(changes, self.sources["planned"])
        return Resolved(
            self.preset, recipe.replace(**changes), {**self.sources, **sources}
        )

    def mesh_source(self, chips):
        """Where `recipe.mesh_for(chips)` comes from: string."""
        if str(chips) in self.recipe.meshes:
            return self.sources["meshes"]
        return f"ours: the recipe has no mesh for {chips} chips, so FSDP over all"

    def table(self):
        """Text to print: setting, value and source, at most 100 columns wide.

        Long values and sources are shortened there, and there only.
        """
        rows = [("setting", "value", "from")]
        for name in SETTINGS:
            value = _shown(name, getattr(self.recipe, name))
            rows.append((name, value, _short_source(self.sources[name])))
        left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
        right = 100 - left - middle - 4
        return "\n".join(
            f"{name:{left}}  {value:{middle}}  {_shortened(source, right)}".rstrip()
            for name, value, source in rows
        )

    def to_json(self):
        """A dict that JSON can hold: each setting's value and source."""
        values = dataclasses.asdict(self.recipe)
        return {
            "preset": self.preset,
            "recipe": {
                name: {"value": values[name], "source": self.sources[name]}
                for name in SETTINGS
            },
        }


def from_preset(preset):
    """The recipe of a preset, unchanged.

    Args:
        preset: string, name or short form, such as `"open_llama_7b"` or `"7b"`.

    Returns:
        `Recipe`.

    Raises:
        ValueError: if there is no such preset, or it has no recipe.

    Example:

    ```python
    from_preset("13b").learning_rate  # 0.00015
    ```
    """
    return resolve(preset).recipe


def resolve(preset, *, file=None, overrides=None):
    """The recipe of a run: the preset's, changed by a file and by the command line.

    If `steps` is set below the warm-up, and `warmup_steps` is not set too, the warm-up
    becomes a tenth of the steps; `sources` says so. Nothing else changes unasked.

    Args:
        preset: string, name or short form.
        file: path of a YAML file, a mapping of settings to values; may be `None`.
        overrides: dict by setting, what the command line gave; may be `None`. It goes
            before the file.

    Returns:
        `Resolved`.

    Raises:
        ValueError: if the preset or a setting is unknown, or a value does not fit.
        OSError: if the file cannot be read.

    Example:

    ```python
    resolved = resolve("7b", file="mine.yaml", overrides={"steps": 20})
    print(resolved.table())
    resolved.recipe.warmup_steps  # 2
    ```
    """
    published = _published(preset)
    recipe = published.recipe
    layers = [] if file is None else [(str(file), _read_yaml(file))]
    layers.append((COMMAND_LINE, overrides or {}))
    changes, sources = {}, dict(published.sources)
    for source, values in layers:
        changes |= _from_layer(source, values)
        sources |= dict.fromkeys(values, source)
    steps = changes.get("steps", recipe.steps)
    if "warmup_steps" not in changes and recipe.warmup_steps >= steps:
        # At least one step, unless there is no other.
        changes["warmup_steps"] = min(max(1, steps // 10), steps - 1)
        sources["warmup_steps"] = (
            f"ours: shortened with steps, from {recipe.warmup_steps} to a tenth of them"
        )
    return Resolved(published.preset, recipe.replace(**changes), sources)


def _from_layer(source, values):
    """The values of a file or command line, checked one by one; errors name it."""
    try:
        _check_known(values)
        return {name: _checked(name, value) for name, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _published(name):
    preset = presets.find(name)
    known = [other.name for other in presets.registry().values() if other.recipe]
    if preset is None or not preset.recipe:
        problem = "There is no preset" if preset is None else "No recipe is known for"
        raise ValueError(
            f"{problem} {name!r}. Presets with a recipe: {', '.join(known)}."
        )
    return _parsed(preset.name, preset.recipe, f"The recipe of {preset.name}")


def _parsed(preset, settings, where):
    """`Resolved` of settings with their sources; `where` begins errors."""
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
    recipe = Recipe(**_from_layer(where, values))
    return Resolved(preset, recipe, {**dict.fromkeys(SETTINGS, DEFAULT), **sources})


def _read_yaml(path):
    import yaml  # Of the extra `train`; `pretrain --help` works without.

    text = Path(path).read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if values is None:  # Nothing but comments.
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must map settings to values, such as 'steps: 1000'. Received: "
            f"{str(values)[:200]!r}"
        )
    keys = [key.value for key, _ in node.value]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:  # YAML would let the last one win.
        raise ValueError(f"{path} sets {', '.join(twice)} twice. Remove one of them.")
    return values


# ----- The table


def _shown(name, value):
    if name in ("meshes", "planned") and value:
        chips = [int(number) for number in value]
        value = f"{'-'.join(map(str, sorted({min(chips), max(chips)})))} chips"
    return _shortened("none" if value in (None, {}) else str(value), 24)


def _short_source(source):
    """Addresses on GitHub as `owner/repository/path` and `owner/repository#number`."""
    source = re.sub(r"https://github\.com/(\S+?/\S+?)/issues/(\d+)", r"\1#\2", source)
    return re.sub(
        r"https://github\.com/([^/\s]+/[^/\s]+)(/blob/[^/\s]+)?", r"\1", source
    )


def _shortened(text, width):
    """Prose loses its end, and what has no spaces, such as a path, its middle."""
    if len(text) <= width:
        return text
    if " " in text[:width]:
        return textwrap.shorten(text, width, placeholder=" …")
    tail = width // 2
    return f"{text[: width - tail - 1]}…{text[-tail:]}"
