"""How fast a run trains, against what the chip could do and the time that passed."""

import contextlib
import time

# Dense bfloat16 FLOP/s of one device, by JAX's `device_kind`. TPU kinds as in
# jax/_src/pallas/mosaic/tpu_info.py, GPU kinds as CUDA names them. NVIDIA states tensor
# cores with 2:4 sparsity since H100: half of that is dense.
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


def peak_flops(device_kind):
    """Dense bfloat16 FLOP/s of a device.

    Args:
        device_kind: string, `jax.devices()[0].device_kind`.

    Returns:
        Float, or `None` where no published figure is known here (a CPU, say): a run
        then reports no MFU.

    Example:
        peak_flops("TPU v4")  # 275e12
    """
    return PEAK_FLOPS.get(device_kind)


def flops_per_token(parameters, num_layers, num_query_heads, head_dim, sequence_length):
    """FLOPs that the model itself needs to train on one token, forward and backward.

    6 for each parameter, and 12 x layers x heads x head_dim x sequence_length for
    attention, which counts the whole square of a causal mask. Rematerialisation does
    not count. Every parameter does, the embedding too: so OpenLLaMA's published speed
    comes out at 34.9 %.

    Args:
        parameters: int, of the whole model.
        num_layers, num_query_heads, head_dim: ints.
        sequence_length: int, tokens in a row.

    Returns:
        Int, FLOPs per token.

    Source:
        Chowdhery et al., PaLM, appendix B (arXiv:2204.02311).

    Example:
        flops_per_token(6_738_415_616, 32, 32, 128, 2048)  # 43_651_719_168
    """
    attention = 12 * num_layers * num_query_heads * head_dim * sequence_length
    return 6 * parameters + attention


def rates(tokens, seconds, chips, flops_per_token=None, peak=None):
    """The speed of some steps, as a training record has it.

    Args:
        tokens: int, trained on by all chips.
        seconds: float, that it took.
        chips: int, devices of the whole run, on all hosts.
        flops_per_token: int, see `flops_per_token`.
        peak: float, FLOP/s of one device, see `peak_flops`; or `None`.

    Returns:
        Dict: `tokens_per_second`, `tokens_per_second_per_chip`, and `mfu` (model FLOPs
        utilization, 0 to 1, of the bfloat16 peak whatever the run's own precision)
        if both of the last arguments are known.

    Raises:
        ValueError: if `seconds` or `chips` is not positive.

    Example:
        rates(4 * 2**20, 7.4, 256, 43_651_719_168, peak_flops("TPU v4"))
    """
    for name, value in (("seconds", seconds), ("chips", chips)):
        if value <= 0:
            raise ValueError(f"{name}={value!r}; it must be positive")
    a_chip = tokens / seconds / chips
    result = {
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_chip": a_chip,
    }
    if flops_per_token is not None and peak is not None:
        result["mfu"] = a_chip * flops_per_token / peak
    return result


class Clock:
    """Splits the time of a run into data, compute, checkpoint, and the rest.

    Goodput is the share of the time since the run's process began that went into
    computing steps whose update was applied. What lowers it: imports and compilation,
    waiting for data, checkpoints, evaluation, and steps that were skipped.

    Compile before the first measured step, and wait for the step's result inside
    `measure("compute")`: JAX gives it back before it is there.

    Args:
        began: float, seconds by `now`, when the process began; by default, now. The
            first line of a script takes it, before the imports.
        now: function that returns seconds.

    Example:
        clock = Clock(began)
        with clock.measure("data"):
            batch = next(batches)
        with clock.measure("compute"):
            loss = float(step(batch))
        log.write({"step": 1, "loss": loss, **clock.step(applied=True)})
    """

    PARTS = ("data", "compute", "checkpoint")

    def __init__(self, began=None, now=time.monotonic):
        self._now = now
        self._began = now() if began is None else began
        self._totals = dict.fromkeys(self.PARTS, 0.0)
        self._since = dict(self._totals)
        self._applied = 0.0
        self._part = None

    @contextlib.contextmanager
    def measure(self, part):
        """Counts the time of the block as a part's.

        Args:
            part: "data", "compute" or "checkpoint".

        Raises:
            ValueError: if there is no such part.
            RuntimeError: if a part is being measured already.
        """
        if part not in self.PARTS:
            raise ValueError(f"part={part!r}; it is one of {', '.join(self.PARTS)}")
        if self._part:
            raise RuntimeError(
                f"part={part!r} begins inside {self._part!r}, and its time would count "
                "twice; end that first"
            )
        self._part, start = part, self._now()
        try:
            yield
        finally:
            spent = self._now() - start
            self._part = None
            self._totals[part] += spent
            self._since[part] += spent

    def step(self, applied=True):
        """Ends a step.

        Args:
            applied: bool, whether the update was applied.

        Returns:
            Dict of floats: `data_seconds`, `compute_seconds` and `checkpoint_seconds`
            since the call before, and `goodput` of the process so far, 0 to 1.
        """
        since, self._since = self._since, dict.fromkeys(self.PARTS, 0.0)
        if applied:
            self._applied += since["compute"]
        seconds = {f"{part}_seconds": spent for part, spent in since.items()}
        return {**seconds, "goodput": self.goodput()}

    def goodput(self):
        """The share of the time since the process began that was not lost, 0 to 1."""
        passed = self._now() - self._began
        return self._applied / passed if passed > 0 else 0.0

    def totals(self):
        """Seconds since the process began: dict by part, and `other` for the rest."""
        passed = self._now() - self._began
        return {**self._totals, "other": passed - sum(self._totals.values())}
