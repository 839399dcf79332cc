"""The trainer: one training loop for pretraining and fine-tuning.

A run has five parts. `Trainer` drives them and does not know which kind of run it is:

    config    `TrainConfig`: the settings of the steps
    state     `TrainState`: model and optimizer. `JaxTrainState` compiles its own step;
              `KerasTrainState` uses Keras's, on TensorFlow and PyTorch
    data      `TrainData`: the batch of each step, a function of the seed and the step
              only. `token_data.TokenData` and `instruction_data.InstructionData`
    output    the run's directory: log, checkpoints, samples, loss plot
    options   `RunOptions`: where and how it runs. Only the mesh affects the results, by
              rounding

`pretraining.open_run` and `finetuning.open_run` assemble these. A step takes a batch,
trains on it and reports its metrics. Then follow a checkpoint, validation and samples,
each when it is due. The log is synced to disk before a checkpoint is saved, so that a
resumed run can drop later records and continue bit-exactly. Validation and samples come
after the checkpoint: if they fail, the trained weights are safe, and running the
command again makes up for what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax

from keras_openllama.runs import loss_plot, metrics_log, run_directory
from keras_openllama.runs.checkpoint_manager import CheckpointManager
from keras_openllama.runs.interruption import (
    DivergedError,
    StopRequest,
    reading_data,
)
from keras_openllama.runs.step_reporter import StepReporter
from keras_openllama.runs.train_config import TrainConfig
from keras_openllama.training.step_metrics import LossSums, StepMetrics
from keras_openllama.utils import files

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

LOSS_PLOT = "loss.png"
PROFILE = "profile"


class TrainState(Protocol):
    """A model with its optimizer, and the programs that train and evaluate it.

    A batch is `(x, y, sample_weight)`, all arrays of shape
    `(sequences, sequence_length)`: `x` is a dict of `token_ids` (int32) and
    `padding_mask` (bool, or int32 that numbers the documents of a sequence), `y` int32
    and `sample_weight` float32.
    """

    lm: OpenLlamaCausalLM

    def put_batch(self, batch: Any) -> Any:
        """Puts this process's sequences on the devices, as part of the global batch."""

    def compile(self, batch: Any, evaluation: bool) -> None:
        """Compiles the training step, and the evaluation step if `evaluation`.

        They are compiled for the shapes and sharding of `batch`.
        """

    def train_step(self, batch: Any) -> StepMetrics:
        """Runs a step, dispatched asynchronously; the metrics may not be ready yet."""

    def evaluate_batch(self, batch: Any) -> tuple[LossSums, Any]:
        """Returns the sums over a batch's targets, and the sum of their weights."""

    def block_until_ready(self) -> None:
        """Waits until all steps have been computed."""

    def arrays(self) -> dict[str, dict[str, Any]]:
        """Returns the arrays of a checkpoint, by part and variable path."""

    def restore(self, checkpoints: CheckpointManager) -> dict[str, Any] | None:
        """Restores the newest intact checkpoint.

        Returns:
            The metadata in its `checkpoint.json`, or `None` if there is no checkpoint.
        """

    def update_model(self) -> None:
        """Assigns the current weights to the variables of `lm`."""

    def generate(self, prompts: list, **options: Any) -> list[str]:
        """Generates with the current weights, see `OpenLlamaCausalLM.generate`."""


class ValidationData(Protocol):
    """Held-out data, by source.

    Attributes:
        sources: Names of the sources that have held-out data.
    """

    sources: list[str]

    def measure(
        self, evaluate: Callable[[Any], tuple[LossSums, Any]]
    ) -> dict[str, Any]:
        """Evaluates all batches; returns a validation record, see `metrics_log`."""


class TrainData(Protocol):
    """The batches of a run.

    Attributes:
        validation: The held-out data.
    """

    validation: ValidationData

    def batches(self, from_step: int) -> Iterable[Any]:
        """Returns the batches of this process after `from_step` steps."""

    def sequences_read(self, step: int) -> list:
        """Identifies the sequences of step `step` (from 0), on all processes.

        Returns:
            A JSON-serializable value for each sequence, such as its index.
        """

    def tokens(self, steps: int) -> int:
        """Returns the number of tokens in the first `steps` steps."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where and how a run is executed.

    Of these, only the mesh affects the results: it changes losses by rounding, about
    1e-6 relative in float32.

    Attributes:
        output: The run's directory, shared by all processes.
        mesh: Sizes of the mesh axes `"data"`, `"fsdp"` and `"model"`; `None` selects
            the default mesh.
        accept_changes: Whether a run may be resumed with other settings.
        profile: First and last step that JAX's profiler records.
        start_time: `time.monotonic()` when the process started.
        report: Function that prints a line; called on process 0 only.
    """

    output: str
    mesh: dict[str, int] | None = None
    accept_changes: bool = False
    profile: tuple[int, int] | None = None
    start_time: float | None = None
    report: Callable[[str], None] = print

    def log(self, line: str) -> None:
        """Reports a line, on process 0 only."""
        if jax.process_index() == 0:
            self.report(line)


class SamplePrompts(NamedTuple):
    """The prompts that are completed during a run, and how.

    Attributes:
        prompts: Dict from label (one line) to prompt (string or chat).
        max_new_tokens: Limit of generated tokens per prompt.
        max_length: Limit including the prompt, see `generate`.
        before_and_after: Whether samples are generated before the first step and after
            the last one.
    """

    prompts: Mapping[str, Any]
    max_new_tokens: int = 48
    max_length: int | None = None
    before_and_after: bool = False


@contextlib.contextmanager
def lock_run(output: str) -> Iterator[None]:
    """Locks a run's directory against other runs, on process 0.

    Args:
        output: The run's directory.

    Raises:
        ValueError: if the directory is remote.
        run_directory.RunBusyError: if another process trains in it.
    """
    if files.is_remote(output):
        raise ValueError(
            "`output` must be a path on a local or mounted (NFS, gcsfuse) file system, "
            "because logs are appended to; `gs://…` is not supported. Received: "
            f"output={output!r}"
        )
    lock = contextlib.nullcontext()
    if jax.process_index() == 0:
        lock = run_directory.lock_directory(output)
    with lock:
        yield


class Trainer:
    """Trains a run from its newest checkpoint to its last step.

    Args:
        config: The settings of the steps.
        state: The model and its optimizer, which must be built.
        data: The batches.
        options: Where and how the run is executed; the caller holds the lock of the
            directory, see `lock_run`.
        info: JSON-serializable dict, stored in each checkpoint's metadata file
            (`checkpoint.json`).
        sampling: The prompts to complete.

    Attributes:
        step: Steps done.

    Raises:
        checkpoint_manager.CheckpointError: if checkpoints exist, but none is intact.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        data: TrainData,
        options: RunOptions,
        info: Mapping[str, Any],
        sampling: SamplePrompts,
    ):
        self.config, self.state, self.data = config, state, data
        self.options, self.info, self.sampling = options, info, sampling
        self._profiling = False
        self.checkpoints = CheckpointManager(
            options.output, config.keep_last, config.milestone_every
        )
        self.step = self._restore()
        self.reporter = StepReporter(
            state.lm,
            config,
            data,
            output=options.output,
            from_step=self.step,
            start_time=options.start_time,
        )

    def _restore(self):
        metadata = self.state.restore(self.checkpoints)
        if metadata is None:
            return 0
        self.options.log(f"Resuming from the checkpoint of step {metadata['step']}.")
        return metadata["step"]

    # ----- The training loop

    @property
    def complete(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.config.steps

    def train(self) -> str | None:
        """Trains until the last step, or until a signal requests to stop.

        Returns:
            `None` if the run is complete, or the name of the signal.

        Raises:
            interruption.DivergedError: if too many consecutive steps were skipped, or
                the validation loss is not finite.
            interruption.DataReadError: if training data cannot be read.
            checkpoint_manager.CheckpointError: if a checkpoint cannot be written.
            OSError: if the log cannot be written.
        """
        if self.complete:
            self.options.log(f"The run in {self.options.output} is complete.")
            if not (self._validation_is_due() or self._samples_are_due()):
                return None
        self._batches = iter(self.data.batches(self.step))
        batch = self._next_batch()
        if self._is_validation_empty():
            self.options.log(
                "No held-out data with target tokens: validation is disabled."
            )
        if not self.complete or self._validation_is_due():
            self._compile(batch)
        try:
            with self.reporter, StopRequest() as stop:
                # Before the first step, or what an interrupted run did not get to.
                self._validate_and_sample()
                stopped = self.complete
                while not stopped:
                    self._take_step(batch)
                    stopped = self._finish_step(stop)
                    if not stopped:
                        with self.reporter.clock.measure("data"):
                            batch = self._next_batch()
                self.checkpoints.wait()
        finally:
            self._stop_profiler()
            self.checkpoints.close()
        self._save_loss_plot()
        return None if self.complete else stop.signal

    def _take_step(self, batch):
        """Runs a step and reports it."""
        self._start_profiler()
        batch = self.state.put_batch(batch)
        with self.reporter.clock.measure("compute"):
            metrics = self.state.train_step(batch)
        self.step += 1
        self.reporter.add(self.step, metrics)
        if self.options.profile and self.step == self.options.profile[1]:
            self.state.block_until_ready()
            self._stop_profiler()

    def _finish_step(self, stop):
        """Does what is due after a step; returns whether training ends here."""
        intervals = self.config.save_every, self.config.milestone_every
        ends = stop.requested(self.step) or self.complete
        # First of all: the process may be killed within seconds, or a later part fail.
        if ends or any(_is_due(every, self.step) for every in intervals):
            self._save_checkpoint()
        if ends:
            self.checkpoints.wait()
        if self.complete or not ends:  # Else the resumed run makes up for it.
            self._validate_and_sample()
        self.checkpoints.raise_if_failed()
        return ends

    # ----- Parts of the loop

    def _next_batch(self):
        with reading_data():
            return next(self._batches)

    def _is_validation_empty(self):
        """Whether validation is requested, but there are no held-out data."""
        return self.config.validate_every > 0 and not self.data.validation.sources

    def _validates(self):
        return self.config.validate_every > 0 and not self._is_validation_empty()

    def _compile(self, batch):
        self.options.log("Compiling the training step …")
        start = time.monotonic()
        batch = self.state.put_batch(batch)
        self.state.compile(batch, evaluation=self._validates())
        self.options.log(f"Compiled in {time.monotonic() - start:.1f} s.")

    def _validate_and_sample(self):
        """Validates and generates samples, each if it is due at this step."""
        if self._validation_is_due():
            self._validate()
        if self._samples_are_due():
            self._generate_samples()

    def _validation_is_due(self):
        """Whether this step needs a validation that is not in the log."""
        if self.step:
            due = self.complete or _is_due(self.config.validate_every, self.step)
        else:
            due = self.sampling.before_and_after
        if not (due and self._validates()):
            return False
        return not metrics_log.has_validation(self.options.output, self.step)

    def _samples_are_due(self):
        """Whether this step needs samples that are not in the log."""
        due = self.step and _is_due(self.config.sample_every, self.step)
        if not self.step or self.complete:
            due = due or self.sampling.before_and_after
        if not (due and self.sampling.prompts):
            return False
        return not metrics_log.has_sample(self.options.output, self.step)

    def _validate(self):
        self.reporter.flush()
        result = self.data.validation.measure(
            lambda batch: self.state.evaluate_batch(self.state.put_batch(batch))
        )
        if not math.isfinite(result["loss"]):
            raise DivergedError(
                f"The validation loss of step {self.step} is {result['loss']}: the "
                "weights have diverged. Start again in another output directory "
                "with a lower learning rate."
            )
        self.reporter.log_validation(result)
        self._save_loss_plot()

    def _generate_samples(self):
        self.reporter.flush()
        when = ""
        if self.sampling.before_and_after:
            when = ", after" if self.complete else ", before" if not self.step else ""
        options = {"max_new_tokens": self.sampling.max_new_tokens}
        if self.sampling.max_length:
            options["max_length"] = self.sampling.max_length
        prompts = self.sampling.prompts
        texts = self.state.generate(list(prompts.values()), **options)
        for label, prompt, text in zip(prompts, prompts.values(), texts, strict=True):
            if isinstance(prompt, dict):  # `generate` returns only the reply of a chat.
                text = f"{prompt['messages']}\n{text}"
            self.reporter.log_sample(f"{label}{when}", text, show=bool(when))

    def _save_checkpoint(self):
        self.reporter.flush()
        info = {**self.info, "tokens": self.data.tokens(self.step)}
        info["data"] = {"next_step": self.step, **info.get("data", {})}
        info["versions"] = run_directory.installed_versions()
        with self.reporter.clock.measure("checkpoint"):
            self.checkpoints.save(self.step, self.state.arrays(), info)

    def _start_profiler(self):
        """Starts JAX's profiler if it is to record the next step."""
        first, last = self.options.profile or (0, 0)
        if not self._profiling and first <= self.step + 1 <= last:
            # Without JAX's tracer of Python calls: it sets a hook in all threads, and
            # has crashed a run (a null pointer in CPython 3.11's _PyEval_SetProfile).
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            path = os.path.join(self.options.output, PROFILE)
            jax.profiler.start_trace(path, profiler_options=options)
            self._profiling = True

    def _stop_profiler(self):
        if self._profiling:
            self._profiling = False
            jax.profiler.stop_trace()

    def _save_loss_plot(self):
        if jax.process_index() == 0 and self.step:  # Before step 1 there is no loss.
            output = self.options.output
            runs = loss_plot.read_runs([output])
            loss_plot.save_loss_plot(runs, os.path.join(output, LOSS_PLOT))


def _is_due(every, step):
    return every > 0 and step % every == 0
