"""`keras-openllama finetune`: fine-tunes a model on examples."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_openllama.cli.command import command
from keras_openllama.cli.finetune_options import (
    SEQUENCE_LENGTH,
    check_options,
    device_kind,
    make_config,
    parse_arguments,
)
from keras_openllama.cli.process import backend_name, choose_backend
from keras_openllama.cli.training_options import (
    initialize_distributed,
    open_trainer,
    print_on_process_0,
    run_training,
)
from keras_openllama.utils.file_types import GGUF_SUFFIX

if TYPE_CHECKING:
    from keras_openllama.quantization.policies import MatrixFormat
    from keras_openllama.runs.finetune_config import FinetuneConfig


@command("finetune", extra="train", large_pages=True)
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    parser, options = parse_arguments(arguments, prog)
    backend = backend_name(options.backend)
    check_options(parser, options, backend)
    choose_backend(backend)
    if backend != "jax":
        # JAX only writes the checkpoints: the backend needs the accelerator's memory.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.estimate:
        print_estimate(options)
        return 0
    if backend == "jax":
        initialize_distributed(parser, options)
    config = make_config(options)
    if options.output is None:
        name = Path(config.preset).name.removeprefix("open_llama_")
        name = name.removesuffix(GGUF_SUFFIX)
        options.output = f"runs/{name}-finetuned"
    return run_training(prog, options, lambda: finetune(config, options))


def print_estimate(options: argparse.Namespace) -> None:
    """Prints the memory of the run of the flags, or an overview of all presets.

    Raises:
        ValueError: If the run does not fit into memory, or its model is unknown.
    """
    if options.preset:
        from keras_openllama.runs.finetuning import find_model, quantized_formats

        config = make_config(options)
        source, architecture = find_model(config.preset, config.sequence_length)
        formats = quantized_formats(config, source, architecture)
        check_memory(config, architecture, formats, options.mesh)
        return
    from keras_openllama.planning import finetune_memory

    table = finetune_memory.memory_table(
        options.batch_size,
        options.sequence_length or SEQUENCE_LENGTH,
        options.rematerialize,
        device_kind(),
        os.environ["KERAS_BACKEND"],
    )
    print(table)


def finetune(config: FinetuneConfig, options: argparse.Namespace) -> str | None:
    """Trains and exports; returns the signal that stopped the run, or `None`."""
    from keras_openllama.runs import finetuning

    def open_run(run_options):
        return finetuning.open_run(
            config,
            run_options,
            options.sample_prompt,
            options.max_new_tokens,
            lambda *sizes: check_memory(config, *sizes, options.mesh),
            options.max_skipped,
        )

    exports = {"all": (finetuning.ADAPTERS, finetuning.MODEL), "none": ()}
    with open_trainer(options, open_run) as trainer:
        was_complete = trainer.complete
        stopped = trainer.train()
        if not stopped:
            names = exports.get(options.export, (options.export,))
            finetuning.export_model(trainer, config, names, replace=not was_complete)
    if not stopped:
        _print_exports(options.output)
    return stopped


def check_memory(
    config: FinetuneConfig,
    architecture: Mapping[str, Any],
    formats: Mapping[str, MatrixFormat],
    mesh: Mapping[str, int] | None,
) -> None:
    """Prints the memory that the run needs; raises `ValueError` if it does not fit."""
    from keras_openllama.planning import finetune_memory

    widest = max(architecture["hidden_dim"], architecture["intermediate_dim"])
    if (config.lora_rank or 0) > widest:
        raise ValueError(
            f"--lora-rank must be at most {widest}, the longest side of a matrix of "
            f"{config.preset}; 8 to 64 are common. Received: {config.lora_rank}"
        )
    estimate = finetune_memory.estimate_memory(
        architecture,
        config.dtype,
        lora_rank=config.lora_rank,
        targets=config.lora_targets or ("query", "value"),
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        micro_batches=config.micro_batches,
        rematerialize=config.rematerialize,
        formats=formats,
        devices=number_of_devices(mesh),
        backend=os.environ["KERAS_BACKEND"],
        device=device_kind(),
    )
    print_on_process_0(f"Estimated memory of training:\n{estimate.table()}")
    finetune_memory.check_fits(estimate, finetune_memory.available_memory())


def number_of_devices(mesh: Mapping[str, int] | None) -> int:
    """Returns the number of devices in the mesh."""
    if os.environ["KERAS_BACKEND"] != "jax":
        return 1
    import jax

    return math.prod(mesh.values()) if mesh else jax.device_count()


def _print_exports(output):
    for name, hint in (
        ("adapters", "lm.load_adapters({!r}), or peft.PeftModel.from_pretrained"),
        ("model", 'keras-openllama generate "…" --preset {}, or transformers'),
    ):
        path = os.path.join(output, name)
        if os.path.isdir(path):
            print_on_process_0(f"{path}: {hint.format(path)}")
