"""The Beam pipeline that tokenizes units: on all cores, or on any runner of Beam's."""

import concurrent.futures
import contextlib
import logging
import os
import re
import shlex
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from keras_openllama.data import tokenizing, worker
from keras_openllama.data.text_sources import SourceError
from keras_openllama.utils import files
from keras_openllama.utils.background import run_in_background

# Without Google's cloud libraries Beam warns at its import, wanted or not.
logging.disable(logging.WARNING)
import apache_beam as beam  # noqa: E402
from apache_beam.options.pipeline_options import (  # noqa: E402
    DirectOptions,
    PipelineOptions,
)
from apache_beam.runners.portability import fn_api_runner  # noqa: E402
from apache_beam.transforms import environments  # noqa: E402

logging.disable(logging.NOTSET)

_WORKER_LOG = "workers.log"
_POLL_SECONDS = 0.25
_GRACE_SECONDS = 5.0
_LOG_LINES = 5


class TokenizeUnit(beam.DoFn):
    """Turns a `text_sources.Unit` into shards and a receipt; yields what is wrong.

    Damaged input does not end the pipeline: the other units are of use once it is
    mended.

    Args:
        settings: `tokenizing.Settings`.
        directory: string, where the shards go.
    """

    def __init__(self, settings, directory):
        self._settings, self._directory = settings, directory

    def process(self, unit):
        try:
            tokenizing.tokenize_unit(unit, self._settings, self._directory)
        except SourceError as error:
            files.write_bytes(
                files.join(self._directory, complaint_name(unit)), str(error).encode()
            )


def complaint_name(unit):
    """Name of the file that says why a unit cannot be finished."""
    return f"{unit.number:05}.complaint"


def run(units, settings, directory, workers=None, beam_flags=None):
    """Tokenizes units.

    Args:
        units: list of `text_sources.Unit`, all of one source.
        settings: `tokenizing.Settings`.
        directory: string, where shards and receipts go.
        workers: int, processes on this machine; all cores if `None`.
        beam_flags: list of strings, such as `["--runner=DataflowRunner", …]`: Beam runs
            where they say, and not on this machine.

    Raises:
        SourceError: if input is damaged, after all the rest is done.
        RuntimeError: if a worker dies, or Beam fails.
    """
    for unit in units:  # What was left by a run that ended early.
        for name in (
            complaint_name(unit),
            tokenizing.receipt_name(unit),
            tokenizing.progress_name(unit),
        ):
            files.remove_file(files.join(directory, name))
    if beam_flags:
        _run_pipeline(units, settings, directory, None, PipelineOptions(beam_flags))
    else:
        _run_here(units, settings, directory, workers or os.cpu_count())
    complaints = [
        files.read_bytes(path).decode()
        for unit in units
        if files.exists(path := files.join(directory, complaint_name(unit)))
    ]
    if complaints:
        raise SourceError("\n".join(complaints))


def _run_pipeline(units, settings, directory, runner, options):
    with beam.Pipeline(runner=runner, options=options) as pipeline:
        _ = (
            pipeline
            | "Units" >> beam.Create(units)
            | "Spread" >> beam.Reshuffle()
            | "Tokenize" >> beam.ParDo(TokenizeUnit(settings, directory))
        )


def _run_here(units, settings, directory, workers):
    """Runs Beam in processes of this machine, and shows how far they are."""
    workers = min(workers, len(units))
    # The largest first, dealt out like cards: nobody is left with a large one.
    units = sorted(units, key=lambda unit: -unit.num_bytes)
    with contextlib.ExitStack() as stack:
        thread_errors = stack.enter_context(_quiet())
        bar = stack.enter_context(_bar(units))
        if workers == 1:
            log, runner = None, fn_api_runner.FnApiRunner()
            options = PipelineOptions([])
        else:
            log = Path(_local_directory(directory, stack), _WORKER_LOG)
            runner = fn_api_runner.FnApiRunner(default_environment=_environment(log))
            options = PipelineOptions([])
            options.view_as(DirectOptions).direct_num_workers = workers
            # "multi_processing" with an environment of our own instead of Beam's.
            options.view_as(DirectOptions).direct_running_mode = "subprocesses"
        run = run_in_background(
            _run_pipeline, units, settings, directory, runner, options
        )
        finished = set()
        while not _ended(run, _POLL_SECONDS):
            dead = _update_progress(units, directory, bar, finished)
            # What Beam has to say about it, if anything, comes first.
            if not dead and not thread_errors:
                continue
            if not _ended(run, _GRACE_SECONDS):
                dead = dead or _update_progress(units, directory, bar, finished)
                raise RuntimeError(_obituary(dead, log))
        if error := run.exception():
            raise RuntimeError(_summary(error, units)) from error
        bar.update(bar.total - bar.n)


def _summary(error, units):
    """The last line of what Beam says: the error itself, below a worker's traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[-1] if lines else repr(error)
    reason = re.sub(r"^RuntimeError: | *\[while running .*", "", reason)
    return (
        f"Tokenizing {units[0].source!r} failed: {reason}. Run the same command again "
        "when that is mended: what is finished is kept."
    )


def _ended(run, timeout):
    """Waits some seconds; returns whether a function in the background has ended."""
    return bool(concurrent.futures.wait([run], timeout).done)


def _environment(log):
    """Worker processes of this interpreter, whose chatter goes into a file."""
    command = [sys.executable, "-m", worker.__name__]
    command = f"exec {shlex.join(command)} >>{shlex.quote(str(log))} 2>&1"
    return environments.SubprocessSDKEnvironment(command)


def _local_directory(directory, stack):
    import tempfile

    if files.is_remote(directory):
        return stack.enter_context(tempfile.TemporaryDirectory())
    return directory


def _bar(units):
    return tqdm(
        desc=f"Tokenizing {units[0].source}",
        total=sum(unit.num_bytes for unit in units),
        unit="B",
        unit_scale=True,
        disable=None,  # Where stderr is no terminal.
    )


@contextlib.contextmanager
def _quiet():
    """Beam prints tracebacks of what is told in a line here, from threads too.

    Yields a list that gets the errors that end threads: a worker has died then, which
    Beam itself does not notice.
    """
    logger, hook = logging.getLogger("apache_beam"), threading.excepthook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    errors = []
    threading.excepthook = lambda args: errors.append(args.exc_value)
    try:
        yield errors
    finally:
        logger.setLevel(level)
        threading.excepthook = hook


def _update_progress(units, directory, bar, finished):
    """Updates the bar; returns a unit whose worker has died, if there is one."""
    done = 0
    for unit in units:
        if unit in finished:
            done += unit.num_bytes
        elif files.exists(files.join(directory, tokenizing.receipt_name(unit))):
            finished.add(unit)
        elif not files.is_remote(directory):
            read, is_dead = _progress_of(unit, directory)
            if is_dead:
                return unit
            done += read
    bar.update(max(0, min(done, bar.total) - bar.n))
    return None


def _progress_of(unit, directory):
    """Bytes of a unit that are done, and whether its worker died."""
    path = Path(directory, tokenizing.progress_name(unit))
    try:
        done, process = map(int, path.read_text("utf-8").split())
        os.kill(process, 0)
    except (FileNotFoundError, ValueError):
        return 0, False
    except ProcessLookupError:
        time.sleep(_POLL_SECONDS)  # It may have finished and gone.
        return 0, path.exists()
    return done, False


def _obituary(unit, log):
    lines = log.read_text("utf-8", "replace").splitlines() if log else []
    return (
        f"A worker died{f' while it read {unit.label}' if unit else ''}: killed, "
        "perhaps for want of memory (fewer --workers need less). Run the same command "
        "again: what is finished is kept. Its last words:\n"
        + "\n".join(lines[-_LOG_LINES:])
    )
