"""Speed of training, compared with transformers."""

import gc
import types

import models
import results
from timing import median_seconds

import train  # benchmarks/train.py

STEPS = 3  # Steps of a timed call.
NOMINAL = 989e12  # FLOP/s of an H100, bfloat16, dense; NVIDIA's data sheet.


def sizes(batch=8, length=2048):
    """Options for `benchmarks/train.py`: 0.94 billion parameters, or tiny sizes."""
    if not results.has_gpu():
        return types.SimpleNamespace(
            batch=2, length=64, width=64, layers=2, heads=4, intermediate=96,
            vocabulary=512,
        )  # fmt: skip
    return types.SimpleNamespace(
        batch=batch, length=length, width=2048, layers=16, heads=16, intermediate=5504,
        vocabulary=32000,
    )  # fmt: skip


def with_largest_batch(measure):
    """Calls `measure` with a batch size, and with smaller ones if memory is short."""
    for batch in (8, 4, 2, 1):
        try:
            return measure(batch)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if "RESOURCE_EXHAUSTED" not in text and "OutOfMemory" not in text:
                raise
            results.info(f"batch {batch}", f"does not fit: {text.splitlines()[0][:90]}")
        gc.collect()  # Frees the model that did not fit.
    raise MemoryError("Not even one sequence fits.")


def report(name, options, run, flops_per_token):
    """Measures a function that trains a number of steps."""
    tokens = STEPS * options.batch * options.length
    rate = tokens / median_seconds(lambda: run(STEPS))
    flops = rate * flops_per_token
    note = f"{flops / 1e12:.0f} TFLOP/s"
    if results.has_gpu():
        note += f", {flops / NOMINAL:.0%} of 989"
    fastest = results.limit_of("flops")
    if fastest:
        note += f", {flops / fastest:.0%} of the fastest product"
    name = f"{name}: {options.batch} x {options.length}"
    results.measure(name, rate, "tokens/s", note)


def ours():
    """The train step of `pretrain`, in mixed_bfloat16."""
    import keras

    keras.config.set_dtype_policy("mixed_bfloat16")

    def measure(batch):
        options = sizes(batch)
        run = train.pretrain(options)
        report("pretraining", options, run, train.flops_per_token(options))

    with_largest_batch(measure)


def lora():
    """The train step of `finetune`: adapters of rank 8, bfloat16 weights."""
    from keras_openllama.optimizers import AdamW

    base = models.sizes("open_llama_3b_v2")
    parameters = models.multiplied(base)

    def measure(batch):
        options = sizes(batch)
        lm = models.ours(base, "bfloat16")
        lm.backbone.enable_lora(8)
        lm.compile(optimizer=AdamW(1e-4), weighted_metrics=[])
        run = train.compiled_steps(lm, options)
        attention = base["num_layers"] * base["hidden_dim"] * options.length
        # 2 FLOPs per parameter forward, and 2 backward for the inputs.
        report("LoRA of rank 8", options, run, 4 * parameters + 6 * attention)

    with_largest_batch(measure)


def transformers():
    """transformers: `torch.compile`, autocast, fused AdamW, gradient clipping."""
    import torch

    device = "cuda" if results.has_gpu() else "cpu"

    def measure(batch):
        options = sizes(batch)
        with torch.device(device):
            model = train.model_of_transformers(options)
        forward = torch.compile(model) if results.has_gpu() else model
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(
            parameters, 1e-4, weight_decay=0.1, fused=results.has_gpu()
        )
        x, y = (torch.tensor(a).long().to(device) for a in train.batches(options))

        def run(steps):
            for _ in range(steps):
                with torch.autocast(device, torch.bfloat16):
                    logits = forward(input_ids=x).logits.flatten(0, 1)
                    loss = torch.nn.functional.cross_entropy(logits, y.flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()

        report("transformers", options, run, train.flops_per_token(options))

    with_largest_batch(measure)
