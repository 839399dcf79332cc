"""Estimates the memory of fine-tuning before a model is loaded.

The estimate counts tensors and, on CPUs, what XLA and the process add. It assumes that
all are allocated at the same time. `benchmarks/finetune.py memory` compares it with
measurements on a CPU, in float32: with JAX and 58 million parameters it was 4 % too low
to 14 % too high, and up to 22 % too high for small batches; with PyTorch and 58 or 116
million 2 to 15 % too high. There are no measurements on accelerators.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints.weight_names import axis_sizes, weight_specs
from keras_openllama.checkpoints.weight_sizes import quantized_bytes
from keras_openllama.config import LOGITS_PER_CHUNK, validate_architecture
from keras_openllama.utils.host_memory import free_memory

if TYPE_CHECKING:
    from keras_openllama.quantization.policies import MatrixFormat

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "mixed_bfloat16": 4}
# Measured bytes per saved activation. In bfloat16 layers a part of them is float32
# (norms, RoPE, and on CPUs what XLA computes in float32).
_ACTIVATION_BYTES = {"float32": 4, "bfloat16": 3.2, "mixed_bfloat16": 3.2}
# Heuristic: float32 tensors that exist at the same time, of the size of the logits of a
# chunk of the loss, or on TensorFlow of all logits.
_LOGITS_COPIES = {"jax": 2, "tensorflow": 1, "torch": 4}
# Heuristic, for CPUs: memory of compilers, compiled programs and unused memory of
# allocators, without imports, in bytes and in bytes per layer.
_PROCESS_BYTES = {
    "jax": (400 << 20, 10 << 20),
    "tensorflow": (50 << 20, 1 << 20),
    "torch": (120 << 20, 1 << 20),
}
# Heuristic: the fraction of memory that is reserved for what the estimate omits.
RESERVED_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Memory of fine-tuning, per device.

    Attributes:
        parts: bytes by purpose, such as `"weights"` or `"gradients"`.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def table(self) -> str:
        """Formats the parts and their total in GiB, one per line."""
        lines = [*self.parts.items(), ("total", self.total)]
        return "\n".join(f"{name:<28}{size / GIB:>9.2f} GiB" for name, size in lines)


def estimate_memory(
    config: Mapping[str, Any],
    dtype: str,
    lora_rank: int | None = None,
    targets: Sequence[str] = ("query", "value"),
    batch_size: int = 8,
    sequence_length: int = 512,
    micro_batches: int = 1,
    rematerialize: str = "none",
    formats: Mapping[str, MatrixFormat] = MappingProxyType({}),
    devices: int = 1,
    backend: str = "jax",
    device: str = "cpu",
) -> MemoryEstimate:
    """Estimates the memory that each device needs to fine-tune a model.

    Args:
        config: arguments of `OpenLlamaBackbone`.
        dtype: `"float32"`, `"bfloat16"` or `"mixed_bfloat16"`.
        lora_rank: rank of the adapters. `None` trains all weights.
        targets: names of the projections with adapters.
        batch_size: sequences of a step.
        sequence_length: tokens of a sequence.
        micro_batches: number of micro-batches of a step.
        rematerialize: a policy of `config.REMATERIALIZATION`.
        formats: how each layer that is quantized is, by path, see
            `runs.finetuning.quantized_formats`.
        devices: number of devices over which weights and sequences are sharded.
        backend: `"jax"`, `"tensorflow"` or `"torch"`. TensorFlow does not compute the
            logits in chunks.
        device: `"cpu"`, or any other string for an accelerator. A CPU also needs memory
            for the process. XLA on a CPU multiplies bfloat16 matrices by way of float32
            copies, of all layers at once. Quantized matrices are dequantized one at a
            time.

    Returns:
        The estimate.

    Example:
        >>> from keras_openllama import presets
        >>> config = presets.find("7b_v2").config
        >>> estimate_memory(config, "bfloat16", lora_rank=16).parts["weights"]
        13476831232
    """
    sizes = _Sizes(config)
    adapters = sizes.adapters(lora_rank, targets) if lora_rank else 0
    # Adapters are replicated, since the layout map does not name them.
    trained = adapters if lora_rank else sizes.parameters() / devices
    trained *= 4 if lora_rank else _BYTES[dtype]
    tokens = batch_size * sequence_length / micro_batches / devices
    adapted, on_cpu = targets if lora_rank else None, device == "cpu"
    if backend == "jax":
        saved = sizes.saved_activations(rematerialize, adapted, on_cpu)
    else:
        saved = sizes.saved_by_operations(adapted, sequence_length, backend)
    parts = {
        "weights": sizes.weight_bytes(dtype, formats) / devices,
        "adapters": 4 * adapters,
        "gradients": trained,
        "AdamW moments": 2 * trained,
        "activations": tokens * sizes.layers * saved * _ACTIVATION_BYTES[dtype],
        "current layer": 4
        * tokens
        * sizes.current_layer(sequence_length, backend, on_cpu),
        "logits": _logits(sizes, tokens, backend),
    }
    if formats and backend != "jax":  # XLA scales the values while it casts them.
        parts["dequantized matrix"] = 2 * sizes.largest_quantized(dtype, formats)
    if dtype == "mixed_bfloat16":  # Weights are cast when they are used.
        parts["bfloat16 copies of weights"] = 2 * sizes.parameters() / devices
    if on_cpu and backend == "jax" and dtype == "bfloat16" and not formats:
        parts["float32 copies of matrices"] = 4 * sizes.matrices() / devices
    if lora_rank is None and micro_batches > 1:
        parts["accumulated gradients"] = trained
    if backend == "torch" and lora_rank is None:
        # Heuristic: of embedding and head, the largest, while they are computed.
        copies = 2 * 4 * sizes.vocabulary * sizes.hidden / devices
        parts["copies of gradients"] = copies
    if on_cpu:
        process, per_layer = _PROCESS_BYTES[backend]
        parts["process"] = process + per_layer * sizes.layers
    return MemoryEstimate({name: int(size) for name, size in parts.items() if size})


def _logits(sizes, tokens, backend):
    count = tokens * sizes.vocabulary
    if backend != "tensorflow":
        count = min(count, LOGITS_PER_CHUNK)
    return 4 * _LOGITS_COPIES[backend] * count


class _Sizes:
    """Sizes of a network, and the activations that its layers save per token."""

    def __init__(self, config):
        config = validate_architecture(config)
        heads, head_dim = config["num_query_heads"], config["head_dim"]
        self.layers, self.hidden = config["num_layers"], config["hidden_dim"]
        self.heads, self.intermediate = heads, config["intermediate_dim"]
        self.query = heads * head_dim
        self.key = config["num_key_value_heads"] * head_dim
        self.vocabulary = config["vocabulary_size"]
        self.axes = axis_sizes(config)

    def projections(self):
        """`(outputs, inputs)` of each projection of a layer."""
        query, key, hidden = self.query, self.key, self.hidden
        intermediate = self.intermediate
        return {
            "query": (query, hidden),
            "key": (key, hidden),
            "value": (key, hidden),
            "output": (hidden, query),
            "gate": (intermediate, hidden),
            "up": (intermediate, hidden),
            "down": (hidden, intermediate),
        }

    def matrices(self):
        """Number of parameters of all projections."""
        return self.layers * sum(o * i for o, i in self.projections().values())

    def parameters(self):
        """Number of parameters: projections, norms, embeddings and the head."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.matrices() + norms + 2 * self.vocabulary * self.hidden

    def weight_bytes(self, dtype, formats):
        """Bytes of the weights: of quantized ones the values, scales and zeros."""
        total = 0
        for spec in weight_specs(self.layers):
            shape = spec.shape(self.axes)
            chosen = formats.get(spec.path.rpartition("/")[0])
            if chosen is None:
                total += _BYTES[dtype] * math.prod(shape)
            else:
                group_size = chosen.group_size_of(shape[1])
                total += quantized_bytes(
                    shape, chosen.bits, group_size, chosen.symmetric
                )
        return total

    def largest_quantized(self, dtype, formats):
        """Bytes of the largest quantized matrix when it is dequantized."""
        shapes = [
            spec.shape(self.axes)
            for spec in weight_specs(self.layers)
            if spec.path.rpartition("/")[0] in formats
        ]
        return _BYTES[dtype] * max(math.prod(shape) for shape in shapes)

    def adapters(self, rank, targets):
        """Number of parameters of the adapters."""
        return self.layers * rank * sum(sum(self.projections()[t]) for t in targets)

    def saved_activations(self, policy, adapted, on_cpu):
        """Numbers that a layer saves per token for the backward pass, on JAX.

        Measured with `jax.ad_checkpoint.print_saved_residuals` and XLA's buffers.

        Args:
            policy: rematerialization policy.
            adapted: names of the projections with adapters. `None` trains all weights.
            on_cpu: whether the device is a CPU, where XLA rematerializes a part of the
                activations too early.
        """
        hidden, intermediate = self.hidden, self.intermediate
        heads = self.query + 2 * self.key
        train_all = adapted is None
        # The inputs of a trained matrix are saved for its gradient.
        trained = {*self.projections()} if train_all else {*adapted}
        heads += self.query if "output" in trained else 0
        if policy == "full":
            return hidden * (3 if on_cpu else 1)
        if policy != "none":
            states = hidden * (6 if on_cpu else 2)
            return states + heads + (2 * intermediate if policy == "products" else 0)
        saved = 6 * hidden + heads + 5 * intermediate
        saved += 4 * hidden if train_all else 0  # For the gradients of norm scales.
        saved += hidden if trained & {"gate", "up"} else 0
        if on_cpu:  # The output of attention, and a sum per query.
            saved += self.heads + (0 if "output" in trained else self.query)
        return saved + (intermediate if "down" in trained else 0)

    def saved_by_operations(self, adapted, length, backend):
        """The same on TensorFlow and PyTorch, where each operation saves its inputs.

        Measured as memory of a process. It includes the attention weights, of which the
        fused kernel of PyTorch saves one number per query.
        """
        return (
            19 * self.hidden
            + (4 if adapted is None else 3) * self.intermediate
            + self.heads * (1 if backend == "torch" else length)
        )

    def current_layer(self, length, backend, on_cpu):
        """Temporary float32 numbers per token of the layer that is being computed."""
        # JAX skips most of the masked scores, and stores none on a CPU; nor PyTorch.
        share = {"jax": 0 if on_cpu else 0.625, "tensorflow": 1, "torch": 0}[backend]
        return 4 * self.intermediate + 3 * self.heads * length * share


# ----- Available memory


def available_memory() -> int | None:
    """Returns the memory of a device, or the free memory of the host, in bytes.

    Returns:
        Bytes, or `None` if unknown.
    """
    import keras

    backend = keras.config.backend()
    if backend == "jax":
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"]
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_properties(0).total_memory
    return free_memory()


def check_fits(estimate: MemoryEstimate, available: int | None):
    """Checks that training fits into memory.

    Args:
        estimate: the estimate.
        available: available memory in bytes. `None` (unknown) always passes.

    Raises:
        ValueError: if the estimate exceeds the available memory less `RESERVED_SHARE`.
    """
    if available is None or estimate.total <= available * (1 - RESERVED_SHARE):
        return
    raise ValueError(
        f"Training needs about {estimate.total / GIB:.1f} GiB of memory. "
        f"{available / GIB:.1f} GiB are available, of which {RESERVED_SHARE:.0%} are "
        "reserved. Try in this order: adapters (--lora-rank 16), fewer saved "
        "activations (on JAX: --micro-batches, --rematerialize full), shorter "
        "sequences (--sequence-length), --dtype bfloat16 and --quantization int4 with "
        "adapters, a smaller preset."
    )


# Columns of the table: dtype, rank of the adapters, and quantization.
_SETUPS = {
    "adapters, int4": ("bfloat16", 16, "int4"),
    "adapters, int8": ("bfloat16", 16, "int8"),
    "adapters, bfloat16": ("bfloat16", 16, None),
    "adapters, float32": ("float32", 16, None),
    "full, mixed_bfloat16": ("mixed_bfloat16", None, None),
    "full, float32": ("float32", None, None),
}


def memory_table(
    batch_size: int,
    sequence_length: int,
    rematerialize: str = "none",
    device: str = "cpu",
    backend: str = "jax",
) -> str:
    """Formats the estimates for each preset on one device as a table.

    Args:
        batch_size: sequences of a step.
        sequence_length: tokens of a sequence.
        rematerialize: a policy of `config.REMATERIALIZATION`.
        device: see `estimate_memory`.
        backend: see `estimate_memory`.

    Returns:
        A line per preset, and a column for adapters and for full fine-tuning in each
        dtype.

    Example:
        >>> len(memory_table(8, 512).splitlines()) > 2
        True
    """
    from keras_openllama import presets
    from keras_openllama.loading.weight_types import WeightTypes

    lines = [
        f"GiB to fine-tune, {batch_size} sequences of {sequence_length} tokens, "
        f"adapters of rank 16 on queries and values, rematerialize={rematerialize}, on "
        f"{'a CPU' if device == 'cpu' else 'an accelerator'} with {backend}",
        f"{'':20}" + "".join(f"{name:>21}" for name in _SETUPS),
    ]
    options = dict(
        batch_size=batch_size,
        sequence_length=sequence_length,
        rematerialize=rematerialize,
        device=device,
        backend=backend,
    )
    for name, preset in presets.registry().items():
        totals = (
            estimate_memory(
                preset.config,
                dtype,
                rank,
                formats=WeightTypes(dtype, quantization).formats(preset.config),
                **options,
            ).total
            for dtype, rank, quantization in _SETUPS.values()
        )
        lines.append(f"{name:20}" + "".join(f"{size / GIB:>21.1f}" for size in totals))
    return "\n".join(lines)
