"""What memory fine-tuning takes, before anything is loaded.

Counted are tensors, by the code that makes them; programs, the interpreter and what an
allocator leaves unused are not. `benchmarks/finetune.py memory` prints the estimate
beside what was measured on a CPU; on accelerators nothing was measured.
"""

import dataclasses

from keras_openllama.free_memory import free_memory

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "mixed_bfloat16": 4}
_COMPUTED_BYTES = {"float32": 4, "bfloat16": 2, "mixed_bfloat16": 2}
# Ours: rows of scores that attention on a CPU computes at once, and logits that the
# loss does (`layers.attention`, `losses`). Three of the latter are there together: the
# logits, their exponentials, and their gradient.
_LOGITS_AT_ONCE, _LOGITS_TOGETHER = 16 << 20, 3
# Limit and use of a container, in the two versions of Linux's control groups.
_CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
# Measured with JAX on a CPU, 58 million parameters, by how `memory_analysis` of the
# compiled step grows with layers: XLA holds 2.1 to 2.35 times as many numbers as a
# backward pass needs, and computes most of what is to be computed again so early that
# rematerialisation saves next to nothing.
_HELD_ON_CPU = 2.25
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
        rematerialize: one of `rematerialization.POLICIES`.
        int8: bool, whether the backbone's matrices are quantized.
        devices: int, devices over which weights and rows are divided alike.
        backend: `"jax"`, `"tensorflow"` or `"torch"`; the latter keep all logits, and
            all weights of attention.
        device: `"cpu"`, or anything else for an accelerator.

    Returns:
        `Estimate`.

    Example:

    ```python
    config = presets.find("7b_v2").config
    print(estimate(config, "bfloat16", lora_rank=16).table())
    ```
    """
    sizes = _Sizes(config)
    matrices, rest = sizes.matrices(), sizes.others()
    weight_bytes = matrices * (1 if int8 else _BYTES[dtype]) + rest * _BYTES[dtype]
    adapters = sizes.adapters(lora_rank, targets) if lora_rank else 0
    trained = adapters if lora_rank else matrices + rest
    trained_bytes = 4 if lora_rank else _BYTES[dtype]
    on_cpu = device == "cpu"
    tokens = batch_size * sequence_length / micro_batches / devices
    parts = {
        "weights": weight_bytes / devices,
        # Both are on every device where the mesh's layout does not name them.
        "adapters": 4 * adapters,
        "gradients": trained * trained_bytes / (1 if lora_rank else devices),
        "moments of AdamW": 2 * trained * trained_bytes / (1 if lora_rank else devices),
        "activations": tokens
        * sizes.kept("none" if on_cpu else rematerialize, dtype)
        * (_HELD_ON_CPU if on_cpu and backend == "jax" else 1),
        "a layer at work": tokens * sizes.at_work(dtype, sequence_length, backend),
        "logits": _logits(sizes, tokens, backend),
    }
    if backend != "jax":
        scores = 2 * sizes.heads * sequence_length * sizes.layers
        parts["weights of attention"] = 4 * tokens * scores
    if dtype == "mixed_bfloat16":  # Cast where they are used.
        parts["weights in bfloat16"] = 2 * (matrices + rest) / devices
    if lora_rank is None and micro_batches > 1:
        parts["sum of gradients"] = parts["gradients"]
    return Estimate({name: int(size) for name, size in parts.items() if size})


def _logits(sizes, tokens, backend):
    count = tokens * sizes.vocabulary
    if backend == "jax":
        count = min(count, _LOGITS_AT_ONCE)
    return 4 * _LOGITS_TOGETHER * count


class _Sizes:
    """Sizes of a network, and what its layers keep for each token."""

    def __init__(self, config):
        heads = config["num_query_heads"]
        head_dim = config.get("head_dim") or config["hidden_dim"] // heads
        self.layers, self.hidden = config["num_layers"], config["hidden_dim"]
        self.heads, self.wide = heads, config["intermediate_dim"]
        self.query = heads * head_dim
        self.key = (config.get("num_key_value_heads") or heads) * head_dim
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
        """Parameters that `backbone.quantize` rounds: projections and embeddings."""
        layer = sum(o * i for o, i in self.projections().values())
        return self.layers * layer + self.vocabulary * self.hidden

    def others(self):
        """Parameters of the head and of the norms."""
        return (self.vocabulary + 2 * self.layers + 1) * self.hidden

    def adapters(self, rank, targets):
        """Parameters of adapters."""
        return self.layers * rank * sum(sum(self.projections()[t]) for t in targets)

    def kept(self, policy, dtype):
        """Bytes that all layers keep for a token until the backward pass."""
        attention = 2 * self.query + 2 * self.key
        products = self.hidden + attention + 2 * self.wide
        kept = {
            "full": 0,
            "projections": self.hidden + attention,
            "products": products,
            # And two norms' outputs, what is rotated, and what goes down.
            "none": products + 2 * self.hidden + self.query + self.key + self.wide,
        }
        return self.layers * (self.hidden + kept[policy]) * _COMPUTED_BYTES[dtype]

    def at_work(self, dtype, length, backend):
        """Bytes for a token of the layer that is computed: its tensors and gradients.

        Scores of attention are float32; JAX computes some rows of them at a time.
        """
        scores = self.heads * length * (0.25 if backend == "jax" else 1)
        tensors = 4 * self.hidden + 3 * self.query + 3 * self.key + 4 * self.wide
        return 2 * (tensors * _COMPUTED_BYTES[dtype] + 4 * scores)


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
        "--micro-batches, and but for CPUs --rematerialize full), shorter rows "
        "(--length), --dtype bfloat16 and --int8 with adapters, a smaller preset."
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
        rematerialize: one of `rematerialization.POLICIES`.
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
