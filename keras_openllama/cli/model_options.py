"""Flags of commands that load a model, and the loading."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from keras_openllama.cli import arguments as types
from keras_openllama.cli.process import add_backend, quiet_tensorflow

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

DEFAULT_PRESET = "open_llama_nano"


def add_model_options(
    group: argparse._ArgumentGroup, named_adapters: bool = False
) -> None:
    """Adds the flags of a model to a group, for `load_model`.

    Args:
        group: Group of a parser.
        named_adapters: Whether `--adapters` may be given several times; it is a list
            then, and the caller loads what it names.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_model_options(parser.add_argument_group("the model"))
        >>> parser.parse_args(["--dtype", "bfloat16"]).preset
        'open_llama_nano'
    """
    group.add_argument(
        "--preset",
        default=DEFAULT_PRESET,
        help="a name that `presets` lists, a directory, a run that trains all weights, "
        "a GGUF file, hf://user/repo or hf://user/repo/file.gguf (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--revision",
        help="branch, tag or commit on the Hugging Face Hub (default: the main branch)",
    )
    if named_adapters:
        group.add_argument(
            "--adapters",
            metavar="[NAME=]DIR",
            action="append",
            help="LoRA adapters, in a directory that `finetune` or PEFT wrote, or in "
            "hf://user/repo. Without NAME all requests use them. With it, those do "
            "whose `model` is the name of the model, + and NAME; may be given several "
            "times",
        )
    else:
        group.add_argument(
            "--adapters",
            metavar="DIR",
            help="LoRA adapters to load into the model: a directory that `finetune` or "
            "PEFT wrote, or hf://user/repo",
        )
    add_backend(group)
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: float32); bfloat16 halves the memory",
    )
    types.add_quantization(group)


def load_model(options: argparse.Namespace) -> OpenLlamaCausalLM:
    """Loads the model of the flags, after `process.choose_backend`.

    Args:
        options: Parsed flags of `add_model_options`. Adapters are loaded if it has
            one directory, not a list.

    Raises:
        ValueError: If the files are of another model.
        OSError: If a file is unavailable.
    """
    with quiet_tensorflow():
        from keras_openllama.models.causal_lm import OpenLlamaCausalLM

    lm = OpenLlamaCausalLM.from_preset(
        options.preset,
        dtype=options.dtype,
        revision=options.revision,
        quantization=options.quantization or "auto",
    )
    if isinstance(options.adapters, str):
        lm.load_adapters(options.adapters)
    return lm
