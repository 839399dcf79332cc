"""Reports the steps of a run while they are computed: log, bar, skipped steps."""

import collections
import hashlib
import json
import sys
import time

import jax
from tqdm import tqdm

from keras_openllama.runs import throughput
from keras_openllama.runs.interruption import Skipped
from keras_openllama.runs.metrics_log import RunLog

# Ours: steps that are under way while the one before them is looked at.
_STEPS_AHEAD = 1
_TERMINAL_SECONDS, _FILE_SECONDS = 0.5, 30.0  # Ours: between two looks of the bar.


class StepReporter:
    """Looks at each step once it has been computed, while the next one is under way.

    Use as a context manager around the steps. The first process writes and shows, the
    others count skipped steps only.

    Args:
        lm: `OpenLlamaCausalLM`.
        config: `TrainConfig`.
        data: `trainer.TrainData`.
        output: string, the run's directory.
        from_step: int, the step that the run continues from.
        began: float, see `throughput.Clock`.

    Attributes:
        clock: `throughput.Clock`.

    Raises:
        interruption.Diverged: when too many steps in a row had to be skipped.
        OSError: if the log cannot be written.
    """

    def __init__(self, lm, config, data, output, from_step, began=None):
        self._config, self._data = config, data
        self._output, self._step = output, from_step
        self._pending = collections.deque()
        self._skipped = Skipped(config.max_skipped_steps)
        sizes = lm.backbone
        self._flops = throughput.flops_per_token(
            lm.count_params(),
            *(sizes.num_layers, sizes.num_query_heads, sizes.head_dim),
            config.sequence_length,
        )
        self._peak = throughput.peak_flops(jax.devices()[0].device_kind)
        self.clock = throughput.Clock(began)
        self._log = self._bar = None

    def __enter__(self):
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

    def __exit__(self, *_):
        if self._log is not None:
            self._bar.close()
            self._log.close()

    def add(self, step, metrics):
        """Takes what a step tells, which is still being computed.

        Args:
            step: int, steps done.
            metrics: `step_metrics.StepMetrics`.
        """
        self._pending.append((step, metrics))
        while len(self._pending) > _STEPS_AHEAD:
            self._look_at(*self._pending.popleft())

    def settle(self):
        """Waits for all steps that are under way; the log is on the disk afterwards."""
        while self._pending:
            self._look_at(*self._pending.popleft())
        if self._log is not None:
            self._log.sync()

    def validation(self, result):
        """Writes what `ValidationData.measure` found after the last step."""
        if self._log is None:
            return
        step, tokens = self._step, self._data.tokens(self._step)
        record = {"kind": "validation", "step": step, "tokens": tokens, **result}
        if step != self._log.last_validation_step:
            self._log.write(record)
        bits = result.get("bits_per_byte")
        self.say(
            f"step {step}: validation loss {result['loss']:.4f}, perplexity "
            f"{result['perplexity']:.2f}"
            + ("" if bits is None else f", bits per byte {bits:.4f}")
        )

    def text(self, tag, text, show=False):
        """Writes a text that the model wrote after the last step; prints it, too."""
        if self._log is not None:
            self._log.text(tag, self._step, text)
        if show:
            self.say(f"--- {tag}\n{text}")

    def say(self, line):
        """Prints a line above the bar."""
        if self._bar is not None:
            # A text of the model may have what the terminal cannot show.
            encoding = sys.stderr.encoding or "utf-8"
            line = line.encode(encoding, "backslashreplace").decode(encoding)
            self._bar.write(line, file=sys.stderr)

    def _look_at(self, step, metrics):
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
        self._skipped.note(step, applied, metrics["loss"], metrics["grad_norm"])

    def _write(self, metrics, applied, seconds):
        total = self._data.tokens(self._step)
        tokens = total - self._data.tokens(self._step - 1)
        record = {
            "step": self._step,
            **metrics,
            "tokens": total,
            **throughput.rates(
                *(tokens, seconds, jax.device_count(), self._flops, self._peak)
            ),
            **self.clock.step(applied),
            "skipped": not applied,
            "batch": self._batch_id(),
        }
        self._log.write(record)
        if not applied:
            keys = ("step", "loss", "grad_norm", "batch")
            rows = self._data.sequences_read(self._step - 1)
            self._log.skip({**{key: record[key] for key in keys}, "rows": rows})
            self.say(
                f"step {self._step} was skipped: loss {record['loss']}, gradient norm "
                f"{record['grad_norm']}. What it read is in skipped.jsonl."
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
        """Which tokens the last step has read, in 16 digits."""
        rows = json.dumps(self._data.sequences_read(self._step - 1)).encode()
        return hashlib.sha256(rows).hexdigest()[:16]
