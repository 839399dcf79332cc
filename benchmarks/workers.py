"""Contenders in separate processes, which measure alternately."""

import json
import os
import statistics
import subprocess
import sys


class Worker:
    """The process of a contender. It runs a script with this process's arguments.

    Args:
        contender: string, such as `"ours/jax"`, passed to the script as `--work`.
        *flags: strings, further arguments, which override earlier ones.
        script: path of the script.
    """

    def __init__(self, contender, *flags, script):
        self.name = contender
        command = [script, *sys.argv[1:], *flags, "--work", contender]
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"The worker did not start: python {' '.join(command)}")

    def measure(self):
        """Lets the worker measure once; returns its answer."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def start_worker(contender):
    """Selects the Keras backend in a worker, before Keras is imported.

    Returns:
        The name of the contender without the backend, and the stream for `serve`.
    """
    kind, backend = contender.split("/")
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Output of libraries goes to stderr.
    return kind, answers


def serve(answers, measure):
    """Calls `measure` in a worker for each line of standard input."""
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=answers, flush=True)


def alternate(contenders, rounds, *flags, script):
    """Starts the contenders and lets them measure alternately.

    Args:
        contenders: list of strings, see `Worker`.
        rounds: int.
        *flags, script: see `Worker`.

    Yields:
        The measurements of a round, by contender.
    """
    from tqdm import tqdm

    workers = [
        Worker(name, *flags, script=script) for name in tqdm(contenders, "start")
    ]
    for number in tqdm(range(rounds), "rounds"):
        # In another order each time: the first one runs on the coolest CPU.
        first = number % len(workers)
        turns = workers[first:] + workers[:first]
        yield {worker.name: worker.measure() for worker in turns}
    for worker in workers:
        worker.close()


def ratio(rates, name, reference):
    """The rate of a contender divided by that of a reference, as text.

    This is the median of the ratios of the rounds.

    Args:
        rates: dict of contender -> list of rates, one per round.
        name: string, the contender.
        reference: string. If it has no rates, the result is empty.
    """
    if reference not in rates:
        return ""
    pairs = zip(rates[name], rates[reference], strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.2f}"


def add_sizes(parser):
    """Adds the flags for the sizes of the model to a parser."""
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--vocabulary", type=int, default=32000)
