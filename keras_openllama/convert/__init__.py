"""Converts models between checkpoint formats.

>>> from keras_openllama.convert import convert, easylm
>>> _ = convert("open_llama_nano", "params", to="easylm")
>>> lm = easylm.load("params", "open_llama_nano")
"""

from pathlib import Path
from typing import Any

from keras_openllama import presets
from keras_openllama.checkpoints.export_config import ExportConfig, missing_preset_error
from keras_openllama.checkpoints.outputs import OutputFile
from keras_openllama.checkpoints.writer import write_model
from keras_openllama.convert import easylm
from keras_openllama.convert.empty_task import build_empty_task
from keras_openllama.convert.source_contents import contents_of_source
from keras_openllama.loading import load
from keras_openllama.loading.sources import EasyLMSource
from keras_openllama.loading.weight_types import WeightTypes, stored_formats
from keras_openllama.utils.file_types import is_gguf_file
from keras_openllama.utils.types import PathLike

__all__ = ["convert", "easylm"]


def convert(
    source: PathLike,
    target: PathLike,
    to: str,
    *,
    preset: PathLike | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    **options: Any,
) -> list[OutputFile]:
    """Converts a model to another format, with only a few tensors in memory at a time.

    Args:
        source: A preset of `OpenLlamaCausalLM.from_preset`, such as the path of a GGUF
            file, or the path of an EasyLM file. A repository on the Hub is downloaded
            first.
        target: Path of the directory to write; for EasyLM and GGUF, of the file.
        to: The target format: `"transformers"`, `"easylm"`, `"keras"` or `"gguf"`.
        preset: Source of architecture and tokenizer for an EasyLM file: a name, a
            directory or `"hf://user/repo"`.
        revision: Branch, tag or commit of a repository on the Hub.
        dry_run: Whether to only return the list of files, and write nothing.
        **options: `dtype`, `quantization`, `max_shard_size`, `content`, `tokenizer` and
            `force`, see `checkpoints.export_config.ExportConfig`.

    Returns:
        The files that were (or would be) written.

    Raises:
        ValueError: If the preset, format, dtype or size is unknown, files are damaged
            or belong to another model, or a value exceeds the range of the dtype.
        OSError: If a file is unavailable or cannot be read or written, or the target
            exists.

    Example:
        >>> _ = convert("open_llama_nano", "nano.msgpack", to="easylm")
        >>> files = convert(
        ...     "nano.msgpack", "nano_hf", to="transformers", preset="open_llama_nano"
        ... )
        >>> files[-1].name
        'model.safetensors'
    """
    config = ExportConfig(target, to, **options)
    config.check_target()
    known = presets.find(str(source))  # A preset takes precedence over a file.
    is_easylm = not known and Path(source).is_file() and not is_gguf_file(source)
    easylm_file = Path(source) if is_easylm else None
    if easylm_file is None and preset is not None:
        raise ValueError(
            f"`preset` applies only to EasyLM files, and {str(source)!r} is none. "
            f"Received: preset={preset!r}"
        )
    if easylm_file is not None and preset is None:
        raise missing_preset_error(source)
    model = load.find_source(
        preset if easylm_file else source,
        revision,
        build_empty_task,
        argument="preset" if easylm_file else "source",
    )
    contents = contents_of_source(
        EasyLMSource(easylm_file, model) if easylm_file else model,
        tokenizer=config.tokenizer and config.to != "easylm",
        origin=load.describe_origin(source, revision, easylm_file is not None),
        paths=[
            path
            for path in (source, preset)
            if path and not presets.find(str(path)) and Path(path).exists()
        ],
    )

    def build(arguments, dtype, *others):
        types = WeightTypes(dtype, config.quantization or "auto")
        policy = types.policy(arguments, stored_formats(contents.tensors))
        return build_empty_task(arguments, policy, *others)

    return write_model(contents, config, dry_run, build)
