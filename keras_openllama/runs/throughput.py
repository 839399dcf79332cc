"""Throughput of a run: tokens per second, model FLOPs utilization, goodput."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

# Dense bfloat16 FLOP/s of one device, by JAX's `device_kind`. TPU kinds are named as
# in jax/_src/pallas/mosaic/tpu_info.py, GPU kinds as in CUDA. Since H100, NVIDIA states
# the peak with 2:4 sparsity: half of it is dense.
PEAK_FLOPS = {
    # https://cloud.google.com/tpu/docs/v4: "275 teraflops (bf16 or int8)".
    "TPU v4": 275e12,
    # https://cloud.google.com/tpu/docs/v5e: "Peak compute per chip (bf16) 197 TFLOPs".
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    # https://cloud.google.com/tpu/docs/v5p: "Peak compute per chip (bf16) 459 TFLOPs".
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    # https://cloud.google.com/tpu/docs/v6e: "Peak compute per chip (bf16) 918 TFLOPs".
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # https://www.nvidia.com/en-us/data-center/a100/: "BFLOAT16 Tensor Core 312 TFLOPS".
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    # H100 datasheet, https://www.nvidia.com/en-us/data-center/h100/: 1,979 TFLOPS with
    # sparsity (SXM), 1,671 (NVL); its edition of 2022: 1,513 (PCIe).
    "NVIDIA H100 80GB HBM3": 1979e12 / 2,
    "NVIDIA H100 NVL": 1671e12 / 2,
    "NVIDIA H100 PCIe": 1513e12 / 2,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak dense bfloat16 FLOP/s of a device.

    Args:
        device_kind: `jax.devices()[0].device_kind`.

    Returns:
        FLOP/s, or `None` if no published figure is known, as for CPUs; a run then
        reports no MFU.

    Example:
        >>> peak_flops("TPU v4")
        275000000000000.0
    """
    return PEAK_FLOPS.get(device_kind)


def flops_per_token(
    parameters: int,
    num_layers: int,
    num_query_heads: int,
    head_dim: int,
    sequence_length: int,
) -> int:
    """Returns the model FLOPs of training on one token, forward and backward.

    They are 6 per parameter, plus 12 x layers x heads x head_dim x sequence_length for
    attention, which counts the full square of the causal mask. Rematerialization does
    not count. All parameters count, including the embedding: this convention yields
    the 34.9 % that OpenLLaMA published for its speed.

    Args:
        parameters: Parameters of the whole model.
        num_layers: Decoder layers.
        num_query_heads: Query heads per layer.
        head_dim: Size of a head.
        sequence_length: Tokens per sequence.

    Returns:
        FLOPs per token.

    Source:
        Chowdhery et al., PaLM, appendix B (arXiv:2204.02311).

    Example:
        >>> flops_per_token(6_738_415_616, 32, 32, 128, 2048)
        43651719168
    """
    attention = 12 * num_layers * num_query_heads * head_dim * sequence_length
    return 6 * parameters + attention


def speed_metrics(
    tokens: int,
    seconds: float,
    chips: int,
    flops_per_token: int | None = None,
    peak: float | None = None,
) -> dict[str, float]:
    """Returns the throughput of some steps, as in a training record.

    Args:
        tokens: Tokens trained on by all devices.
        seconds: Wall time of the steps.
        chips: Devices of the run, on all hosts.
        flops_per_token: Model FLOPs per token, see `flops_per_token`.
        peak: Peak FLOP/s of one device, see `peak_flops`.

    Returns:
        `tokens_per_second`, `tokens_per_second_per_chip` and, if the last two arguments
        are given, `mfu`: the model FLOPs utilization, 0 to 1.

    Raises:
        ValueError: if `seconds` or `chips` is not positive.

    Example:
        >>> peak = peak_flops("TPU v4")
        >>> speed = speed_metrics(2200 * 256, 1.0, 256, 43_651_719_168, peak)
        >>> round(speed["mfu"], 3)
        0.349
    """
    for name, value in (("seconds", seconds), ("chips", chips)):
        if value <= 0:
            raise ValueError(f"`{name}` must be positive. Received: {name}={value!r}")
    per_chip = tokens / seconds / chips
    result = {
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_chip": per_chip,
    }
    if flops_per_token is not None and peak is not None:
        result["mfu"] = per_chip * flops_per_token / peak
    return result


class Clock:
    """Splits the wall time of a run into data, compute, checkpoint and other time.

    Goodput is the share of the time since the process started that was spent computing
    steps whose update was applied. Imports, compilation, waiting for data, checkpoints,
    validation and skipped steps lower it.

    Compile before the first measured step, and wait for the result of the step inside
    `measure("compute")`, because JAX dispatches asynchronously.

    Args:
        start_time: When the process started, in seconds of `now`; by default, the
            current time. Take it before the imports.
        now: Function that returns the time in seconds.

    Example:
        >>> clock = Clock()
        >>> with clock.measure("data"):
        ...     batch = [1, 2, 3]
        >>> with clock.measure("compute"):
        ...     loss = sum(batch)
        >>> list(clock.step(applied=True))
        ['data_seconds', 'compute_seconds', 'checkpoint_seconds', 'goodput']
    """

    PARTS = ("data", "compute", "checkpoint")

    def __init__(
        self,
        start_time: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._now = now
        self._start_time = now() if start_time is None else start_time
        self._totals = dict.fromkeys(self.PARTS, 0.0)
        self._since = dict(self._totals)
        self._applied = 0.0
        self._part = None

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds the time of a block to a part.

        Args:
            part: `"data"`, `"compute"` or `"checkpoint"`.

        Raises:
            ValueError: if there is no such part.
            RuntimeError: if a part is already being measured.
        """
        if part not in self.PARTS:
            raise ValueError(
                f"`part` must be one of {', '.join(self.PARTS)}. Received: "
                f"part={part!r}"
            )
        if self._part:
            raise RuntimeError(
                f"{part!r} cannot be measured inside {self._part!r}, because its time "
                "would count twice. End that block first."
            )
        self._part, start = part, self._now()
        try:
            yield
        finally:
            spent = self._now() - start
            self._part = None
            self._totals[part] += spent
            self._since[part] += spent

    def step(self, applied: bool = True) -> dict[str, float]:
        """Ends a step.

        Args:
            applied: Whether the update was applied.

        Returns:
            `data_seconds`, `compute_seconds` and `checkpoint_seconds` since the last
            call, and `goodput` of the process so far, 0 to 1.
        """
        since, self._since = self._since, dict.fromkeys(self.PARTS, 0.0)
        if applied:
            self._applied += since["compute"]
        seconds = {f"{part}_seconds": spent for part, spent in since.items()}
        return {**seconds, "goodput": self.goodput()}

    def goodput(self) -> float:
        """Returns the goodput since the process started, 0 to 1."""
        passed = self._now() - self._start_time
        return self._applied / passed if passed > 0 else 0.0

    def totals(self) -> dict[str, float]:
        """Returns the seconds since the process started by part, and `other`."""
        passed = self._now() - self._start_time
        return {**self._totals, "other": passed - sum(self._totals.values())}
