"""Flags of `evaluate`, and their checks before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from keras_openllama.cli import arguments as types
from keras_openllama.cli.command import CommandParser, add_renamed_argument
from keras_openllama.cli.paths import (
    require_adapters,
    require_directory,
    require_output_directory,
    require_preset,
    require_texts,
)
from keras_openllama.cli.process import add_backend

DESCRIPTION = """\
Evaluate a model: the published table, any task, perplexity, HumanEval.

    %(prog)s --preset 7b_v2 --suite openllama --output evaluations/7b_v2
        measure the 21 published metrics and compare them with the published values
    %(prog)s --preset runs/3b_v3 --tasks hellaswag piqa --limit 500
        run some tasks of lm-evaluation-harness on a checkpoint of a run
    %(prog)s --preset nano --perplexity book.txt texts/ data/
        measure perplexity and bits per byte of text files and prepared datasets
    %(prog)s --preset 7b_v2 --human-eval --run-generated-code
        generate functions and count those that pass their tests
    %(prog)s --compare evaluations/7b evaluations/7b_v2 --output both
        write tables and a plot of several evaluations

The output directory holds results.json, table.md, table.png, table.svg, and the
responses of the model in answers.sqlite. Running the same command again resumes an
interrupted evaluation with the same results. docs/evaluation.md describes the
differences from the harness of 2023 and their effect.

Exit codes:
  0   everything was measured
  2   invalid argument
  69  the data of a task is unavailable; the other tasks were measured
  74  a file could not be read or written
  75  stopped by a signal (SIGTERM, Ctrl-C); the same command resumes the evaluation
"""


def parse_arguments(
    arguments: Sequence[str], prog: str
) -> tuple[CommandParser, argparse.Namespace]:
    """Returns the parser of the command and the parsed arguments."""
    parser = CommandParser(prog, description=DESCRIPTION)
    add_model(parser.add_argument_group("the model"))
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="directory to write (default: evaluations/ and the model's name)",
    )
    add_tasks(parser.add_argument_group("tasks of lm-evaluation-harness"))
    add_perplexity(parser.add_argument_group("perplexity"))
    add_human_eval(parser.add_argument_group("HumanEval"))
    compare = parser.add_argument_group("comparison of evaluations")
    compare.add_argument(
        "--compare",
        nargs="+",
        metavar="DIR",
        help="output directories of evaluations to compare",
    )
    add_renamed_argument(
        compare,
        "--beside",
        "--compare-with",
        nargs="+",
        default=(),
        metavar="COLUMN",
        help='columns of published results to add, such as "LLaMA 7B"',
    )
    return parser, parser.parse_args(arguments)


def add_model(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that choose the model."""
    group.add_argument(
        "--preset",
        help="a preset such as 7b_v2 or nano, a directory, a run that trains all "
        "weights or one of its checkpoints, a GGUF file, hf://user/repo or "
        "hf://user/repo/file.gguf",
    )
    group.add_argument(
        "--revision",
        help="branch, tag or commit on the Hugging Face Hub (default: the main branch)",
    )
    group.add_argument(
        "--adapters", metavar="DIR", help="LoRA adapters to load into the model"
    )
    group.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: %(default)s)",
    )
    types.add_quantization(group)
    add_backend(group)
    group.add_argument(
        "--batch-size",
        type=types.positive_int,
        default=8,
        metavar="N",
        help="packed sequences of 512 tokens per batch; for generation, prompts per "
        "batch (default: %(default)s)",
    )
    group.add_argument(
        "--mesh",
        metavar="AXIS=N,…",
        type=types.mesh,
        help="device mesh to shard the model over, such as fsdp=4 (JAX; default: one "
        "device)",
    )


def add_tasks(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of tasks of lm-evaluation-harness."""
    group.add_argument(
        "--suite",
        choices=("openllama",),
        help="run the 15 tasks of the published table",
    )
    group.add_argument(
        "--tasks",
        nargs="+",
        default=(),
        metavar="NAME",
        help="tasks, groups or tags to run; `keras-openllama lm-eval ls tasks` lists "
        "them",
    )
    group.add_argument(
        "--include-path",
        metavar="DIR",
        help="directory of your own tasks, YAML files of the harness",
    )
    group.add_argument(
        "--data",
        metavar="DIR",
        help="directory of the tasks' documents as NAME.jsonl, .json or .parquet, with "
        "the fields of the original datasets; others are downloaded from the Hub",
    )
    group.add_argument(
        "--num-fewshot",
        type=types.non_negative_int,
        metavar="N",
        help="examples in each prompt (default: those of the task, none in the suite)",
    )
    group.add_argument(
        "--limit",
        type=types.positive_number,
        metavar="N",
        help="maximum number of documents per task, or a fraction if below 1",
    )
    add_renamed_argument(
        group,
        "--as-in-2023",
        "--separate-tokenization",
        action="store_true",
        help="tokenize contexts and continuations separately, as for the published "
        "results",
    )


def add_perplexity(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of perplexity."""
    group.add_argument(
        "--perplexity",
        nargs="+",
        default=(),
        metavar="PATH",
        help="measure perplexity of .txt files, directories of them, .jsonl files with "
        'the key "text", or prepared datasets',
    )
    group.add_argument(
        "--protocol",
        choices=("strided", "llama.cpp"),
        default="strided",
        help="overlapping windows, or the chunks of llama.cpp (default: %(default)s)",
    )
    group.add_argument(
        "--context",
        type=types.positive_int,
        metavar="N",
        help="tokens of a window (default: the context length of the model; for "
        "llama.cpp at most 512)",
    )
    group.add_argument(
        "--stride",
        type=types.positive_int,
        metavar="N",
        help="tokens between the starts of windows (default: half of the window)",
    )


def add_human_eval(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of HumanEval."""
    group.add_argument(
        "--human-eval", action="store_true", help="generate the functions of HumanEval"
    )
    group.add_argument(
        "--run-generated-code",
        action="store_true",
        help="run the generated code on this machine, to test it: use a sandbox",
    )
    group.add_argument(
        "--samples-per-problem",
        type=types.positive_int,
        default=1,
        metavar="N",
        help="samples per problem, for pass@k (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=types.positive_number,
        metavar="X",
        help="sampling temperature (default: greedy decoding)",
    )
    group.add_argument(
        "--problems",
        type=types.positive_int,
        metavar="N",
        help="use the first N problems only (default: all)",
    )


def check_options(parser: CommandParser, options: argparse.Namespace) -> None:
    """Rejects invalid combinations of flags, before anything is loaded."""
    from keras_openllama.evaluation.report import published

    wanted = (options.suite, options.tasks, options.perplexity, options.human_eval)
    if options.compare:
        if any(wanted) or options.preset:
            parser.error(
                "--compare cannot be combined with a model or a measurement: remove "
                "the other flags."
            )
        if not options.output:
            parser.error(
                "--compare requires --output, the directory of the comparison."
            )
        return
    if not options.preset:
        parser.error("--preset is required: name the model to evaluate.")
    if not any(wanted):
        parser.error(
            "Choose what to measure: --suite, --tasks, --perplexity or --human-eval."
        )
    known = published.load_published_table().columns
    for column in options.compare_with:
        if column not in known:
            parser.error(
                f"--compare-with must be one of {', '.join(known)}. Received: {column}"
            )
    check_numbers(parser, options)
    check_paths(options)


def check_paths(options: argparse.Namespace) -> None:
    """Raises `ValueError` for a model, a task or a path that does not exist."""
    from keras_openllama.evaluation.task_names import check_task_names

    require_preset("--preset", options.preset, options.revision)
    require_adapters("--adapters", options.adapters)
    for flag, path in (
        ("--data", options.data),
        ("--include-path", options.include_path),
    ):
        if path:
            require_directory(flag, path)
    require_texts("--perplexity", options.perplexity)
    check_task_names(options.tasks, options.include_path)
    if options.output:
        require_output_directory("--output", options.output)


def check_numbers(parser: CommandParser, options: argparse.Namespace) -> None:
    """Makes a limit of at least 1 an integer; rejects numbers that do not match."""
    if options.limit and options.limit >= 1:
        options.limit = int(options.limit)
    if options.samples_per_problem > 1 and options.temperature is None:
        parser.error(
            "--samples-per-problem: several samples need a --temperature, such as 0.8."
        )
    if options.context and (options.stride or 0) > options.context:
        parser.error(
            f"--stride must be at most --context, {options.context}. Received: "
            f"{options.stride}"
        )
