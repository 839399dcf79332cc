"""Contenders in processes of their own, which measure by turns."""

import json
import os
import statistics
import subprocess
import sys


class Worker:
    """A contender's process, which runs a script; flags overrule those given to it.

    Args:
        contender: string, such as `"ours/jax"`, which the script gets as `--work`.
        *flags: strings, further words of its command line.
        script: path.
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
            raise RuntimeError(f"This did not start: python {' '.join(command)}")

    def measure(self):
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def begin(contender):
    """In a worker: chooses Keras's backend, before anything has imported Keras.

    Returns:
        The contender's kind, and the stream for `serve`.
    """
    kind, backend = contender.split("/")
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.
    return kind, answers


def serve(answers, measure):
    """In a worker: measures as often as its standard input says."""
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=answers, flush=True)


def by_turns(contenders, rounds, *flags, script):
    """Lets contenders measure by turns.

    Args:
        contenders: list of strings, see `Worker`.
        rounds: int.
        *flags, script: see `Worker`.

    Yields:
        Dict by contender of what it has measured in a round.
    """
    from tqdm import tqdm

    workers = [
        Worker(name, *flags, script=script) for name in tqdm(contenders, "start")
    ]
    for number in tqdm(range(rounds), "rounds"):
        # In another order each time: whoever is first has the coolest machine.
        first = number % len(workers)
        turns = workers[first:] + workers[:first]
        yield {worker.name: worker.measure() for worker in turns}
    for worker in workers:
        worker.close()


def ratio(rates, name, reference):
    """A contender's rate by that of the reference, the median of the rounds, as text.

    Args:
        rates: dict by contender of lists of rates, one a round.
        name: string, the contender.
        reference: string; without it among the rates there is no ratio.
    """
    if reference not in rates:
        return ""
    pairs = zip(rates[name], rates[reference], strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.2f}"


def add_sizes(parser):
    """Adds the flags of a model's sizes to argparse's parser."""
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--vocabulary", type=int, default=32000)
