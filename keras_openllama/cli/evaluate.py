"""`keras-openllama evaluate`: tasks, perplexity, HumanEval, and comparisons."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_openllama.cli.command import command
from keras_openllama.cli.evaluate_options import check_options, parse_arguments
from keras_openllama.cli.messages import describe_error
from keras_openllama.cli.process import choose_backend, quiet_tensorflow

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

RESPONSES_FILE = "answers.sqlite"


def evaluation_name(preset: str) -> str:
    """Returns the full name of a preset, or the name of a directory.

    Example:
        >>> evaluation_name("7b_v2")
        'open_llama_7b_v2'
    """
    from keras_openllama import presets

    names = (preset, "open_llama_" + preset, Path(preset).resolve().name)
    return next((name for name in names if name in presets.registry()), names[-1])


class Evaluation:
    """An evaluation in an output directory, which is written after each part.

    Args:
        options: The parsed arguments of the command.

    Raises:
        ValueError: If the model, a task or a text is invalid.
        OSError: If a file cannot be read or written.
        ImportError: If a package of the extra `eval` is missing.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from keras_openllama.evaluation import tasks, texts
        from keras_openllama.evaluation.lm_eval_model import OpenLlamaLM
        from keras_openllama.evaluation.model_loading import load_model
        from keras_openllama.evaluation.report import measurements

        # The harness warns about each default value of a task's configuration.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.options = options
        name = evaluation_name(options.preset)
        name += "-adapters" if options.adapters else ""
        name += f"-{options.quantization}" if options.quantization else ""
        self.directory = Path(options.output or f"evaluations/{name}")
        self.directory.mkdir(parents=True, exist_ok=True)
        include = options.include_path
        names = tasks.task_names(options.suite, options.tasks, include)
        self.tasks, self.skipped = tasks.load_tasks(names, options.data, include)
        for task, reason in self.skipped.items():
            print(f"evaluate: {task} is skipped: {reason}", file=sys.stderr, flush=True)
        lm = load_model(
            options.preset,
            options.dtype,
            options.revision,
            options.mesh,
            options.adapters,
            quantization=options.quantization,
        )
        self.texts = texts.read_texts(options.perplexity, lm)
        # Also without tasks: it rejects the output directory of another model.
        self.model = OpenLlamaLM(
            lm=lm,
            batch_size=options.batch_size,
            separate_tokenization=options.separate_tokenization,
            response_cache=self.directory / RESPONSES_FILE,
        )
        self.results = {
            "metrics": [],
            "skipped": {},
            "perplexity": None,
            "human_eval": None,
        }
        if (self.directory / measurements.RESULTS_FILE).exists():
            # Results of earlier commands for the same model.
            self.results |= measurements.read_results(self.directory)
        self.results["run"] = self.run_metadata(name, lm)

    def measure(self) -> None:
        """Measures everything that the flags select."""
        from keras_openllama.evaluation import tasks

        options = self.options
        if options.suite or options.tasks:
            metrics = tasks.evaluate_tasks(
                self.model, self.tasks, options.num_fewshot, options.limit
            )
            for row in metrics:
                row["apart"] = options.separate_tokenization
            self.write_results(
                metrics=self.merge_metrics(metrics), skipped=self.skipped
            )
        if options.perplexity:
            self.write_results(perplexity=self.measure_perplexity(self.model.lm))
        if options.human_eval:
            self.write_results(human_eval=self.measure_human_eval(self.model.lm))

    def merge_metrics(self, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns new metrics together with earlier ones of other tasks."""
        new = {row["task"] for row in metrics}
        return [r for r in self.results["metrics"] if r["task"] not in new] + metrics

    def measure_perplexity(self, lm: OpenLlamaCausalLM) -> list[dict[str, Any]]:
        """Measures and prints the perplexity of the texts."""
        from keras_openllama.evaluation import perplexity

        options = self.options
        rows = perplexity.evaluate_perplexity(
            lm,
            self.texts,
            protocol=options.protocol,
            context=options.context,
            stride=options.stride,
            batch_size=options.batch_size,
        )
        print(perplexity.perplexity_table(rows), flush=True)
        return rows

    def measure_human_eval(self, lm: OpenLlamaCausalLM) -> dict[str, Any]:
        """Runs HumanEval and prints its metrics."""
        from keras_openllama.evaluation import human_eval

        options = self.options
        found = human_eval.evaluate_human_eval(
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

    def run_metadata(self, name: str, lm: OpenLlamaCausalLM) -> dict[str, Any]:
        """Returns what results.json records about the model and the software."""
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
            "quantization": options.quantization,
            "backend": os.environ["KERAS_BACKEND"],
            "batch_size": options.batch_size,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }

    def write_results(self, **parts: Any) -> None:
        """Adds parts to the results, and writes the files."""
        from keras_openllama.evaluation.report import measurements, rendering, tables
        from keras_openllama.utils import files

        self.results |= parts
        text = json.dumps(self.results, indent=2) + "\n"
        files.write_bytes(self.directory / measurements.RESULTS_FILE, text.encode())
        rendering.write_report(
            [self.results], self.directory, self.options.compare_with
        )
        if parts.get("metrics"):
            print(
                tables.results_table([self.results], self.options.compare_with),
                flush=True,
            )


def compare_evaluations(options: argparse.Namespace) -> None:
    """Writes and prints the comparison of several evaluations."""
    from keras_openllama.evaluation.report import measurements, rendering, tables

    runs = [measurements.read_results(directory) for directory in options.compare]
    paths = rendering.write_report(runs, options.output, options.compare_with)
    print(tables.results_table(runs, options.compare_with))
    print(f"Wrote {', '.join(map(str, paths))}")


@command("evaluate", extra="eval")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    parser, options = parse_arguments(arguments, prog)
    check_options(parser, options)
    choose_backend(options.backend)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.compare:
            compare_evaluations(options)
            return 0
        with quiet_tensorflow():
            import keras  # noqa: F401
        evaluation = Evaluation(options)
    except KeyboardInterrupt:
        return os.EX_TEMPFAIL
    except (FileNotFoundError, BrokenPipeError):
        raise
    except OSError as error:
        return _report_io_error(error, prog)
    try:
        evaluation.measure()
    except KeyboardInterrupt:
        print("\nStopped. The responses are saved: run the same command to resume.")
        return os.EX_TEMPFAIL
    except BrokenPipeError:
        raise
    except OSError as error:
        return _report_io_error(error, prog)
    print(f"Results: {evaluation.directory}")
    return os.EX_UNAVAILABLE if evaluation.skipped else 0


def _report_io_error(error, prog):
    print(f"{prog}: error: {describe_error(error)}", file=sys.stderr)
    return os.EX_IOERR
