"""Fine-tune a preset on JSON lines: adapters (LoRA) or all of its weights.

    %(prog)s --preset nano --data pairs.jsonl --lora-rank 8
        trains adapters on the responses of {"prompt": …, "response": …} lines
    %(prog)s --preset 7b_v2 --data questions.jsonl --lora-rank 16 \\
        --prompt "Q: {question}\\nA:" --response " {answer}" --output runs/answers
        makes prompts and responses of other keys
    %(prog)s --estimate
        tells what memory each way takes, and ends

Lines may also be {"messages": [{"role": …, "content": …}, …]}, with --chat-template, or
{"text": …}. The loss is that of responses; texts are learned whole.

Running the same command again resumes the run. The run's directory holds
metrics.jsonl, validation.jsonl, loss.png, answers before and after in samples.txt,
TensorBoard's events, and in the end adapters/ (for `lm.load_adapters` and PEFT) and
model/ (merged, for transformers and for `keras-openllama generate --preset DIR/model`).

Exit codes: 0 the run is complete; 75 a signal came (SIGTERM, Ctrl-C), all is saved and
the same command resumes it; 70 too many steps in a row had a loss or gradient that is
not finite; 74 something could not be written; 2 an argument or an example is wrong, or
does not fit the run that is there, or the memory; 1 anything else.
"""

import json
import math
import os
from pathlib import Path

from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.training_options import (
    add_run_options,
    exit_code,
    join_hosts,
    open_trainer,
    tell,
)
from keras_openllama.config import PROJECTIONS, REMATERIALIZATION

DTYPES = ("float32", "bfloat16", "mixed_bfloat16")


def parse_arguments(arguments, prog):
    parser = CommandParser(
        prog,
        description=__doc__,
    )
    parser.add_argument(
        "--preset",
        help="what to start from: a preset such as 7b_v2 or nano, a directory, or "
        "hf://user/repo",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="directory of the run (default: runs/PRESET-finetuned)",
    )
    data = parser.add_argument_group("examples")
    data.add_argument(
        "--data", nargs="+", default=(), metavar="FILE", help="JSON lines"
    )
    data.add_argument(
        "--prompt", metavar="TEMPLATE", help='such as "Q: {question}\\nA:"'
    )
    data.add_argument("--response", metavar="TEMPLATE", help='such as " {answer}"')
    data.add_argument(
        "--chat-template",
        metavar="FILE",
        help='JSON by role, such as {"user": "USER: {content}\\n", "assistant": "BOT: '
        '{content}"}',
    )
    data.add_argument("--validation", metavar="FILE", help="JSON lines to validate on")
    data.add_argument(
        "--validation-share",
        type=float,
        default=0.05,
        metavar="X",
        help="of the examples, without --validation (default: %(default)s)",
    )
    data.add_argument(
        "--length",
        type=int,
        default=512,
        metavar="N",
        help="tokens of a row; what is longer is cut (default: %(default)s)",
    )
    data.add_argument(
        "--pack", action="store_true", help="put several examples into a row"
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        metavar="N",
        help="rank of adapters; 0, the default, trains all weights",
    )
    what.add_argument(
        "--lora-alpha", type=float, metavar="X", help="their scale (default: the rank)"
    )
    what.add_argument(
        "--lora-targets",
        nargs="+",
        choices=PROJECTIONS,
        metavar="NAME",
        help=f"some of {', '.join(PROJECTIONS)} (default: query value)",
    )
    what.add_argument(
        "--int8", action="store_true", help="quantize the weights below the adapters"
    )
    what.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: float32 on CPUs; elsewhere bfloat16 with adapters, and "
        "mixed_bfloat16 without",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--epochs", type=float, default=3.0, metavar="X")
    how.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows")
    how.add_argument(
        "--learning-rate",
        type=float,
        metavar="X",
        help="peak of a cosine (default: 2e-4 with adapters, else 2e-5)",
    )
    how.add_argument(
        "--warmup", type=float, default=0.03, metavar="X", help="share of the steps"
    )
    how.add_argument("--weight-decay", type=float, default=0.0, metavar="X")
    how.add_argument(
        "--micro-batches",
        type=int,
        default=1,
        metavar="N",
        help="parts of a batch that follow each other, to save memory (JAX)",
    )
    how.add_argument(
        "--rematerialize",
        choices=tuple(REMATERIALIZATION),
        default="none",
        help="what is computed twice, to save memory (JAX; default: %(default)s)",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N")
    how.add_argument("--backend", choices=("jax", "tensorflow", "torch"))
    seen = parser.add_argument_group("what is seen and kept")
    seen.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    seen.add_argument(
        "--validate-every", type=int, metavar="STEPS", help="default: ten times"
    )
    seen.add_argument(
        "--question",
        action="append",
        metavar="TEXT",
        help="asked before and after; again for more (default: held-out prompts)",
    )
    seen.add_argument("--max-new-tokens", type=int, default=48, metavar="N")
    seen.add_argument(
        "--export",
        choices=("all", "adapters", "model", "none"),
        default="all",
        help="what is written in the end (default: %(default)s)",
    )
    seen.add_argument(
        "--estimate",
        action="store_true",
        help="print what memory training takes, for every preset, and end",
    )
    add_run_options(parser)
    return parser, parser.parse_args(arguments)


def config_of(parser, options):
    """`finetuning.FinetuneConfig` from the flags, checked."""
    from keras_openllama.runs.finetuning import FinetuneConfig

    if not options.preset:
        parser.error("--preset: name what to start from.")
    if not options.data:
        parser.error("--data: name the files of your examples (JSON lines).")
    for path in [*options.data, *filter(None, [options.validation])]:
        if not Path(path).is_file():
            parser.error(f"--data, --validation: there is no file {path}")
    positive = ("length", "batch_size", "micro_batches", "save_every", "validate_every")
    for name in positive:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is a whole number from 1 on.")
    if options.epochs <= 0 or not 0 <= options.validation_share < 1:
        parser.error("--epochs is above 0, and --validation-share from 0 to below 1.")
    if options.learning_rate is not None and not options.learning_rate > 0:
        parser.error("--learning-rate is above 0.")
    check_adapters(parser, options)
    if options.batch_size % options.micro_batches:
        parser.error("--micro-batches divides --batch-size.")
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
        validation_share=options.validation_share,
        sequence_length=options.length,
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


def check_adapters(parser, options):
    """Refuses flags of adapters where there are none, and what cannot be."""
    if options.lora_rank < 0:
        parser.error("--lora-rank is 0 or more.")
    for name in ("int8", "lora_alpha", "lora_targets"):
        if getattr(options, name) and not options.lora_rank:
            parser.error(f"--{name.replace('_', '-')} needs adapters: --lora-rank.")
    if options.dtype == "bfloat16" and not options.lora_rank:
        parser.error(
            "--dtype bfloat16 would round small steps away: mixed_bfloat16 does not. "
            "(Or train adapters: --lora-rank.)"
        )
    if options.int8 and options.export == "model":
        parser.error("--export model: adapters cannot be merged into --int8.")
    saves = options.micro_batches > 1 or options.rematerialize != "none"
    if saves and os.environ["KERAS_BACKEND"] != "jax":
        parser.error("--micro-batches and --rematerialize need the JAX backend.")


def _unescaped(template):
    """A template in which a shell's \\n is a new line."""
    return template and template.replace("\\n", "\n").replace("\\t", "\t")


def default_dtype(options):
    if kind_of_device() == "cpu":
        return "float32"
    return "bfloat16" if options.lora_rank else "mixed_bfloat16"


def kind_of_device():
    """What the backend computes on: `"cpu"` or `"accelerator"`."""
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
def main(arguments, prog):
    parser, options = parse_arguments(arguments, prog)
    os.environ["KERAS_BACKEND"] = options.backend or os.environ.get(
        "KERAS_BACKEND", "jax"
    )
    if options.estimate:
        from keras_openllama.planning import finetune_memory

        print(
            finetune_memory.table_of_presets(
                options.batch_size,
                options.length,
                options.rematerialize,
                kind_of_device(),
            )
        )
        return 0
    if os.environ["KERAS_BACKEND"] == "jax":
        join_hosts(parser, options)
    else:
        # JAX writes the checkpoints only: the accelerator's memory is the backend's.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    config = config_of(parser, options)
    if options.mesh and os.environ["KERAS_BACKEND"] != "jax":
        parser.error("--mesh needs the JAX backend.")
    if options.output is None:
        name = Path(config.preset).name.removeprefix("open_llama_")
        options.output = f"runs/{name}-finetuned"
    return exit_code(prog, options, lambda: run(config, options))


def run(config, options):
    """Trains and exports; returns the signal that stopped it, or `None`."""
    from keras_openllama.runs import finetuning

    def open_run(run_options):
        return finetuning.open_run(
            config,
            run_options,
            options.question,
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
        _tell_exports(options.output)
    return stopped


def check_memory(config, architecture, mesh):
    """Prints what memory the run takes, and refuses what cannot fit."""
    from keras_openllama.planning import finetune_memory

    estimate = finetune_memory.estimate(
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
        device=kind_of_device(),
    )
    tell(f"Memory that training takes, about:\n{estimate.table()}")
    finetune_memory.check(estimate, finetune_memory.available_memory())


def number_of_devices(mesh):
    """Devices that share the model."""
    if os.environ["KERAS_BACKEND"] != "jax":
        return 1
    import jax

    return math.prod(mesh.values()) if mesh else jax.device_count()


def _tell_exports(output):
    for name, hint in (
        ("adapters", "lm.load_adapters({!r}), or peft.PeftModel.from_pretrained"),
        ("model", 'keras-openllama generate "…" --preset {}, or transformers'),
    ):
        path = os.path.join(output, name)
        if os.path.isdir(path):
            tell(f"{path}: {hint.format(path)}")
