"""The trainer: the one loop of pretraining and fine-tuning.

A run is five parts, and `Trainer` drives them without knowing which kind it is:

    config    `TrainConfig`: what decides the course of the steps
    state     `TrainState`: the model and its optimizer. `JaxTrainState` compiles the
              step; `KerasTrainState` has Keras do it, on TensorFlow and PyTorch
    data      `TrainData`: the batch of each step, a function of the seed and the step
              alone. `token_data.TokenData` and `instruction_data.InstructionData`
    output    the run's directory: log, checkpoints, samples, loss picture
    options   `RunOptions`: where and how it runs; nothing of it changes the course

`pretraining.open_run` and `finetuning.open_run` put these together. A step is: take the
batch, compute, report, and then what is due: validation, samples, a checkpoint. The log
is on the disk before a checkpoint that knows of its steps, so that a resumed run drops
what came later and continues as if it had never stopped. The samples at the end come
after the last checkpoint: whatever fails there, the trained weights are safe, and the
same command writes the samples.
"""

import contextlib
import dataclasses
import os
import time
from typing import NamedTuple, Protocol

import jax

from keras_openllama.runs import loss_plot, metrics_log, run_directory
from keras_openllama.runs.checkpoint_manager import Checkpoints
from keras_openllama.runs.interruption import StopRequest, reading_data
from keras_openllama.runs.step_reporter import StepReporter
from keras_openllama.utils import files

PICTURE = "loss.png"
PROFILE = "profile"


class TrainState(Protocol):
    """A model, its optimizer, and how a step changes them."""

    lm: object

    def put(self, batch):
        """This process's sequences as a part of the global batch on the devices."""

    def compile(self, batch, evaluation):
        """Prepares the step, and the evaluation if wanted, for batches like this."""

    def step(self, batch):
        """Trains; returns `step_metrics.StepMetrics`, which may still be computed."""

    def evaluate(self, batch):
        """Returns `step_metrics.LossSums` and the sum of the targets' weights."""

    def wait(self):
        """Returns when all steps are computed."""

    def arrays(self):
        """What training changes, as a dict of dicts of arrays by variable path."""

    def restore(self, checkpoints):
        """Takes the newest whole checkpoint; returns its marker, or `None`."""

    def generate(self, prompts, **options):
        """Texts that the model writes now, see `OpenLlamaCausalLM.generate`."""


class ValidationData(Protocol):
    """Batches that were set aside, by source."""

    sources: list

    def measure(self, evaluate):
        """Returns the record of a validation, see `metrics_log`."""


class TrainData(Protocol):
    """What a run reads."""

    validation: ValidationData

    def batches(self, from_step):
        """An iterator of this process's batches, `from_step` steps into the run."""

    def sequences_read(self, step):
        """Which sequences all processes read in a step, from 0 on, for JSON."""

    def tokens(self, steps):
        """How many tokens the first steps read: int."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where and how a run is carried out; its course does not depend on it.

    Attributes:
        output: string, the run's directory; all processes see it.
        mesh: dict of `"data"`, `"fsdp"`, `"model"`; the default's if `None`.
        accept_changes: bool, whether a run may be resumed with other settings.
        profile: pair of ints, first and last step that JAX's profiler records.
        began: float, `time.monotonic()` when the process began.
        report: called with lines of text, on the first process.
    """

    output: str
    mesh: dict | None = None
    accept_changes: bool = False
    profile: tuple | None = None
    began: float | None = None
    report: object = print

    def say(self, line):
        """Reports a line, on the first process."""
        if jax.process_index() == 0:
            self.report(line)


class Sampling(NamedTuple):
    """The texts that the model writes during a run.

    Attributes:
        prompts: dict of prompts (strings, or chats) by tag, one line each.
        max_new_tokens: int.
        max_length: int or `None`, see `generate`.
        before_and_after: bool, whether it writes before the first step and at the end.
    """

    prompts: dict
    max_new_tokens: int = 48
    max_length: int | None = None
    before_and_after: bool = False


@contextlib.contextmanager
def exclusive(output):
    """Keeps other processes out of a run's directory.

    Raises:
        ValueError: if the directory is remote.
        run_directory.Busy: if another process trains in it.
    """
    if files.is_remote(output):
        raise ValueError(
            "`output` is a directory on this machine, or on a file system that all "
            "hosts have mounted (NFS, gcsfuse): logs are appended to. Received: "
            f"output={output!r}"
        )
    alone = contextlib.nullcontext()
    if jax.process_index() == 0:
        alone = run_directory.locked(output)
    with alone:
        yield


class Trainer:
    """A run, from its newest checkpoint to its last step.

    Args:
        config: `TrainConfig`.
        state: `TrainState`, its optimizer built.
        data: `TrainData`.
        options: `RunOptions`; the process has the directory to itself.
        info: dict, what a checkpoint's marker tells beside the step, as JSON.
        sampling: `Sampling`.

    Attributes:
        step: int, steps done.

    Raises:
        checkpoint_manager.CheckpointError: if no checkpoint can be read.
    """

    def __init__(self, config, state, data, options, info, sampling):
        self.config, self.state, self.data = config, state, data
        self.options, self.info, self.sampling = options, info, sampling
        self._profiling = False
        self.checkpoints = Checkpoints(
            options.output, config.keep_last, config.milestone_every
        )
        self.step = self._restore()

    def _restore(self):
        marker = self.state.restore(self.checkpoints)
        if marker is None:
            return 0
        self.options.say(f"Resuming from the checkpoint of step {marker['step']}.")
        return marker["step"]

    # ----- The loop

    @property
    def complete(self):
        """Whether the last step is done."""
        return self.step >= self.config.steps

    def train(self):
        """Trains until the last step, or until a signal asks to stop.

        Returns:
            `None` if the run is complete, or the name of the signal.

        Raises:
            interruption.Diverged: if too many steps in a row had to be skipped.
            interruption.DataNotRead: if a file of the data is damaged or missing.
            checkpoint_manager.CheckpointError: if a checkpoint cannot be written.
            OSError: if the log cannot be written.
        """
        if self.complete:
            self.options.say(f"The run in {self.options.output} is complete.")
            if not self._sampled():
                with self._reporter() as self.reporter:
                    self._sample()
            return None
        self._batches = iter(self.data.batches(self.step))
        batch = self._next_batch()
        self._check_validation()
        self._compile(batch)
        try:
            with self._reporter() as self.reporter, StopRequest() as stop:
                if self.step == 0:
                    self._begin()
                while not self._take_step(batch, stop):
                    with self.reporter.clock.measure("data"):
                        batch = self._next_batch()
                self.checkpoints.wait()
                if self.complete and not self._sampled():
                    self._sample()
        finally:
            self._end_profile()
            self.checkpoints.close()
        self._draw()
        return None if self.complete else stop.signal

    def _begin(self):
        """What is measured before the first step."""
        if self.sampling.before_and_after:
            self._validate()
            if not self._sampled():
                self._sample()

    def _take_step(self, batch, stop):
        """One step and what is due after it; returns whether it was the last."""
        config, reporter = self.config, self.reporter
        self._begin_profile()
        batch = self.state.put(batch)
        with reporter.clock.measure("compute"):
            metrics = self.state.step(batch)
        self.step += 1
        reporter.add(self.step, metrics)
        if self.options.profile and self.step == self.options.profile[1]:
            self.state.wait()
            self._end_profile()
        stopped = stop.at(self.step)
        if stopped:  # There may be seconds left before a kill.
            self._save()
            self.checkpoints.wait()
        last = self.complete and config.validate_every > 0
        if last or _due(config.validate_every, self.step):
            self._validate()
        if _due(config.sample_every, self.step):
            self._sample()
        intervals = config.save_every, config.milestone_every
        due = self.complete or any(_due(every, self.step) for every in intervals)
        if due and not stopped:
            self._save()
        self.checkpoints.check()
        return stopped or self.complete

    # ----- Its parts

    def _next_batch(self):
        with reading_data():
            return next(self._batches)

    def _check_validation(self):
        if self.config.validate_every and not self.data.validation.sources:
            self.options.say("No data were set aside: there is no validation.")
            self.config = dataclasses.replace(self.config, validate_every=0)

    def _compile(self, batch):
        self.options.say("Compiling the training step …")
        start = time.monotonic()
        evaluation = self.config.validate_every > 0
        self.state.compile(self.state.put(batch), evaluation)
        self.options.say(f"Compiled in {time.monotonic() - start:.1f} s.")

    def _reporter(self):
        options = self.options
        return StepReporter(
            *(self.state.lm, self.config, self.data),
            *(options.output, self.step, options.began),
        )

    def _validate(self):
        if not self.config.validate_every:
            return
        self.reporter.settle()
        result = self.data.validation.measure(
            lambda batch: self.state.evaluate(self.state.put(batch))
        )
        self.reporter.validation(result)
        self._draw()

    def _sample(self):
        self.reporter.settle()
        when = ""
        if self.sampling.before_and_after:
            when = ", after" if self.complete else ", before" if not self.step else ""
        options = {"max_new_tokens": self.sampling.max_new_tokens}
        if self.sampling.max_length:
            options["max_length"] = self.sampling.max_length
        prompts = self.sampling.prompts
        texts = self.state.generate(list(prompts.values()), **options)
        for tag, prompt, text in zip(prompts, prompts.values(), texts, strict=True):
            if isinstance(prompt, dict):  # A chat's reply comes without the chat.
                text = f"{prompt['messages']}\n{text}"
            self.reporter.text(f"{tag}{when}", text, show=bool(when))

    def _sampled(self):
        """Whether nothing is left to write before the first step, or at the end."""
        if not (self.sampling.before_and_after and self.sampling.prompts):
            return True
        return metrics_log.has_sample(self.options.output, self.step)

    def _save(self):
        self.reporter.settle()
        info = {**self.info, "tokens": self.data.tokens(self.step)}
        info["data"] = {"next_step": self.step, **info.get("data", {})}
        info["versions"] = run_directory.versions()
        with self.reporter.clock.measure("checkpoint"):
            self.checkpoints.save(self.step, self.state.arrays(), info)

    def _begin_profile(self):
        """Starts JAX's profiler before the next step, if that is to be recorded."""
        first, last = self.options.profile or (0, 0)
        if not self._profiling and first <= self.step + 1 <= last:
            jax.profiler.start_trace(os.path.join(self.options.output, PROFILE))
            self._profiling = True

    def _end_profile(self):
        if self._profiling:
            self._profiling = False
            jax.profiler.stop_trace()

    def _draw(self):
        if jax.process_index() == 0 and self.step:  # There is a loss to draw.
            output = self.options.output
            loss_plot.draw(loss_plot.read_runs([output]), os.path.join(output, PICTURE))


def _due(every, step):
    return every > 0 and step % every == 0
