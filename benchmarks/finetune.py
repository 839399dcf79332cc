"""Speed and memory of fine-tuning on a CPU, compared with KerasHub and PEFT.

    python benchmarks/finetune.py speed
    python benchmarks/finetune.py memory --rank 16 --length 256

Every contender trains the same random LLaMA on the same random batch with AdamW, in
its own process; in float32, or with frozen weights of `--dtype` and adapters in
float32. LoRA is on queries and values, the default of all of them.
This package and KerasHub's `LlamaCausalLM` run `enable_lora` and `fit` (KerasHub's
adapters are larger, because its kernels have an axis of heads); PEFT on transformers
runs a plain PyTorch loop.

`speed` trains adapters. The contenders alternate, a few steps each:

    tokens/s   median of the rounds
    KerasHub   ratio to KerasHub on JAX, the median of the rounds' ratios
    PEFT       ratio to PEFT

`memory` trains adapters, and then all weights, for a few steps. In MiB:

    imports    resident memory after the imports
    model      what the model adds to that
    training   what the peak of training, including compilation, adds to the imports
    estimate   what `keras_openllama.planning.finetune_memory` estimates for training

The default model has 58 million parameters: width 512, 8 layers, vocabulary 32,000.
"""

import argparse
import importlib
import math
import os
import re
import statistics
import time
from pathlib import Path

import workers  # benchmarks/workers.py

import train  # benchmarks/train.py

SPEED = ("ours/jax", "ours/torch", "keras_hub/jax", "peft/torch")
MEMORY = ("ours/jax", "ours/torch", "peft/torch")
REFERENCES = {"KerasHub": "keras_hub/jax", "PEFT": "peft/torch"}
# What a contender imports before it builds a model.
MODULES = {
    "ours": ("keras_openllama.models.causal_lm", "keras_openllama.optimizers"),
    "keras_hub": ("keras_hub",),
    "peft": ("torch", "transformers.models.llama.modeling_llama", "peft"),
}


# ----- The contenders. Each returns a function that trains a number of steps, and the
# number of trained parameters. A rank of 0 trains all weights.


def ours(options):
    """This package."""
    from keras_openllama.loading.weight_types import WeightTypes

    types = WeightTypes(options.dtype, options.quantization)
    lm = train.our_lm(options, options.rank, types, rematerialize=options.rematerialize)
    return train.fit_steps(lm.fit, *train.batches(options)), trained(lm)


def keras_hub(options):
    """KerasHub."""
    import keras

    keras.config.set_dtype_policy(options.dtype)
    lm = train.lm_of_keras_hub(options, options.rank)
    return train.fit_steps(train.keras_fit(lm), *train.batches(options)), trained(lm)


def trained(lm):
    """The number of trainable parameters of a Keras model."""
    return sum(math.prod(variable.shape) for variable in lm.trainable_variables)


def peft(options):
    """PEFT on transformers."""
    import peft
    import torch

    model = train.model_of_transformers(options).to(getattr(torch, options.dtype))
    if options.rank:
        targets = ["q_proj", "v_proj"]  # PEFT's default for LLaMA.
        lora = peft.LoraConfig(
            r=options.rank, lora_alpha=options.rank, target_modules=targets
        )
        model = peft.get_peft_model(model, lora)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return train.steps_of_torch(model, options), count


# ----- A contender's process


def work(contender, options):
    """Runs a worker: measures for each line of standard input."""
    kind, answers = workers.start_worker(contender)
    # No cache of compiled programs: compilation needs memory, too.
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")
    for module in MODULES[kind]:
        importlib.import_module(module)
    imports = resident("VmRSS")
    run, parameters = globals()[kind](options)
    if options.what == "speed":
        run(2)  # Compiles, and warms up.
    measure = seconds if options.what == "speed" else peak
    workers.serve(
        answers,
        lambda: {"parameters": parameters, **measure(run, options.steps, imports)},
    )


def seconds(run, steps, _):
    """Measures the time of some steps."""
    start = time.perf_counter()
    run(steps)
    return {"seconds": time.perf_counter() - start}


def peak(run, steps, imports):
    """Measures memory in bytes: imports, model, and the peak while training."""
    model = resident("VmRSS") - imports
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    run(steps)
    return {
        "imports": imports,
        "model": model,
        "training": resident("VmHWM") - imports,
    }


def resident(name):
    """Resident memory now (VmRSS) or at its peak (VmHWM), in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


# ----- Comparisons


def compare_speed(options):
    """Prints tokens/s of LoRA training."""
    rates, parameters = {name: [] for name in options.contender}, {}
    tokens = options.steps * options.batch * options.length
    rounds = workers.alternate(options.contender, options.rounds, script=__file__)
    for found in rounds:
        for name, result in found.items():
            rates[name].append(tokens / result["seconds"])
            parameters[name] = result["parameters"]
    columns = "".join(f"{column:>10}" for column in ("tokens/s", *REFERENCES))
    print(f"{'':16}{'parameters':>13}{columns}")
    for name, values in rates.items():
        ratios = (workers.ratio(rates, name, other) for other in REFERENCES.values())
        cells = (f"{statistics.median(values):.0f}", *ratios)
        print(f"{name:16}{parameters[name]:>13,}" + "".join(f"{x:>10}" for x in cells))


def compare_memory(options):
    """Prints the memory of training adapters, and of training all weights."""
    columns = ("imports", "model", "training", "estimate")
    print(f"{'':20}{'parameters':>13}" + "".join(f"{c:>10}" for c in columns))
    for rank in (options.rank, 0)[: 1 if options.quantization else 2]:
        for name in options.contender:
            worker = workers.Worker(name, "--rank", str(rank), script=__file__)
            found = worker.measure()
            worker.close()
            if name.startswith("ours/"):
                found["estimate"] = estimated(options, rank, name.split("/")[1])
            cells = [f"{found[c] / 2**20:,.0f}" if c in found else "" for c in columns]
            kind = "LoRA" if rank else "all"
            row = f"{name:12}{kind:8}{found['parameters']:>13,}"
            print(row + "".join(f"{cell:>10}" for cell in cells), flush=True)


def estimated(options, rank, backend):
    """The estimate of the planner, in bytes."""
    from keras_openllama.loading.weight_types import WeightTypes
    from keras_openllama.planning import finetune_memory

    sizes = train.keras_sizes(options)
    return finetune_memory.estimate_memory(
        sizes,
        options.dtype,
        lora_rank=rank or None,
        batch_size=options.batch,
        sequence_length=options.length,
        rematerialize=options.rematerialize,
        formats=WeightTypes(None, options.quantization or "auto").formats(sizes),
        backend=backend,
    ).total


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument(
        "--contender", nargs="+", choices=sorted({*SPEED, *MEMORY, "keras_hub/torch"})
    )
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    workers.add_sizes(parser)
    parser.add_argument(
        "--rematerialize",
        default="none",
        help="for this package on JAX (default: none)",
    )
    parser.add_argument(
        "--quantization", choices=("int8", "int4"), help="for this package"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="dtype of the frozen weights and of the activations (default: float32)",
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.contender = options.contender or (
        SPEED if options.what == "speed" else MEMORY
    )
    if options.work:
        work(options.work, options)
    elif options.what == "speed":
        compare_speed(options)
    else:
        compare_memory(options)


if __name__ == "__main__":
    main()
