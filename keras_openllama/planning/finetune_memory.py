"""What memory fine-tuning takes, before anything is loaded.

Counted are tensors, by the code that makes them, and on CPUs what XLA and the process
add. All are taken to be there at once. `benchmarks/finetune.py memory` prints the
estimate beside what was measured on a CPU: with JAX and float32, 58 million parameters,
it was 7 % below to 16 % above, and up to 25 % above where rows were few. On
accelerators nothing was measured.
"""

import dataclasses

from keras_openllama.config import LOGITS_PER_CHUNK, validate_architecture
from keras_openllama.utils.host_memory import free_memory

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "mixed_bfloat16": 4}
# Ours: of what layers in bfloat16 keep, a part is float32 (norms, rotation, and on CPUs
# what XLA computes in it). A number is so many bytes of memory that was measured.
_KEPT_BYTES = {"float32": 4, "bfloat16": 3.2, "mixed_bfloat16": 3.2}
# Ours: float32 tensors of the logits' size that are there together.
_LOGITS_TOGETHER = {"jax": 2, "tensorflow": 1, "torch": 4}
# Ours: what imports, compilers, their programs and what allocators leave unused take on
# a CPU, beside the imports themselves: bytes, and bytes for a layer.
_PROCESS = {
    "jax": (400 << 20, 10 << 20),
    "tensorflow": (50 << 20, 1 << 20),
    "torch": (50 << 20, 1 << 20),
}
# Ours: what is held back for what is not counted.
RESERVED_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory of fine-tuning, of each device.

    Attributes:
        parts: dict of bytes by what they are for.
    """

    parts: dict

    @property
    def total(self):
        """Bytes of all parts."""
        return sum(self.parts.values())

    def table(self):
        """The parts in GiB, a line each."""
        lines = [*self.parts.items(), ("together", self.total)]
        return "\n".join(f"{name:<28}{size / GIB:>9.2f} GiB" for name, size in lines)


def estimate(
    config,
    dtype,
    lora_rank=None,
    targets=("query", "value"),
    batch_size=8,
    sequence_length=512,
    micro_batches=1,
    rematerialize="none",
    int8=False,
    devices=1,
    backend="jax",
    device="cpu",
):
    """Memory that each device needs to fine-tune a model.

    Args:
        config: dict, arguments of `OpenLlamaBackbone`.
        dtype: `"float32"`, `"bfloat16"` or `"mixed_bfloat16"`.
        lora_rank: int, rank of adapters; `None` trains all weights.
        targets: names of the projections that have adapters.
        batch_size, sequence_length, micro_batches: ints.
        rematerialize: one of `config.REMATERIALIZATION`.
        int8: bool, whether the backbone's matrices are quantized.
        devices: int, devices over which weights and rows are divided alike.
        backend: `"jax"`, `"tensorflow"` or `"torch"`; the latter keep all logits.
        device: `"cpu"`, or anything else for an accelerator. On a CPU the process
            counts, too; and XLA copies AdamW's moments before it renews them, and
            computes products of bfloat16 and int8 from float32 copies of the layers'
            matrices, of all layers at once.

    Returns:
        `Estimate`.

    Example:

    ```python
    config = presets.find("7b_v2").config
    print(estimate(config, "bfloat16", lora_rank=16).table())
    ```
    """
    sizes = _Sizes(config)
    adapters = sizes.adapters(lora_rank, targets) if lora_rank else 0
    # Adapters are on every device where the mesh's layout does not name them.
    trained = adapters if lora_rank else sizes.parameters() / devices
    trained *= 4 if lora_rank else _BYTES[dtype]
    tokens = batch_size * sequence_length / micro_batches / devices
    adapted, on_cpu = targets if lora_rank else None, device == "cpu"
    if backend == "jax":
        kept = sizes.kept(rematerialize, adapted, int8, on_cpu)
    else:
        kept = sizes.kept_by_operations(adapted, sequence_length, backend)
    parts = {
        "weights": sizes.weight_bytes(dtype, int8) / devices,
        "adapters": 4 * adapters,
        "gradients": trained,
        "moments of AdamW": 2 * trained,
        "activations": tokens * sizes.layers * kept * _KEPT_BYTES[dtype],
        "a layer at work": 4 * tokens * sizes.at_work(sequence_length, backend),
        "logits": _logits(sizes, tokens, backend),
    }
    if dtype == "mixed_bfloat16":  # Cast where they are used.
        parts["weights in bfloat16"] = 2 * sizes.parameters() / devices
    if on_cpu and backend == "jax":
        if dtype == "bfloat16" or int8:
            parts["matrices in float32"] = 4 * sizes.matrices() / devices
        if lora_rank is None:
            parts["moments before the step"] = 2 * trained
    elif lora_rank is None and micro_batches > 1:
        parts["sum of gradients"] = trained
    if on_cpu:
        process, layer = _PROCESS[backend]
        parts["the process"] = process + layer * sizes.layers
    return Estimate({name: int(size) for name, size in parts.items() if size})


def _logits(sizes, tokens, backend):
    count = tokens * sizes.vocabulary
    if backend == "jax":
        count = min(count, LOGITS_PER_CHUNK)
    return 4 * _LOGITS_TOGETHER[backend] * count


class _Sizes:
    """Sizes of a network, and what its layers keep for each token."""

    def __init__(self, config):
        config = validate_architecture(config)
        heads, head_dim = config["num_query_heads"], config["head_dim"]
        self.layers, self.hidden = config["num_layers"], config["hidden_dim"]
        self.heads, self.wide = heads, config["intermediate_dim"]
        self.query = heads * head_dim
        self.key = config["num_key_value_heads"] * head_dim
        self.vocabulary = config["vocabulary_size"]

    def projections(self):
        """`(outputs, inputs)` of the projections of a layer, by name."""
        query, key, hidden, wide = self.query, self.key, self.hidden, self.wide
        return {
            "query": (query, hidden),
            "key": (key, hidden),
            "value": (key, hidden),
            "output": (hidden, query),
            "gate": (wide, hidden),
            "up": (wide, hidden),
            "down": (hidden, wide),
        }

    def matrices(self):
        """Parameters of all projections."""
        return self.layers * sum(o * i for o, i in self.projections().values())

    def parameters(self):
        """All of them: projections, norms, embeddings and the head."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.matrices() + norms + 2 * self.vocabulary * self.hidden

    def weight_bytes(self, dtype, int8):
        """Bytes; int8 are projections and embeddings, as `backbone.quantize` has it."""
        rounded = self.matrices() + self.vocabulary * self.hidden if int8 else 0
        return rounded + _BYTES[dtype] * (self.parameters() - rounded)

    def adapters(self, rank, targets):
        """Parameters of adapters."""
        return self.layers * rank * sum(sum(self.projections()[t]) for t in targets)

    def kept(self, policy, adapted, int8, on_cpu):
        """Numbers that a layer keeps for each token until the backward pass, on JAX.

        Args:
            adapted: names of the projections that have adapters; `None` trains all.
            policy, int8: as in `estimate`.
            on_cpu: bool. XLA computes a part of what is computed again too early there.

        Ours: by `jax.ad_checkpoint.print_saved_residuals`, and by the buffers of XLA.
        """
        hidden, wide, heads = self.hidden, self.wide, self.query + 2 * self.key
        everything = adapted is None
        # What goes into a matrix that is trained is kept for its gradient.
        trained = {*self.projections()} if everything else {*adapted}
        heads += self.query if "output" in trained else 0
        if policy == "full":
            return hidden * (3 if on_cpu else 1)
        if policy != "none":
            states = hidden * (6 if on_cpu else 2)
            return states + heads + (2 * wide if policy == "products" else 0)
        kept = 6 * hidden + heads + 5 * wide
        kept += 4 * hidden if everything else 0  # For the norms' scales.
        kept += hidden if trained & {"gate", "up"} else 0
        kept += wide if "down" in trained else 0
        # Each matrix has its inputs rounded, a byte each.
        return kept + (1.5 * hidden + wide / 4 if int8 else 0)

    def kept_by_operations(self, adapted, length, backend):
        """The same on TensorFlow and PyTorch, where each operation keeps its own.

        Ours: by the memory of processes. Weights of attention are among it, of which
        PyTorch's fused kernel keeps a number a row.
        """
        return (
            19 * self.hidden
            + (4 if adapted is None else 3) * self.wide
            + self.heads * (1 if backend == "torch" else length)
        )

    def at_work(self, length, backend):
        """Float32 numbers for a token of the layer that is computed just then."""
        # JAX leaves out most of what causality hides, and PyTorch makes no scores.
        share = {"jax": 0.625, "tensorflow": 1, "torch": 0}[backend]
        return 4 * self.wide + 3 * self.heads * length * share


# ----- What there is


def available_memory():
    """Bytes that a device has, or that a CPU can still have; `None` if unknown."""
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


def check(estimate, available):
    """Raises a `ValueError` if training cannot fit.

    Args:
        estimate: `Estimate`.
        available: int, bytes; `None` is not known, and passes.
    """
    if available is None or estimate.total <= available * (1 - RESERVED_SHARE):
        return
    raise ValueError(
        f"Training takes about {estimate.total / GIB:.1f} GiB, and "
        f"{available / GIB:.1f} GiB are there, of which {RESERVED_SHARE:.0%} are held "
        f"back:\n{estimate.table()}\n"
        "In this order: train adapters (--lora-rank 16), keep less (on JAX: "
        "--micro-batches, --rematerialize full), shorter rows (--length), --dtype "
        "bfloat16 and --int8 with adapters, a smaller preset."
    )


_WAYS = {
    "adapters, int8": dict(dtype="bfloat16", lora_rank=16, int8=True),
    "adapters, bfloat16": dict(dtype="bfloat16", lora_rank=16),
    "adapters, float32": dict(dtype="float32", lora_rank=16),
    "all, mixed_bfloat16": dict(dtype="mixed_bfloat16"),
    "all, float32": dict(dtype="float32"),
}


def table_of_presets(batch_size, sequence_length, rematerialize="none", device="cpu"):
    """What each preset takes, in each way, on one device: a table as text.

    Args:
        batch_size, sequence_length: ints.
        rematerialize: one of `config.REMATERIALIZATION`.
        device: see `estimate`.
    """
    from keras_openllama import presets

    lines = [
        f"GiB to fine-tune, {batch_size} rows of {sequence_length} tokens, adapters of "
        f"rank 16 on queries and values, rematerialize={rematerialize}, on "
        f"{'a CPU' if device == 'cpu' else 'an accelerator'}",
        f"{'':20}" + "".join(f"{name:>21}" for name in _WAYS),
    ]
    for name, preset in presets.registry().items():
        found = (
            estimate(
                preset.config,
                batch_size=batch_size,
                sequence_length=sequence_length,
                rematerialize=rematerialize,
                device=device,
                **way,
            ).total
            for way in _WAYS.values()
        )
        lines.append(f"{name:20}" + "".join(f"{size / GIB:>21.1f}" for size in found))
    return "\n".join(lines)
