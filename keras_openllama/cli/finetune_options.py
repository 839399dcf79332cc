"""The flags of `keras-openllama finetune`, and their checks."""

from __future__ import annotations

import argparse
import os
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from keras_openllama.cli import arguments as types
from keras_openllama.cli.chat_templates import add_chat_template, read_chat_template
from keras_openllama.cli.command import CommandParser, add_renamed_argument
from keras_openllama.cli.paths import (
    require_file,
    require_output_directory,
    require_preset,
)
from keras_openllama.cli.process import add_backend
from keras_openllama.cli.training_options import add_run_options
from keras_openllama.config import PROJECTIONS, REMATERIALIZATION, context_length

if TYPE_CHECKING:
    from keras_openllama.runs.finetune_config import FinetuneConfig

DESCRIPTION = """\
Fine-tune a preset on examples in JSON: LoRA adapters or all of its weights.

    %(prog)s --preset nano --data pairs.jsonl --lora-rank 8
        train adapters on the responses of {"prompt": …, "response": …} lines
    %(prog)s --preset 7b_v2 --data questions.jsonl --lora-rank 16 \\
        --prompt "Q: {question}\\nA:" --response " {answer}" --output runs/answers
        make prompts and responses from other keys
    %(prog)s --preset 7b_v2 --lora-rank 16 --estimate
        print the memory that this run needs, and exit; without --preset, the memory of
        each kind of fine-tuning for every preset

Files are JSON Lines or JSON arrays. Examples may also be chats of the form
{"messages": [{"role": …, "content": …}, …]} or {"conversations": [{"from": …,
"value": …}, …]}, with --chat-template or the chat template of the model; {"text": …};
{"instruction": …, "input": …, "output": …}, {"question": …, "answer": …}, which are
chats if there is a chat template. The loss is computed on responses, or on the whole
text.

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
      or not enough memory (with --estimate, too)
  70  too many consecutive steps had a non-finite loss or gradient, or the validation
      loss is not finite
  74  a file could not be written
  75  stopped by a signal (SIGTERM; in a run of one process Ctrl-C, too); the run is
      saved, and the same command resumes it
  130 Ctrl-C before the first step, or in a run of several processes
"""

DTYPES = ("float32", "bfloat16", "mixed_bfloat16")
SEQUENCE_LENGTH = 512
# Bytes of a file that is read in a second or two.
_SMALL_FILE = 32 << 20


# Flags that describe one run. The overview of all presets (--estimate without --preset)
# has columns for adapters and dtypes of its own, on one device.
_OF_ONE_RUN = (
    *("lora_rank", "lora_targets", "quantization", "dtype"),
    *("micro_batches", "mesh"),
)


def parse_arguments(
    arguments: Sequence[str], prog: str
) -> tuple[CommandParser, argparse.Namespace]:
    """Returns the parser of the command and the parsed arguments."""
    parser = CommandParser(prog, description=DESCRIPTION)
    parser.add_argument(
        "--preset",
        help="the model to fine-tune: a preset such as 7b_v2 or nano, a directory, a "
        "GGUF file, hf://user/repo or hf://user/repo/file.gguf",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="directory of the run (default: runs/PRESET-finetuned)",
    )
    data = parser.add_argument_group("examples")
    data.add_argument(
        "--data",
        nargs="+",
        default=(),
        metavar="FILE",
        help="files of JSON Lines or JSON arrays",
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
    add_chat_template(data)
    data.add_argument(
        "--validation", metavar="FILE", help="file of examples for validation"
    )
    data.add_argument(
        "--max-skipped",
        type=types.share,
        default=0.1,
        metavar="X",
        help="fraction of the examples that may be skipped because there is nothing to "
        "learn from them, such as an empty response (default: %(default)s)",
    )
    add_renamed_argument(
        data,
        "--validation-share",
        "--validation-fraction",
        type=types.fraction,
        default=0.05,
        metavar="X",
        help="fraction of the examples to hold out if --validation is not given "
        "(default: %(default)s)",
    )
    add_renamed_argument(
        data,
        "--length",
        "--sequence-length",
        type=types.positive_int,
        metavar="N",
        help="tokens of a sequence; longer examples are truncated (default: "
        f"{SEQUENCE_LENGTH}, or the context length of the model if that is shorter)",
    )
    data.add_argument(
        "--pack", action="store_true", help="pack several examples into a sequence"
    )
    weights = parser.add_argument_group("trained weights")
    weights.add_argument(
        "--lora-rank",
        type=types.non_negative_int,
        default=0,
        metavar="N",
        help="rank of the LoRA adapters; 0 trains all weights (default: %(default)s)",
    )
    weights.add_argument(
        "--lora-alpha",
        type=types.positive_number,
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
    types.add_quantization(weights)
    weights.add_argument(  # The flag of version 0.2.
        "--int8",
        action="store_const",
        const="int8",
        dest="quantization",
        help=argparse.SUPPRESS,
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
        type=types.number(
            lambda value: 1e-6 <= value <= 1e6, "a positive number of at most a million"
        ),
        default=3.0,
        metavar="X",
        help="passes over the examples (default: %(default)s)",
    )
    training.add_argument(
        "--batch-size",
        type=types.positive_int,
        default=8,
        metavar="N",
        help="sequences per step (default: %(default)s)",
    )
    training.add_argument(
        "--learning-rate",
        type=types.positive_number,
        metavar="X",
        help="peak of the warmup-cosine schedule (default: 2e-4 with adapters, else "
        "2e-5)",
    )
    training.add_argument(
        "--warmup",
        type=types.number(
            lambda value: 0 <= value < 1, "in [0, 1), a fraction of all steps"
        ),
        default=0.03,
        metavar="X",
        help="warmup as a fraction of all steps (default: %(default)s)",
    )
    training.add_argument(
        "--weight-decay",
        type=types.non_negative_number,
        default=0.0,
        metavar="X",
        help="weight decay of AdamW (default: %(default)s)",
    )
    training.add_argument(
        "--micro-batches",
        type=types.positive_int,
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
        type=types.run_seed,
        default=0,
        metavar="N",
        help="seed of the adapters' initial values, of the order of the examples and "
        "of the choice of held-out examples (default: %(default)s)",
    )
    add_backend(training)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--save-every",
        type=types.positive_int,
        default=100,
        metavar="STEPS",
        help="steps between checkpoints (default: %(default)s)",
    )
    output.add_argument(
        "--validate-every",
        type=types.positive_int,
        metavar="STEPS",
        help="steps between validations (default: a tenth of the run)",
    )
    add_renamed_argument(
        output,
        "--question",
        "--sample-prompt",
        type=types.not_empty,
        action="append",
        metavar="TEXT",
        help="prompt to generate from before and after training, used unchanged "
        "(without the template of --prompt); may be given several times (default: "
        "held-out prompts)",
    )
    output.add_argument(
        "--max-new-tokens",
        type=types.positive_int,
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
    estimate = parser.add_argument_group("estimate")
    estimate.add_argument(
        "--estimate",
        action="store_true",
        help="print the memory that the run of these flags needs, and exit; needs no "
        "--data. Without --preset, an overview of every preset on one device, with "
        "adapters of rank 16 and with all weights, for --batch-size, "
        "--sequence-length, --rematerialize and --backend",
    )
    add_run_options(parser, "all devices along fsdp")
    return parser, parser.parse_args(arguments)


def check_options(
    parser: CommandParser, options: argparse.Namespace, backend: str
) -> None:
    """Rejects invalid flags before anything slow is imported or loaded.

    Args:
        parser: Parser that reports an error and exits.
        options: The parsed arguments.
        backend: The backend of Keras.
    """
    if options.batch_size % options.micro_batches:
        parser.error(
            "--micro-batches must divide --batch-size. Received: "
            f"{options.micro_batches} and {options.batch_size}"
        )
    check_backend_flags(parser, options, backend)
    if options.estimate and not options.preset:
        for name in _OF_ONE_RUN:
            if getattr(options, name) != parser.get_default(name):
                parser.error(
                    f"{_flag(name)} applies to the estimate of one run: add --preset."
                )
        return
    if not options.preset:
        parser.error("--preset is required: name the model to fine-tune.")
    if not options.data and not options.estimate:
        parser.error(
            "--data is required: name files of examples (JSON Lines or JSON arrays)."
        )
    require_preset("--preset", options.preset)
    for path in options.data:
        require_file("--data", path)
    for flag, path in (
        ("--validation", options.validation),
        ("--chat-template", options.chat_template),
    ):
        if path:
            require_file(flag, path)
    if options.output:
        require_output_directory("--output", options.output)
    check_braces("--prompt", options.prompt)
    check_braces("--response", options.response)
    check_combinations(parser, options)
    if _can_be_read_twice(options.chat_template):
        read_chat_template(options.chat_template)
    if not options.estimate:
        check_examples(options)


def check_examples(options: argparse.Namespace) -> None:
    """Raises `ValueError` for examples that are malformed, or of which too many are.

    The run reads them again, after imports that take seconds: only of small files.
    """
    from keras_openllama.data.instructions import read_examples

    templates = None
    if options.prompt is not None or options.response is not None:
        templates = (
            "{prompt}" if options.prompt is None else _unescaped(options.prompt),
            "{response}" if options.response is None else _unescaped(options.response),
        )
    if options.data and all(map(_can_be_read_twice, options.data)):
        read_examples(options.data, templates, options.max_skipped)
    if _can_be_read_twice(options.validation):
        read_examples([options.validation], templates, options.max_skipped)


def _can_be_read_twice(path):
    """Whether there is a path of a small file, which is not a pipe."""
    is_file = path is not None and os.path.isfile(path)
    return is_file and os.path.getsize(path) <= _SMALL_FILE


def check_braces(flag: str, template: str | None) -> None:
    """Raises `ValueError` if the braces of a template are not those of a format."""
    try:
        list(string.Formatter().parse(template or ""))
    except ValueError as error:
        raise ValueError(
            f"{flag}: {error}. Keys of the data are written as {{name}}, and a brace "
            f"as {{{{ or }}}}. Received: {template!r}"
        ) from error


def _flag(name):
    return "--" + name.replace("_", "-")


def check_backend_flags(
    parser: CommandParser, options: argparse.Namespace, backend: str
) -> None:
    """Rejects flags that need JAX on another backend."""
    if backend == "jax":
        return
    needs_jax = {
        "--micro-batches": options.micro_batches > 1,
        "--rematerialize": options.rematerialize != "none",
        "--mesh": options.mesh is not None,
        "--profile": options.profile is not None,
    }
    for flag, is_given in needs_jax.items():
        if is_given:
            parser.error(
                f"{flag} needs the JAX backend: --backend jax. Received: {backend}"
            )


def check_combinations(parser: CommandParser, options: argparse.Namespace) -> None:
    """Rejects LoRA flags without --lora-rank, and unsupported combinations."""
    for name in ("quantization", "lora_alpha", "lora_targets"):
        if getattr(options, name) and not options.lora_rank:
            parser.error(f"{_flag(name)} needs adapters: add --lora-rank.")
    if options.dtype == "bfloat16" and not options.lora_rank:
        parser.error(
            "--dtype bfloat16 would round small updates to zero. Use --dtype "
            "mixed_bfloat16, or train adapters with --lora-rank."
        )
    if options.export == "adapters" and not options.lora_rank:
        parser.error("--export adapters needs adapters: add --lora-rank.")


def make_config(options: argparse.Namespace) -> FinetuneConfig:
    """Makes a `finetune_config.FinetuneConfig` of valid flags."""
    from keras_openllama.runs.finetune_config import FinetuneConfig
    from keras_openllama.runs.finetuning import find_model

    if options.sequence_length is None:
        _, architecture = find_model(options.preset)
        options.sequence_length = min(SEQUENCE_LENGTH, context_length(architecture))
    template = options.chat_template and read_chat_template(options.chat_template)
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
        quantization=options.quantization,
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


def _unescaped(template):
    """Replaces escape sequences of new lines and tabs, which shells do not."""
    return template and template.replace("\\n", "\n").replace("\\t", "\t")


def default_dtype(options: argparse.Namespace) -> str:
    """Returns the default of `--dtype`."""
    if not has_accelerator():
        return "float32"
    return "bfloat16" if options.lora_rank else "mixed_bfloat16"


def has_accelerator() -> bool:
    """Whether the backend runs on a GPU or TPU."""
    backend = os.environ["KERAS_BACKEND"]
    if backend == "torch":
        import torch

        return torch.cuda.is_available()
    if backend == "tensorflow":
        import tensorflow

        return bool(tensorflow.config.list_physical_devices("GPU"))
    import jax

    return jax.default_backend() != "cpu"


def device_kind() -> str:
    """The kind of device in the words of `finetune_memory`."""
    return "accelerator" if has_accelerator() else "cpu"
