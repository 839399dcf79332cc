"""The end tokens that a model in the format of transformers declares.

Source: `GenerationConfig` and `LlamaConfig` of transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keras_openllama.utils.files import read_json_object

if TYPE_CHECKING:
    from keras_openllama.checkpoints.repository import Repository
    from keras_openllama.utils.types import PathLike

GENERATION_CONFIG = "generation_config.json"
_SETTING = "eos_token_id"


def read_end_token_ids(
    repository: Repository, config: Mapping[str, Any], path: PathLike
) -> list[int]:
    """Reads the end tokens that `generation_config.json` and `config.json` declare.

    If both files exist, transformers ignores those of `config.json`. Here they count
    too: fine-tuned models often have a new end token in one of the files only. Ids that
    are not in the vocabulary are dropped with a warning.

    Args:
        repository: The repository of the model.
        config: Contents of its `config.json`.
        path: Path of its `config.json`.

    Returns:
        The ids. Empty if none are declared.

    Raises:
        OSError: If `generation_config.json` cannot be read.
        ValueError: If a setting is neither a token id nor a list of them.
    """
    generation = repository.optional(GENERATION_CONFIG)
    files = {generation: read_json_object(generation)} if generation else {}
    files[path] = config
    ids = []
    for file, settings in files.items():
        declared = _parse_ids(settings.get(_SETTING), file)
        ids += _drop_unknown(declared, config["vocab_size"], file)
    return list(dict.fromkeys(ids))


def _parse_ids(value, path):
    values = value if isinstance(value, list) else [] if value is None else [value]
    # Some programs write 2.0 into JSON files.
    ids = [int(i) if isinstance(i, float) and i.is_integer() else i for i in values]
    if not all(type(i) is int for i in ids):
        raise ValueError(
            f"{path} sets {_SETTING}={value!r}, which must be a token id, a list of "
            "token ids, or null. Correct the file."
        )
    return ids


def _drop_unknown(ids, vocabulary_size, path):
    known = [i for i in ids if 0 <= i < vocabulary_size]
    dropped = [i for i in ids if i not in known]
    if dropped:
        warnings.warn(
            f"{path} sets {_SETTING}={ids}, but the ids of the model's tokens are 0 to "
            f"{vocabulary_size - 1}: generation cannot end at "
            f"{', '.join(map(str, dropped))}. Correct the file, or set "
            "`lm.end_token_ids`.",
            stacklevel=2,
        )
    return known


def id_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    """Returns end tokens as transformers writes them: one id, or a list of several.

    Example:
        >>> id_or_list((2,)), id_or_list((2, 77))
        (2, [2, 77])
    """
    return ids[0] if len(ids) == 1 else list(ids) or None
