"""Models from one format into another.

from keras_openllama.convert import convert, easylm
convert("open_llama_3b_v2", "3b_v2.msgpack", to="easylm", dtype="bfloat16")
lm = easylm.load("3b_v2.msgpack", "open_llama_3b_v2")
"""

from pathlib import Path

from keras_openllama import presets
from keras_openllama.checkpoints.writer import WriteRequest, write_model
from keras_openllama.convert import easylm
from keras_openllama.convert.empty_task import build_task
from keras_openllama.convert.source_contents import contents_of
from keras_openllama.loading import load
from keras_openllama.loading.sources import EasyLMSource

__all__ = ["convert", "easylm"]


def convert(
    source, target, to, *, preset=None, revision=None, dry_run=False, **options
):
    """Converts a model; memory holds a few tensors at a time.

    Args:
        source: what `OpenLlamaCausalLM.from_preset` takes, or the path of a file of
            EasyLM. From the Hub it is downloaded first.
        target, to: see `checkpoints.writer.WriteRequest`.
        preset: for a file of EasyLM, the model whose weights they are: a name, a
            directory or `"hf://user/repo"`, for architecture and tokenizer.
        revision: branch, tag or commit of a repository on the Hub.
        dry_run: bool, whether to only tell what would be written.
        **options: see `checkpoints.writer.WriteRequest`.

    Returns:
        List of `outputs.Output`, the files that were (or would be) written.

    Raises:
        ValueError: for an unknown preset, format, dtype or size; if files are damaged
            or not this model's; if a value is beyond the range of the dtype.
        OSError: if a file cannot be had, read or written, or the target exists.

    Example:

    ```python
    convert("open_llama_3b_v2", "3b_v2.msgpack", to="easylm", dtype="bfloat16")
    convert("3b_v2.msgpack", "3b_v2_hf", to="transformers", preset="3b_v2")
    ```
    """
    request = WriteRequest(target, to, **options)
    request.check_target()
    known = presets.find(str(source))  # A name comes before a file of that name.
    easylm_file = Path(source) if not known and Path(source).is_file() else None
    if easylm_file is None and preset is not None:
        raise ValueError(
            "`preset` tells the architecture of a file of EasyLM, and there is no file "
            f"{str(source)!r}. Received: preset={preset!r}"
        )
    if easylm_file is not None and preset is None:
        raise ValueError(
            f"{source} is a file, as EasyLM writes it, which says neither how many "
            "heads its model has nor which tokenizer: name the model with `preset` "
            "(--preset), such as open_llama_3b_v2 or a directory with a config.json."
        )
    model = load.find_source(preset if easylm_file else source, revision, build_task)
    contents = contents_of(
        EasyLMSource(easylm_file, model) if easylm_file else model,
        tokenizer=request.tokenizer and not request.single_file,
        origin=load.origin(source, revision, easylm_file is not None),
        paths=[
            path
            for path in (source, preset)
            if path and not presets.find(str(path)) and Path(path).exists()
        ],
    )
    return write_model(contents, request, dry_run, build_task)
