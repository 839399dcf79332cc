"""`keras-openllama evaluate`: tasks, perplexity, HumanEval, and comparisons."""

import datetime
import importlib.metadata
import json
import logging
import os
import signal
import sys
from pathlib import Path

from keras_openllama.cli.command import CommandParser, add_renamed_argument, command
from keras_openllama.cli.process import (
    add_backend,
    choose_backend,
    one_line,
    quiet_tensorflow,
)

DESCRIPTION = """\
Evaluate a model: the published table, any task, perplexity, HumanEval.

    %(prog)s --preset 7b_v2 --suite openllama --output evaluations/7b_v2
        the 21 published metrics, measured and published side by side
    %(prog)s --preset runs/3b_v3 --tasks hellaswag piqa --limit 500
        some tasks of lm-evaluation-harness, here on a checkpoint of a run
    %(prog)s --preset nano --perplexity book.txt texts/ data/
        perplexity and bits per byte of text files and prepared data sets
    %(prog)s --preset 7b_v2 --human-eval --run-generated-code
        functions that the model writes, and how many pass their tests
    %(prog)s --compare evaluations/7b evaluations/7b_v2 --output both
        tables and a picture of several

The output directory holds results.json, table.md, table.png and table.svg, and in
answers.sqlite what the model has answered: the same command again goes on where it was
stopped, to the same results. What differs from the harness of 2023, and what that may
shift, is in docs/evaluation.md.

Exit codes: 0 all was measured; 69 the data of a task could not be had, and the others
were measured; 75 a signal came (SIGTERM, Ctrl-C), and the same command goes on; 74
something could not be read or written; 2 an argument is wrong.
"""

ANSWERS = "answers.sqlite"


def parse_arguments(arguments, prog):
    """The parser, and the options of the command line."""
    parser = CommandParser(prog, description=DESCRIPTION)
    add_model(parser.add_argument_group("the model"))
    parser.add_argument(
        "--output", metavar="DIR", help="default: evaluations/ and the model's name"
    )
    add_tasks(parser.add_argument_group("tasks of lm-evaluation-harness"))
    add_perplexity(parser.add_argument_group("perplexity"))
    add_human_eval(parser.add_argument_group("HumanEval"))
    compare = parser.add_argument_group("comparison of what was measured")
    compare.add_argument("--compare", nargs="+", metavar="DIR", help="their --output")
    add_renamed_argument(
        compare,
        "--beside",
        "--compare-with",
        nargs="+",
        default=(),
        metavar="COLUMN",
        help='published columns to add, such as "LLaMA 7B"',
    )
    return parser, parser.parse_args(arguments)


def add_model(group):
    group.add_argument(
        "--preset",
        help="a preset such as 7b_v2 or nano, a directory, a training run or one of "
        "its checkpoints, or hf://user/repo",
    )
    group.add_argument("--revision", help="branch, tag or commit on the Hub")
    group.add_argument("--adapters", metavar="DIR", help="LoRA adapters to put on it")
    group.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16")
    )
    add_backend(group)
    group.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="rows of 512 tokens that are computed at once (default: %(default)s)",
    )
    group.add_argument(
        "--mesh",
        metavar="AXIS=N,…",
        help="devices to spread the model over, such as fsdp=4 (JAX; default: one)",
    )


def add_tasks(group):
    group.add_argument(
        "--suite", choices=("openllama",), help="the 15 tasks of the published table"
    )
    group.add_argument(
        "--tasks",
        nargs="+",
        default=(),
        metavar="NAME",
        help="tasks, groups or tags; `keras-openllama lm-eval ls tasks` lists them",
    )
    group.add_argument(
        "--include-path", metavar="DIR", help="tasks of your own, the harness's YAML"
    )
    group.add_argument(
        "--data",
        metavar="DIR",
        help="documents of tasks as NAME.jsonl, .json or .parquet, in the form of "
        "their data sets; those that are not there come from the Hub",
    )
    group.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples in each prompt (default: what the task says, none in the suite)",
    )
    group.add_argument(
        "--limit",
        type=float,
        metavar="N",
        help="documents of each task at most, or below 1 the share of them",
    )
    add_renamed_argument(
        group,
        "--as-in-2023",
        "--separate-tokenization",
        action="store_true",
        help="tokenize contexts and continuations separately, as for the published "
        "results",
    )


def add_perplexity(group):
    group.add_argument(
        "--perplexity",
        nargs="+",
        default=(),
        metavar="PATH",
        help='.txt, directories of .txt, .jsonl with "text", prepared data sets',
    )
    group.add_argument(
        "--protocol",
        choices=("strided", "llama.cpp"),
        default="strided",
        help="windows that overlap, or llama.cpp's chunks (default: %(default)s)",
    )
    group.add_argument("--context", type=int, metavar="N", help="tokens of a window")
    group.add_argument("--stride", type=int, metavar="N", help="default: half of it")


def add_human_eval(group):
    group.add_argument("--human-eval", action="store_true")
    group.add_argument(
        "--run-generated-code",
        action="store_true",
        help="run what the model writes, on this machine: only inside a sandbox",
    )
    group.add_argument("--samples-per-problem", type=int, default=1, metavar="N")
    group.add_argument(
        "--temperature", type=float, metavar="X", help="default: the likeliest token"
    )
    group.add_argument("--problems", type=int, metavar="N", help="the first N only")


def check(parser, options):
    """Refuses what makes no sense, before anything is loaded."""
    from keras_openllama.evaluation.report import published

    wanted = (options.suite, options.tasks, options.perplexity, options.human_eval)
    if options.compare:
        if any(wanted) or options.preset:
            parser.error("--compare takes what was measured: give it alone.")
        if not options.output:
            parser.error("--output: name where the comparison goes.")
        return
    if not options.preset:
        parser.error("--preset: name the model.")
    if not any(wanted):
        parser.error(
            "say what to measure: --suite, --tasks, --perplexity, --human-eval"
        )
    known = published.load().columns
    for column in options.compare_with:
        if column not in known:
            parser.error(
                f"--compare-with must be one of {', '.join(known)}. Received: {column}"
            )
    check_numbers(parser, options)


def check_numbers(parser, options):
    """Refuses numbers that make no sense."""
    if options.limit is not None and not options.limit > 0:
        parser.error("--limit is above 0.")
    if options.limit and options.limit >= 1:
        options.limit = int(options.limit)
    for flag in ("batch_size", "samples_per_problem", "problems", "context", "stride"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag.replace('_', '-')} is a whole number from 1 on.")
    if options.temperature is not None and options.temperature <= 0:
        parser.error("--temperature is above 0; leave it out for the likeliest token.")
    if options.samples_per_problem > 1 and options.temperature is None:
        parser.error("--samples-per-problem: several samples need a --temperature.")


def name_of(preset):
    """What the run is called: the whole name of a preset, or that of a directory."""
    from keras_openllama import presets

    names = (preset, "open_llama_" + preset, Path(preset).resolve().name)
    return next((name for name in names if name in presets.registry()), names[-1])


class Evaluation:
    """What is measured, in an output directory; written after each part.

    Raises:
        ValueError, OSError, ImportError: for what cannot be evaluated.
    """

    def __init__(self, options):
        from keras_openllama.evaluation import tasks, texts
        from keras_openllama.evaluation.lm_eval_model import OpenLlamaLM, load_model
        from keras_openllama.evaluation.report import measurements
        from keras_openllama.runs.device_settings import parse_mesh

        # The harness warns of each default that a task's configuration leaves to it.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.options = options
        name = name_of(options.preset) + ("-adapters" if options.adapters else "")
        self.directory = Path(options.output or f"evaluations/{name}")
        self.directory.mkdir(parents=True, exist_ok=True)
        include = options.include_path
        names = tasks.task_names(options.suite, options.tasks, include)
        self.tasks, self.skipped = tasks.load(names, options.data, include)
        for task, reason in self.skipped.items():
            print(
                f"evaluate: {task} is left out: {reason}", file=sys.stderr, flush=True
            )
        mesh = parse_mesh(options.mesh) if options.mesh else None
        lm = load_model(options.preset, options.dtype, options.revision, mesh)
        if options.adapters:
            lm.load_adapters(options.adapters)
        self.texts = texts.read(options.perplexity, lm)
        # Also where no task is asked for: it refuses the directory of another model.
        self.model = OpenLlamaLM(
            lm=lm,
            batch_size=options.batch_size,
            apart=options.separate_tokenization,
            answers=self.directory / ANSWERS,
        )
        self.results = {
            "metrics": [],
            "skipped": {},
            "perplexity": None,
            "human_eval": None,
        }
        if (self.directory / measurements.RESULTS).exists():
            # Parts that an earlier command has measured of the same model.
            self.results |= measurements.read(self.directory)
        self.results["run"] = self.described(name, lm)

    def measure(self):
        """Measures all that the flags ask for."""
        from keras_openllama.evaluation import tasks

        options = self.options
        if options.suite or options.tasks:
            metrics = tasks.run(
                self.model, self.tasks, options.num_fewshot, options.limit
            )
            for row in metrics:
                row["apart"] = options.separate_tokenization
            self.write(metrics=self.merged(metrics), skipped=self.skipped)
        if options.perplexity:
            self.write(perplexity=self.perplexity(self.model.lm))
        if options.human_eval:
            self.write(human_eval=self.human_eval(self.model.lm))

    def merged(self, metrics):
        """New metrics, and those of tasks that were measured before and not now."""
        new = {row["task"] for row in metrics}
        return [r for r in self.results["metrics"] if r["task"] not in new] + metrics

    def perplexity(self, lm):
        from keras_openllama.evaluation import perplexity

        options = self.options
        rows = perplexity.evaluate(
            lm,
            self.texts,
            protocol=options.protocol,
            context=options.context,
            stride=options.stride,
            batch_size=options.batch_size,
        )
        print(perplexity.table(rows), flush=True)
        return rows

    def human_eval(self, lm):
        from keras_openllama.evaluation import human_eval

        options = self.options
        found = human_eval.evaluate(
            lm,
            samples_per_problem=options.samples_per_problem,
            temperature=options.temperature,
            limit=options.problems,
            directory=self.directory,
            run_code=options.run_generated_code,
            batch_size=options.batch_size,
        )
        for key, value in found.items():
            print(f"HumanEval, {key}: {value}")
        return found

    def described(self, name, lm):
        options = self.options
        preset = options.preset
        if options.adapters:
            preset = f"{preset} with {options.adapters}"
        packages = ("keras-openllama", "keras", "lm_eval")
        return {
            "name": name,
            "preset": preset,
            "revision": options.revision,
            "weights": lm.loaded_from,
            "parameters": lm.count_params(),
            "dtype": options.dtype,
            "backend": os.environ["KERAS_BACKEND"],
            "batch_size": options.batch_size,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }

    def write(self, **parts):
        """Puts new parts into the results, and draws them."""
        from keras_openllama.evaluation.report import measurements, rendering, tables
        from keras_openllama.utils import files

        self.results |= parts
        text = json.dumps(self.results, indent=2) + "\n"
        files.write_bytes(self.directory / measurements.RESULTS, text.encode())
        rendering.write([self.results], self.directory, self.options.compare_with)
        if parts.get("metrics"):
            print(tables.table([self.results], self.options.compare_with), flush=True)


def compare(options):
    """Puts several evaluations side by side."""
    from keras_openllama.evaluation.report import measurements, rendering, tables

    runs = [measurements.read(directory) for directory in options.compare]
    paths = rendering.write(runs, options.output, options.compare_with)
    print(tables.table(runs, options.compare_with))
    print(f"written: {', '.join(map(str, paths))}")


@command("evaluate", extra="eval")
def main(arguments, prog):
    """Runs the command; returns the exit code."""
    parser, options = parse_arguments(arguments, prog)
    check(parser, options)
    choose_backend(options.backend)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.compare:
            compare(options)
            return 0
        with quiet_tensorflow():
            import keras  # noqa: F401
        evaluation = Evaluation(options)
    except KeyboardInterrupt:
        return os.EX_TEMPFAIL
    except FileNotFoundError:
        raise
    except OSError as error:
        return _failed(error, prog)
    try:
        evaluation.measure()
    except KeyboardInterrupt:
        print("\nStopped; what was answered is kept. The same command goes on.")
        return os.EX_TEMPFAIL
    except OSError as error:
        return _failed(error, prog)
    print(f"All of it is in {evaluation.directory}.")
    return os.EX_UNAVAILABLE if evaluation.skipped else 0


def _failed(error, prog):
    print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
    return os.EX_IOERR
