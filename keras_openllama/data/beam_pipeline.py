"""The Beam pipeline that tokenizes units, on all cores or on another Beam runner."""

import concurrent.futures
import contextlib
import logging
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from keras_openllama.data import tokenizing, worker
from keras_openllama.data.text_sources import SourceError, Unit
from keras_openllama.utils import files
from keras_openllama.utils.background import run_in_background

# Importing Beam without Google's cloud libraries logs warnings.
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
    """Tokenizes a `text_sources.Unit`, or writes a file with the error.

    Damaged input does not stop the pipeline, so that the other units are finished.

    Args:
        settings: tokenizer and filters.
        directory: directory to write to.
    """

    def __init__(self, settings: tokenizing.TokenizationSettings, directory: str):
        self._settings, self._directory = settings, directory

    def process(self, unit: Unit) -> None:
        """Tokenizes one unit. Called by Beam."""
        try:
            tokenizing.tokenize_unit(unit, self._settings, self._directory)
        except SourceError as error:
            files.write_bytes(
                files.join(self._directory, error_file_name(unit)), str(error).encode()
            )


def error_file_name(unit: Unit) -> str:
    """Name of the file with the reason why a unit cannot be finished."""
    return f"{unit.number:05}.error"


def tokenize_units(
    units: Sequence[Unit],
    settings: tokenizing.TokenizationSettings,
    directory: str,
    workers: int | None = None,
    beam_flags: list[str] | None = None,
) -> None:
    """Tokenizes units of one source.

    Args:
        units: the units.
        settings: tokenizer and filters.
        directory: directory for shards and summaries.
        workers: number of processes on this machine. Defaults to the number of cores.
        beam_flags: flags of a Beam runner, such as `["--runner=DataflowRunner", …]`.
            With them, that runner is used, and not this machine.

    Raises:
        SourceError: if input is damaged. All other units are finished first.
        RuntimeError: if a worker dies, or Beam fails.
    """
    for unit in units:  # Files of an interrupted run.
        for name in (
            error_file_name(unit),
            tokenizing.unit_summary_name(unit),
            tokenizing.progress_name(unit),
        ):
            files.remove_file(files.join(directory, name))
    if beam_flags:
        _run_pipeline(units, settings, directory, None, PipelineOptions(beam_flags))
    else:
        _run_locally(units, settings, directory, workers or os.cpu_count())
    errors = [
        files.read_bytes(path).decode()
        for unit in units
        if files.exists(path := files.join(directory, error_file_name(unit)))
    ]
    if errors:
        raise SourceError("\n".join(errors))


def _run_pipeline(units, settings, directory, runner, options):
    with beam.Pipeline(runner=runner, options=options) as pipeline:
        _ = (
            pipeline
            | "Units" >> beam.Create(units)
            | "Spread" >> beam.Reshuffle()
            | "Tokenize" >> beam.ParDo(TokenizeUnit(settings, directory))
        )


def _run_locally(units, settings, directory, workers):
    """Runs Beam in processes of this machine, with a progress bar."""
    workers = min(workers, len(units))
    # The largest first, so that no worker ends with a large unit.
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
            # As "multi_processing", with a custom environment instead of Beam's.
            options.view_as(DirectOptions).direct_running_mode = "subprocesses"
        run = run_in_background(
            _run_pipeline, units, settings, directory, runner, options
        )
        finished = set()
        while not _ended(run, _POLL_SECONDS):
            dead = _update_progress(units, directory, bar, finished)
            # Give Beam time to report the error itself.
            if not dead and not thread_errors:
                continue
            if not _ended(run, _GRACE_SECONDS):
                dead = dead or _update_progress(units, directory, bar, finished)
                raise RuntimeError(_death_message(dead, log))
        if error := run.exception():
            raise RuntimeError(_shorten(error, units)) from error
        bar.update(bar.total - bar.n)


def _shorten(error, units):
    """Shortens an error of Beam to its last line, below the traceback of a worker."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[-1] if lines else repr(error)
    reason = re.sub(r"^RuntimeError: | *\[while running .*", "", reason)
    return (
        f"Tokenizing {units[0].source!r} failed: {reason}. After fixing the cause, run "
        "the same command again to resume."
    )


def _ended(run, timeout):
    """Waits up to `timeout` seconds; returns whether a background call has ended."""
    return bool(concurrent.futures.wait([run], timeout).done)


def _environment(log):
    """Worker processes with this interpreter that write their output to a file."""
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
        disable=None,  # Disabled if stderr is not a terminal.
    )


@contextlib.contextmanager
def _quiet():
    """Silences Beam's tracebacks, from threads too. Errors are reported in one line.

    Yields a list that receives errors that end threads. They mean that a worker has
    died, which Beam itself does not notice.
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
    """Updates the bar; returns a unit whose worker has died, or `None`."""
    done = 0
    for unit in units:
        if unit in finished:
            done += unit.num_bytes
        elif files.exists(files.join(directory, tokenizing.unit_summary_name(unit))):
            finished.add(unit)
        elif not files.is_remote(directory):
            finished_bytes, is_dead = _progress_of(unit, directory)
            if is_dead:
                return unit
            done += finished_bytes
    bar.update(max(0, min(done, bar.total) - bar.n))
    return None


def _progress_of(unit, directory):
    """Finished bytes of a unit, and whether its worker has died."""
    path = Path(directory, tokenizing.progress_name(unit))
    try:
        done, process = map(int, path.read_text("utf-8").split())
        os.kill(process, 0)
    except (FileNotFoundError, ValueError):
        return 0, False
    except ProcessLookupError:
        time.sleep(_POLL_SECONDS)  # It may have finished and exited.
        return 0, path.exists()
    return done, False


def _death_message(unit, log):
    lines = log.read_text("utf-8", "replace").splitlines() if log else []
    return (
        f"A worker died{f' while reading {unit.label}' if unit else ''}, possibly out "
        "of memory (fewer --workers need less). Run the same command again to resume. "
        "Last lines of its log:\n" + "\n".join(lines[-_LOG_LINES:])
    )
