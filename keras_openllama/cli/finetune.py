"""`keras-openllama finetune`: fine-tunes a model on examples."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_openllama.cli.command import CommandParser, add_renamed_argument, command
from keras_openllama.cli.training_options import (
    add_run_options,
    exit_code,
    join_hosts,
    open_trainer,
    print_on_first_host,
)
from keras_openllama.config import PROJECTIONS, REMATERIALIZATION

if TYPE_CHECKING:
    from keras_openllama.runs.finetuning import FinetuneConfig

DESCRIPTION = """\
Fine-tune a preset on JSON lines: LoRA adapters or all of its weights.

    %(prog)s --preset nano --data pairs.jsonl --lora-rank 8
        train adapters on the responses of {"prompt": …, "response": …} lines
    %(prog)s --preset 7b_v2 --data questions.jsonl --lora-rank 16 \\
        --prompt "Q: {question}\\nA:" --response " {answer}" --output runs/answers
        make prompts and responses from other keys
    %(prog)s --estimate
        print the memory that each kind of fine-tuning needs, and exit

Lines may also be {"messages": [{"role": …, "content": …}, …]}, with --chat-template, or
{"text": …}. The loss is computed on responses, or on the whole text.

The optimizer is AdamW (beta_1 0.9, beta_2 0.95, epsilon 1e-8, gradients clipped to norm
1.0). After the warmup, the learning rate decays to a tenth of its peak by a cosine.

Running the same command again resumes the run. The run's directory holds run.json (the
settings), metrics.jsonl, validation.jsonl, skipped.jsonl (the sequences of skipped
steps), loss.png, generated text before and after in samples.txt, TensorBoard's events,
checkpoints/, and at the end adapters/ (for `lm.load_adapters` and PEFT) and model/
(merged, for transformers and for `keras-openllama generate --preset DIR/model`).

Exit codes:
  0   the run is complete
  1   any other error
  2   invalid argument or example, an argument that does not match the existing run,
      or not enough memory
  70  too many consecutive steps had a non-finite loss or gradient
  74  a file could not be written
  75  stopped by a signal (SIGTERM; in a run of one process Ctrl-C, too); the run is
      saved, and the same command resumes it
  130 Ctrl-C before the first step, or in a run of several processes
"""

DTYPES = ("float32", "bfloat16", "mixed_bfloat16")


def parse_arguments(
    arguments: Sequence[str], prog: str
) -> tuple[CommandParser, argparse.Namespace]:
    """Returns the parser of the command and the parsed arguments."""
    parser = CommandParser(prog, description=DESCRIPTION)
    parser.add_argument(
        "--preset",
        help="the model to fine-tune: a preset such as 7b_v2 or nano, a directory, or "
        "hf://user/repo",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="directory of the run (default: runs/PRESET-finetuned)",
    )
    data = parser.add_argument_group("examples")
    data.add_argument(
        "--data", nargs="+", default=(), metavar="FILE", help="files of JSON lines"
    )
    data.add_argument(
        "--prompt",
        metavar="TEMPLATE",
        help='template of the prompt, such as "Q: {question}\\nA:" '
        '(default: "{prompt}")',
    )
    data.add_argument(
        "--response",
        metavar="TEMPLATE",
        help='template of the response, such as " {answer}" (default: "{response}")',
    )
    data.add_argument(
        "--chat-template",
        metavar="FILE",
        help="JSON file of a template by role, such as "
        '{"user": "USER: {content}\\n", "assistant": "BOT: {content}"}',
    )
    data.add_argument(
        "--validation", metavar="FILE", help="file of JSON lines for validation"
    )
    add_renamed_argument(
        data,
        "--validation-share",
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="X",
        help="fraction of the examples to hold out if --validation is not given "
        "(default: %(default)s)",
    )
    add_renamed_argument(
        data,
        "--length",
        "--sequence-length",
        type=int,
        default=512,
        metavar="N",
        help="tokens of a sequence; longer examples are truncated (default: "
        "%(default)s)",
    )
    data.add_argument(
        "--pack", action="store_true", help="pack several examples into a sequence"
    )
    weights = parser.add_argument_group("trained weights")
    weights.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        metavar="N",
        help="rank of the LoRA adapters; 0 trains all weights (default: %(default)s)",
    )
    weights.add_argument(
        "--lora-alpha",
        type=float,
        metavar="X",
        help="LoRA alpha; updates are scaled by alpha / rank (default: the rank, a "
        "scale of 1)",
    )
    weights.add_argument(
        "--lora-targets",
        nargs="+",
        choices=PROJECTIONS,
        metavar="NAME",
        help="projections that get adapters, of "
        f"{', '.join(PROJECTIONS)} (default: query value)",
    )
    weights.add_argument(
        "--int8", action="store_true", help="quantize the frozen weights to int8"
    )
    weights.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype policy (default: float32 on CPUs; elsewhere bfloat16 with "
        "adapters, mixed_bfloat16 without)",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        type=float,
        default=3.0,
        metavar="X",
        help="passes over the examples (default: %(default)s)",
    )
    training.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="sequences per step (default: %(default)s)",
    )
    training.add_argument(
        "--learning-rate",
        type=float,
        metavar="X",
        help="peak of the warmup-cosine schedule (default: 2e-4 with adapters, else "
        "2e-5)",
    )
    training.add_argument(
        "--warmup",
        type=float,
        default=0.03,
        metavar="X",
        help="warmup as a fraction of all steps (default: %(default)s)",
    )
    training.add_argument(
        "--weight-decay",
        type=float,
        default=0.0,
        metavar="X",
        help="weight decay of AdamW (default: %(default)s)",
    )
    training.add_argument(
        "--micro-batches",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches per step for gradient accumulation, which saves memory "
        "(JAX; default: %(default)s)",
    )
    training.add_argument(
        "--rematerialize",
        choices=tuple(REMATERIALIZATION),
        default="none",
        help="rematerialization policy (gradient checkpointing), which saves memory "
        "(JAX; default: %(default)s)",
    )
    training.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the adapters' initial values and of the order of the examples "
        "(default: %(default)s)",
    )
    training.add_argument(
        "--backend",
        choices=("jax", "tensorflow", "torch"),
        help="the backend of Keras (default: the environment variable KERAS_BACKEND, "
        "else jax)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--save-every",
        type=int,
        default=100,
        metavar="STEPS",
        help="steps between checkpoints (default: %(default)s)",
    )
    output.add_argument(
        "--validate-every",
        type=int,
        metavar="STEPS",
        help="steps between validations (default: a tenth of the run)",
    )
    add_renamed_argument(
        output,
        "--question",
        "--sample-prompt",
        action="append",
        metavar="TEXT",
        help="prompt to generate from before and after training, used unchanged "
        "(without the template of --prompt); may be given several times (default: "
        "held-out prompts)",
    )
    output.add_argument(
        "--max-new-tokens",
        type=int,
        default=48,
        metavar="N",
        help="maximum number of generated tokens per prompt (default: %(default)s)",
    )
    output.add_argument(
        "--export",
        choices=("all", "adapters", "model", "none"),
        default="all",
        help="what to write at the end: adapters, the merged model, both or nothing. A "
        "run of several processes writes nothing until the same command is run again "
        "on one host (default: %(default)s)",
    )
    estimate = parser.add_argument_group(
        "estimate", "for --batch-size, --sequence-length and --rematerialize"
    )
    estimate.add_argument(
        "--estimate",
        action="store_true",
        help="print the memory that training needs, for every preset, and exit",
    )
    add_run_options(parser)
    return parser, parser.parse_args(arguments)


def make_config(parser: CommandParser, options: argparse.Namespace) -> FinetuneConfig:
    """Validates the flags and makes a `finetuning.FinetuneConfig` of them."""
    from keras_openllama.runs.finetuning import FinetuneConfig

    if not options.preset:
        parser.error("--preset is required: name the model to fine-tune.")
    if not options.data:
        parser.error("--data is required: name files of examples (JSON lines).")
    paths = [("--data", path) for path in options.data]
    if options.validation:
        paths.append(("--validation", options.validation))
    for flag, path in paths:
        if not Path(path).is_file():
            parser.error(f"{flag}: the file {path} does not exist.")
    positive = (
        *("sequence_length", "batch_size", "micro_batches"),
        *("save_every", "validate_every"),
    )
    for name in positive:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be a positive integer. Received: "
                f"{getattr(options, name)}"
            )
    if options.epochs <= 0 or not 0 <= options.validation_fraction < 1:
        parser.error(
            "--epochs must be positive, and --validation-fraction in [0, 1). Received: "
            f"{options.epochs} and {options.validation_fraction}"
        )
    if options.learning_rate is not None and not options.learning_rate > 0:
        parser.error(
            f"--learning-rate must be positive. Received: {options.learning_rate}"
        )
    check_combinations(parser, options)
    if options.batch_size % options.micro_batches:
        parser.error(
            "--micro-batches must divide --batch-size. Received: "
            f"{options.micro_batches} and {options.batch_size}"
        )
    template = None
    if options.chat_template:
        try:
            template = json.loads(Path(options.chat_template).read_text("utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"--chat-template: {error}")
    return FinetuneConfig(
        preset=options.preset,
        data=tuple(options.data),
        prompt=_unescaped(options.prompt),
        response=_unescaped(options.response),
        chat_template=template,
        validation=options.validation,
        validation_fraction=options.validation_fraction,
        sequence_length=options.sequence_length,
        pack=options.pack,
        lora_rank=options.lora_rank or None,
        lora_alpha=options.lora_alpha,
        lora_targets=options.lora_targets and tuple(options.lora_targets),
        int8=options.int8,
        dtype=options.dtype or default_dtype(options),
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup=options.warmup,
        weight_decay=options.weight_decay,
        micro_batches=options.micro_batches,
        rematerialize=options.rematerialize,
        seed=options.seed,
        save_every=options.save_every,
        validate_every=options.validate_every,
    )


def check_combinations(parser: CommandParser, options: argparse.Namespace) -> None:
    """Rejects LoRA flags without --lora-rank, and unsupported combinations."""
    if options.lora_rank < 0:
        parser.error(f"--lora-rank must not be negative. Received: {options.lora_rank}")
    for name in ("int8", "lora_alpha", "lora_targets"):
        if getattr(options, name) and not options.lora_rank:
            parser.error(f"--{name.replace('_', '-')} needs adapters: add --lora-rank.")
    if options.dtype == "bfloat16" and not options.lora_rank:
        parser.error(
            "--dtype bfloat16 would round small updates to zero. Use --dtype "
            "mixed_bfloat16, or train adapters with --lora-rank."
        )
    if options.int8 and options.export == "model":
        parser.error(
            "--export model: adapters cannot be merged into int8 weights. Use --export "
            "adapters, or remove --int8."
        )
    if options.export == "adapters" and not options.lora_rank:
        parser.error("--export adapters needs adapters: add --lora-rank.")
    saves = options.micro_batches > 1 or options.rematerialize != "none"
    if saves and os.environ["KERAS_BACKEND"] != "jax":
        parser.error(
            "--micro-batches and --rematerialize need the JAX backend: --backend jax."
        )


def _unescaped(template):
    """Replaces escape sequences of new lines and tabs, which shells do not."""
    return template and template.replace("\\n", "\n").replace("\\t", "\t")


def default_dtype(options: argparse.Namespace) -> str:
    """Returns the default of `--dtype`."""
    if device_kind() == "cpu":
        return "float32"
    return "bfloat16" if options.lora_rank else "mixed_bfloat16"


def device_kind() -> str:
    """Returns the kind of device of the backend: `"cpu"` or `"accelerator"`."""
    backend = os.environ["KERAS_BACKEND"]
    if backend == "torch":
        import torch

        found = torch.cuda.is_available()
    elif backend == "tensorflow":
        import tensorflow

        found = tensorflow.config.list_physical_devices("GPU")
    else:
        import jax

        found = jax.default_backend() != "cpu"
    return "accelerator" if found else "cpu"


@command("finetune", extra="train")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    parser, options = parse_arguments(arguments, prog)
    os.environ["KERAS_BACKEND"] = options.backend or os.environ.get(
        "KERAS_BACKEND", "jax"
    )
    if options.estimate:
        from keras_openllama.planning import finetune_memory

        print(
            finetune_memory.memory_table(
                options.batch_size,
                options.sequence_length,
                options.rematerialize,
                device_kind(),
            )
        )
        return 0
    if os.environ["KERAS_BACKEND"] == "jax":
        join_hosts(parser, options)
    else:
        # JAX only writes the checkpoints: the backend needs the accelerator's memory.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    config = make_config(parser, options)
    if options.mesh and os.environ["KERAS_BACKEND"] != "jax":
        parser.error("--mesh needs the JAX backend: --backend jax.")
    if options.output is None:
        name = Path(config.preset).name.removeprefix("open_llama_")
        options.output = f"runs/{name}-finetuned"
    return exit_code(prog, options, lambda: finetune(config, options))


def finetune(config: FinetuneConfig, options: argparse.Namespace) -> str | None:
    """Trains and exports; returns the signal that stopped the run, or `None`."""
    from keras_openllama.runs import finetuning

    def open_run(run_options):
        return finetuning.open_run(
            config,
            run_options,
            options.sample_prompt,
            options.max_new_tokens,
            lambda architecture: check_memory(config, architecture, options.mesh),
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
    mesh: Mapping[str, int] | None,
) -> None:
    """Prints the memory that the run needs; raises `ValueError` if it does not fit."""
    from keras_openllama.planning import finetune_memory

    estimate = finetune_memory.estimate_memory(
        architecture,
        config.dtype,
        lora_rank=config.lora_rank,
        targets=config.lora_targets or ("query", "value"),
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        micro_batches=config.micro_batches,
        rematerialize=config.rematerialize,
        int8=config.int8,
        devices=number_of_devices(mesh),
        backend=os.environ["KERAS_BACKEND"],
        device=device_kind(),
    )
    print_on_first_host(f"Estimated memory of training:\n{estimate.table()}")
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
            print_on_first_host(f"{path}: {hint.format(path)}")
