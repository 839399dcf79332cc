"""The parts of the check, in order."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """A part, which is one process.

    Attributes:
        name: string.
        text: string, what it checks or measures.
        kind: `"check"` or `"speed"`.
        backend: `"jax"` or `"torch"`.
        module: string, a module of this folder.
        function: string, a function of it.
        arguments: dict, for the function.
        seconds: float, its time limit on a GPU.
        ours: bool, whether it runs this package. If so, an error fails the check.
        needs_gpu: bool, whether it is skipped without a GPU, because it would equal
            another part at tiny sizes.
    """

    name: str
    text: str
    kind: str
    backend: str
    module: str
    function: str
    arguments: dict = dataclasses.field(default_factory=dict)
    seconds: float = 120
    ours: bool = True
    needs_gpu: bool = False


def _by_backend(name, text, kind, module, functions, **more):
    """A part for each backend."""
    return [
        Part(f"{name}-{backend}", text, kind, backend, module, function, **more)
        for backend, function in functions.items()
    ]


def _decode(size):
    """Decoding with the sizes of a preset, by this package and by transformers."""
    model = {"model": f"open_llama_{size}_v2"}
    more = {"arguments": model, "needs_gpu": size != "3b"}
    text = f"tokens/s with the sizes of {size}_v2, bfloat16, greedy"
    functions = {"jax": "ours", "torch": "ours", "transformers": "transformers"}
    return [
        dataclasses.replace(part, backend="torch", ours=False)
        if part.backend == "transformers"
        else part
        for part in _by_backend(
            f"decode-{size}", text, "speed", "decode", functions, **more
        )
    ]


def _parity(name, backend, *shapes):
    """Parity of tiny models of these shapes with transformers."""
    text = "logits, 200 greedy tokens and gradients equal those of transformers"
    arguments = {"shapes": shapes}
    return Part(
        *(name, text, "check", backend, "parity", "run"),
        arguments=arguments,
        seconds=200,
    )


_ALL = [
    *_by_backend(
        "device",
        "name, memory, versions; fastest product, copy and read",
        "speed",
        "device",
        {"torch": "on_torch", "jax": "on_jax"},
        seconds=60,
    ),
    # Two processes, which compile in parallel.
    _parity("parity-jax", "jax", "head_dim_100"),
    _parity("parity-jax-grouped", "jax", "grouped_heads"),
    _parity("parity-torch", "torch", "head_dim_100", "grouped_heads"),
    *_by_backend(
        "attention",
        "the attention kernels of the device equal the plain formula",
        "check",
        "attention",
        {"jax": "check_jax", "torch": "check_torch"},
        seconds=180,
    ),
    Part(
        "resume-jax",
        "a fine-tuning run that is killed and resumed equals one that was not",
        "check",
        "jax",
        "resume",
        "run",
        seconds=180,
    ),
    *_by_backend(
        "attention-speed",
        "attention kernels and the plain formula: 2,048 tokens, 32 heads of 128",
        "speed",
        "attention_speed",
        {"jax": "on_jax", "torch": "on_torch"},
        seconds=60,
    ),
    *_decode("3b"),
    Part(
        "train-jax",
        "tokens/s of the train step of `pretrain`, 0.9 billion parameters",
        "speed",
        "jax",
        "training",
        "ours",
        seconds=150,
    ),
    Part(
        "train-transformers",
        "the same for transformers: compiled, autocast, fused AdamW",
        "speed",
        "torch",
        "training",
        "transformers",
        seconds=150,
        ours=False,
    ),
    *_decode("7b"),
    Part(
        "prefill-3b-jax",
        "prefill of 2,047 tokens",
        "speed",
        "jax",
        "decode",
        "prompt",
        arguments={"model": "open_llama_3b_v2"},
        needs_gpu=True,
    ),
    Part(
        "lora-jax",
        "tokens/s of LoRA training, rank 8, on 3b_v2 in bfloat16",
        "speed",
        "jax",
        "training",
        "lora",
    ),
]
PARTS = {part.name: part for part in _ALL}
