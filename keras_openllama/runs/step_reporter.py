"""Reports the steps of a run: metrics log, progress bar, skipped steps."""

from __future__ import annotations

import collections
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import jax
from tqdm import tqdm

from keras_openllama.runs import throughput
from keras_openllama.runs.interruption import SkippedSteps
from keras_openllama.runs.metrics_log import RunLog
from keras_openllama.runs.train_config import TrainConfig
from keras_openllama.training.step_metrics import StepMetrics

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

# Heuristic: steps that may still be computed while an earlier one is reported.
_STEPS_AHEAD = 1
# Heuristic: seconds between updates of the bar, on a terminal and in a file.
_TERMINAL_SECONDS, _FILE_SECONDS = 0.5, 30.0


class ReportedData(Protocol):
    """The part of `trainer.TrainData` that a report needs."""

    def sequences_read(self, step: int) -> list:
        """Identifies the sequences of step `step` (from 0) on all processes."""

    def tokens(self, steps: int) -> int:
        """Returns the number of tokens in the first `steps` steps."""


class StepReporter:
    """Reports each step when it has been computed, while the next one is running.

    Use it as a context manager around the steps. Process 0 writes and prints; the
    others only count skipped steps.

    Args:
        lm: The model.
        config: The settings of the steps.
        data: The batches.
        output: The run's directory.
        from_step: Step of the checkpoint that the run resumes from; 0 for a new run.
        start_time: See `throughput.Clock`.

    Attributes:
        clock: The `throughput.Clock` of the run.

    Raises:
        interruption.DivergedError: if too many consecutive steps were skipped.
        OSError: if the log cannot be written.
    """

    def __init__(
        self,
        lm: OpenLlamaCausalLM,
        config: TrainConfig,
        data: ReportedData,
        output: str,
        from_step: int,
        start_time: float | None = None,
    ):
        self._config, self._data = config, data
        self._output, self._step = output, from_step
        self._pending = collections.deque()
        self._skipped = SkippedSteps(config.max_skipped_steps)
        sizes = lm.backbone
        self._flops = throughput.flops_per_token(
            lm.count_params(),
            num_layers=sizes.num_layers,
            num_query_heads=sizes.num_query_heads,
            head_dim=sizes.head_dim,
            sequence_length=config.sequence_length,
        )
        self._peak = throughput.peak_flops(jax.devices()[0].device_kind)
        self.clock = throughput.Clock(start_time)
        self._log = self._bar = None

    def __enter__(self) -> StepReporter:
        self._last = time.monotonic()
        if jax.process_index() == 0:
            self._log = RunLog(self._output, self._step)
            terminal = sys.stderr.isatty()
            self._bar = tqdm(
                total=self._config.steps,
                initial=self._step,
                unit="step",
                dynamic_ncols=terminal,
                mininterval=_TERMINAL_SECONDS if terminal else _FILE_SECONDS,
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._log is not None:
            self._bar.close()
            self._log.close()

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Adds a step, dispatched asynchronously; its metrics may not be ready yet.

        Args:
            step: Steps done.
            metrics: Metrics of the step.
        """
        self._pending.append((step, metrics))
        while len(self._pending) > _STEPS_AHEAD:
            self._report_step(*self._pending.popleft())

    def flush(self) -> None:
        """Waits for all steps, reports them, and syncs the log to disk."""
        while self._pending:
            self._report_step(*self._pending.popleft())
        if self._log is not None:
            self._log.sync()

    def log_validation(self, result: Mapping[str, Any]) -> None:
        """Writes and prints a validation after the last step.

        Args:
            result: The record that `ValidationData.measure` returned.
        """
        if self._log is None:
            return
        step, tokens = self._step, self._data.tokens(self._step)
        record = {"kind": "validation", "step": step, "tokens": tokens, **result}
        self._log.write_record(record)
        bits = result.get("bits_per_byte")
        self.print_line(
            f"step {step}: validation loss {result['loss']:.4f}, perplexity "
            f"{result['perplexity']:.2f}"
            + ("" if bits is None else f", bits per byte {bits:.4f}")
        )

    def log_sample(self, tag: str, text: str, show: bool = False) -> None:
        """Writes a text that the model generated after the last step.

        Args:
            tag: Name of the prompt, a single line.
            text: The generated text.
            show: Whether to print it too.
        """
        if self._log is not None:
            self._log.write_sample(tag, self._step, text)
        if show:
            self.print_line(f"--- {tag}\n{text}")

    def print_line(self, line: str) -> None:
        """Prints a line above the progress bar, on process 0."""
        if self._bar is not None:
            # Generated text may hold characters that the terminal cannot encode.
            encoding = sys.stderr.encoding or "utf-8"
            line = line.encode(encoding, "backslashreplace").decode(encoding)
            self._bar.write(line, file=sys.stderr)

    def _report_step(self, step, metrics):
        with self.clock.measure("compute"):
            metrics = jax.device_get(metrics)
        metrics = {
            name: None if value is None else value.item()
            for name, value in metrics._asdict().items()
        }
        applied = metrics.pop("applied")
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._step = step
        if self._log is not None:
            self._write(metrics, applied, seconds)
        if metrics["targets"]:
            self._skipped.record(step, applied, metrics["loss"], metrics["grad_norm"])

    def _write(self, metrics, applied, seconds):
        total = self._data.tokens(self._step)
        tokens = total - self._data.tokens(self._step - 1)
        record = {
            "step": self._step,
            **metrics,
            "tokens": total,
            **throughput.speed_metrics(
                tokens,
                seconds,
                chips=jax.device_count(),
                flops_per_token=self._flops,
                peak=self._peak,
            ),
            **self.clock.step(applied),
            "skipped": not applied,
            "batch": self._batch_id(),
        }
        self._log.write_record(record)
        if not applied:
            keys = ("step", "loss", "grad_norm", "batch")
            sequences = self._data.sequences_read(self._step - 1)
            self._log.write_skipped_step(
                {**{key: record[key] for key in keys}, "sequences": sequences}
            )
            why = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
            if not record["targets"]:
                why = "it has no target tokens"
            self.print_line(
                f"Skipped step {self._step}: {why}. Its sequences are listed in "
                "skipped.jsonl."
            )
        shown = {
            "loss": f"{record['loss']:.4f}",
            "rate": f"{record['learning_rate']:.1e}",
            "tokens/s": f"{record['tokens_per_second']:,.0f}",
        }
        if "mfu" in record:
            shown["MFU"] = f"{record['mfu']:.1%}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def _batch_id(self):
        """Identifies the sequences of the last step by 16 hexadecimal digits."""
        sequences = json.dumps(self._data.sequences_read(self._step - 1))
        return hashlib.sha256(sequences.encode()).hexdigest()[:16]
