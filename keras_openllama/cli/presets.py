"""`keras-openllama presets`: lists the models, their sizes and the local cache.

The module does not import Keras, so that the command is fast.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_openllama.checkpoints.weight_sizes import weight_bytes
from keras_openllama.cli.command import CommandParser, command
from keras_openllama.presets import registry

_COUNT_UNITS = ("", "K", "M", "B")
_TYPES = ("bfloat16", "int8", "int4")
_HEADER = (
    *("NAME", "PARAMETERS", *map(str.upper, _TYPES)),
    *("TOKENIZER", "WEIGHTS", "IN THE CACHE"),
)
BYTE_UNITS = (" B", " kB", " MB", " GB")
# Weights in one of these formats: a single file, or an index and its shards.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

DESCRIPTION = """\
List the presets, with the size of their weights in bfloat16, and as --quantization int8
and int4 of other commands store them, and whether they are in the local cache of the
Hugging Face Hub. The environment variables HF_HOME and HF_HUB_CACHE set the directory
of the cache.

    %(prog)s           # a table
    %(prog)s --json    # the same for programs, with sizes in bytes
"""


@command("presets")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    parser = CommandParser(prog, description=DESCRIPTION)
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of a table"
    )
    options = parser.parse_args(arguments)
    rows = preset_rows()
    print(json.dumps(rows, indent=2) if options.json else as_table(rows))


def preset_rows() -> list[dict[str, Any]]:
    """Describes every preset, in order of size.

    Returns:
        JSON-compatible dicts; sizes are in bytes.

    Example:
        >>> preset_rows()[0]["name"]
        'open_llama_nano'
    """
    rows = []
    for preset in sorted(registry().values(), key=lambda preset: preset.parameters):
        handle = preset.weights["transformers"]
        sizes = weight_bytes(preset.config)
        state, size = cache_state(handle)
        rows.append(
            {
                "name": preset.name,
                "parameters": preset.parameters,
                "float16_bytes": sizes["bfloat16"],
                **{f"{name}_bytes": size for name, size in sizes.items()},
                "tokenizer": preset.tokenizer_version,
                "weights": handle if handle.startswith("hf://") else "in the package",
                "cached": state,
                "cached_bytes": size,
                "description": preset.description,
            }
        )
    return rows


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the rows of `preset_rows` as a table of several lines."""
    table = [_HEADER]
    for row in rows:
        cached = row["cached"]
        if row["cached_bytes"]:
            cached += f", {with_unit(row['cached_bytes'], BYTE_UNITS)}"
        table.append(
            (
                row["name"],
                with_unit(row["parameters"], _COUNT_UNITS),
                *(with_unit(row[f"{name}_bytes"], BYTE_UNITS) for name in _TYPES),
                row["tokenizer"],
                row["weights"],
                cached,
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def with_unit(number: float, units: Sequence[str]) -> str:
    """Formats a number with three digits and a unit, each 1000 times the one before.

    Example:
        >>> with_unit(6_852_947_200, BYTE_UNITS)
        '6.85 GB'
    """
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number /= 1000
        power += 1
    decimals = max(0, 3 - len(str(int(number)))) if power else 0
    return f"{number:.{decimals}f}{units[power]}"


def cache_state(handle: str) -> tuple[str, int]:
    """Returns whether the files of a preset are on this machine.

    Args:
        handle: A repository as `hf://user/repo`, or the name of a directory of the
            package.

    Returns:
        `(state, size)`. The state is `"yes"` if a complete snapshot with weights and
        tokenizer is in the cache, so that it loads without a network; `"partly"`;
        `"no"`; or `"embedded"` for files of the package. The size is in bytes and
        includes interrupted downloads.

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
