"""`keras-openllama presets`: the models, their sizes, and what is in the cache.

It answers at once, so nothing here imports Keras.
"""

import json
from pathlib import Path

from keras_openllama.cli.command import CommandParser, command
from keras_openllama.presets import registry

_COUNTS = ("", "K", "M", "B")
BYTES = (" B", " kB", " MB", " GB")
# One format is enough to load from: each is one file, or an index beside its shards.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

DESCRIPTION = """\
Lists the models that have a name, with the size of their weights in float16 and what
of them is in the local cache of the Hugging Face Hub (HF_HOME or HF_HUB_CACHE move it).
"""


@command("presets")
def main(arguments, prog):
    """Runs the command; returns the exit code."""
    parser = CommandParser(prog, description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    options = parser.parse_args(arguments)
    rows = preset_rows()
    print(json.dumps(rows, indent=2) if options.json else as_table(rows))


def preset_rows():
    """Describes every preset, the smallest first.

    Returns:
        List of dicts of what JSON can hold; sizes are in bytes.
    """
    rows = []
    for preset in sorted(registry().values(), key=lambda preset: preset.parameters):
        handle = preset.weights["transformers"]
        state, size = cache_state(handle)
        rows.append(
            {
                "name": preset.name,
                "parameters": preset.parameters,
                "float16_bytes": 2 * preset.parameters,
                "tokenizer": preset.tokenizer_version,
                "weights": handle if handle.startswith("hf://") else "in the package",
                "cached": state,
                "cached_bytes": size,
                "description": preset.description,
            }
        )
    return rows


def as_table(rows):
    """Lays the rows of `preset_rows` out in columns.

    Returns:
        String of several lines.
    """
    table = [("NAME", "PARAMETERS", "FLOAT16", "TOKENIZER", "WEIGHTS", "IN THE CACHE")]
    for row in rows:
        cached = row["cached"]
        if row["cached_bytes"]:
            cached += f", {scaled(row['cached_bytes'], BYTES)}"
        table.append(
            (
                row["name"],
                scaled(row["parameters"], _COUNTS),
                scaled(row["float16_bytes"], BYTES),
                row["tokenizer"],
                row["weights"],
                cached,
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def scaled(number, units):
    """Shortens a number to three digits and a unit, each 1000 times the one before.

    Example:
        >>> scaled(6_852_947_200, (" B", " kB", " MB", " GB"))
        '6.85 GB'
    """
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number /= 1000
        power += 1
    decimals = max(0, 3 - len(str(int(number)))) if power else 0
    return f"{number:.{decimals}f}{units[power]}"


def cache_state(handle):
    """Tells what of a preset's files is on this machine.

    Args:
        handle: string, a repository as `hf://user/repo`, or the name of a directory
            that comes with the package.

    Returns:
        `(state, size)`: `"yes"` when a whole snapshot is there, weights and
        tokenizer, so that it loads without a network; `"partly"`; `"no"`; or
        `"embedded"` for what comes with the package. The size is in bytes, and counts
        interrupted downloads as well.

    Example:
        >>> cache_state("open_llama_nano")
        ('embedded', 0)
    """
    if not handle.startswith("hf://"):
        return "embedded", 0
    from huggingface_hub import constants

    name = "models--" + handle.removeprefix("hf://").replace("/", "--")
    repository = Path(constants.HF_HUB_CACHE, name)
    blobs = repository.glob("blobs/*")
    size = sum(blob.stat().st_size for blob in blobs if blob.is_file())
    if not size:
        return "no", 0
    complete = any(_is_complete(path) for path in repository.glob("snapshots/*"))
    return ("yes" if complete else "partly"), size


def _is_complete(snapshot):
    if not (snapshot / "tokenizer.model").exists():
        return False
    for single, index in _WEIGHTS:
        if (snapshot / single).exists():
            return True
        if (snapshot / index).exists():
            shards = json.loads((snapshot / index).read_bytes())["weight_map"].values()
            if all((snapshot / shard).exists() for shard in set(shards)):
                return True
    return False
