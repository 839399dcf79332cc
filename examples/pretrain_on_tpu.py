"""
Title: Plan and pretrain on a TPU
Author: The keras_openllama developers
Date created: 2026/11/27
Description: From the recipe and its plan to a run that is stopped and resumed.
Accelerator: TPU, or none (the small model; minutes on a CPU)
"""

"""
The commands are those of a large run; the model is the small one, so that they also run
on a CPU. `EXAMPLES_QUICK=1`, for tests, shortens the run. **The large recipes were
planned, and never run on a TPU by this project.**

## Install

In a notebook, this cell installs the package with the extra `train`. On a TPU, add
`"jax[tpu]"`. The extra `plan` adds the TPU compiler, with which plans are made on any
x86-64 Linux machine. In a checkout, `make install` has done this.
"""

"""shell
pip install --quiet "keras-openllama[train,plan] @ git+REPOSITORY"
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

quick = os.environ.get("EXAMPLES_QUICK") == "1"
output = Path(os.environ.get("EXAMPLES_OUTPUT") or tempfile.mkdtemp())


def run(command, *arguments):
    """Runs `keras-openllama COMMAND`; returns what it printed.

    Each command is a process: a process that uses a TPU keeps it until it ends.
    """
    words = [sys.executable, "-m", "keras_openllama", command, *arguments]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


"""
## The recipe

Each preset has a recipe, with the source of each setting. `--show` prints it and exits.
Settings that were never published are marked.
"""

print(run("pretrain", "--preset", "7b_v2", "--show"))

"""
## The plan

`--plan` compiles the training step of the recipe for a slice of TPUs, without a TPU,
and prints memory, time, tokens/s and MFU. Each compilation takes about a minute, and
without `--no-alternatives` neighboring choices are planned, too. On 256 chips of TPU v4
the 7B recipe is planned at 26.7 GiB, 4,277 tokens/s/chip and 68 % MFU, 11 days in all.
"""

if importlib.util.find_spec("libtpu") and not quick:
    arguments = ("--plan", "--topology", "v4:4x8x8", "--no-alternatives")
    print(run("pretrain", "--preset", "7b_v2", *arguments))

"""
## Data

A large run reads what `prepare-data` has made of RedPajama, RefinedWeb and StarCoder
data, from a bucket. Here, it is the manual that is behind Python's `help()`.
"""

manual = output / "manual.jsonl"
manual.write_text("\n".join(json.dumps({"text": text}) for text in topics.values()))
run(
    *("prepare-data", "--tokenizer", "nano", "--output", output / "data"),
    *("--source", f"manual={manual}", "--validation-fraction", 0.1, "--workers", 1),
)

"""
## The run

The same command, on every host of a slice, runs a large model. JAX finds the devices
and the other hosts. `--mesh data=4,fsdp=64` selects the mesh; without it the recipe has
one for the number of chips.
"""

steps = 4 if quick else 40
pretrain = (
    *("--preset", "nano", "--data", output / "data", "--output", output / "run"),
    *("--set", "sample_every=0", "--set", "warmup_steps=2", "--batch-size", 2),
    *("--set", "sequence_length=128", "--save-every", steps // 2, "--steps", steps),
)
run("pretrain", *pretrain)


def losses():
    """Returns the training loss of each step of the log."""
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


first = losses()
print("loss by step:", {step: round(loss, 2) for step, loss in first.items()})

"""
## Resume

When a slice is preempted, SIGTERM saves a checkpoint, and the process exits with code
75. A run that is killed loses the steps since its last checkpoint. Running the same
command again resumes it, bit-exactly on the same mesh. A run that is complete has
nothing left to do:
"""

run("pretrain", *pretrain)
print("The log is the same:", losses() == first)

"""
## The result

The run's directory is a preset, and so is each of its checkpoints.
"""

print(sorted(path.name for path in (output / "run").iterdir()))
text = run(
    "generate", "The value of", "--preset", output / "run", "--max-new-tokens", 16
)
print(text)

"""
[TPUs](../docs/tpu.md) has the rest: how to create a slice, where the data and the run's
directory go, and the plans of all sizes.
"""
