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
x86-64 Linux machine. In a checkout, `make install` has done this, except for the extra
`plan`: add it by `.venv/bin/pip install -e ".[plan]"`.
"""

"""shell
pip install --quiet "keras-openllama[train,plan] @ git+REPOSITORY"
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

quick = os.environ.get("EXAMPLES_QUICK") == "1"
output = Path(os.environ.get("EXAMPLES_OUTPUT") or tempfile.mkdtemp())


def start(command, *arguments):
    """Starts `keras-openllama COMMAND ARGUMENTS` in the directory `output`.

    Each command is a process: a process that uses a TPU keeps it until it ends.
    """
    words = [sys.executable, "-m", "keras_openllama", *command.split(), *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(words, cwd=output, **pipes)


def finish(process, exit_code=0):
    """Waits for a process; returns what it printed, if it ends with the exit code."""
    printed, errors = process.communicate()
    if process.returncode != exit_code:
        raise RuntimeError(f"Exit code {process.returncode}: {errors[-2000:]}")
    return printed


def keras_openllama(command, *arguments):
    """Runs `keras-openllama COMMAND ARGUMENTS`; returns what it printed."""
    return finish(start(command, *arguments))


"""
## The recipe

Each preset has a recipe, with the source of each setting. `--show` prints it and exits.
Settings that were never published are marked.
"""

print(keras_openllama("pretrain --preset 7b_v2 --show"))

"""
## The plan

`--plan` compiles the training step of the recipe for a slice of TPUs, without a TPU,
and prints memory, time, tokens/s and MFU. Each compilation takes about a minute, and
without `--no-alternatives` neighboring choices are planned, too. On 256 chips of TPU v4
the 7B recipe is planned at 26.2 GiB, 4,270 tokens/s/chip and 68 % MFU, 11 days in all.
"""

plan = "pretrain --preset 7b_v2 --plan --topology v4:4x8x8 --no-alternatives"
if quick:
    print("Skipped, because EXAMPLES_QUICK is set.")
elif not importlib.util.find_spec("libtpu"):
    print("Skipped, because the extra `plan` is not installed.")
else:
    print(keras_openllama(plan))

"""
## Data

A large run reads what `prepare-data` has made of RedPajama, RefinedWeb and StarCoder
data, from a bucket. Here, it is the manual that is behind Python's `help()`.
"""

manual = output / "manual.jsonl"
manual.write_text("\n".join(json.dumps({"text": text}) for text in topics.values()))
keras_openllama(
    "prepare-data --tokenizer nano --source manual=manual.jsonl --output data "
    "--validation-fraction 0.1 --workers 1"
)

"""
## The run

The same command, on every host of a slice, runs a large model. JAX finds the devices
and the other hosts. `--mesh data=4,fsdp=64` selects the mesh; without it the recipe has
one for the number of chips.
"""

steps = 20 if quick else 40
pretrain = (
    f"pretrain --preset nano --data data --batch-size 2 --steps {steps} "
    f"--save-every {steps // 2} --set sequence_length=128 --set warmup_steps=2 "
    "--set sample_every=0"
)
keras_openllama(f"{pretrain} --output run")


def losses(directory):
    """Returns the training loss of each step in the log of a run."""
    log = output / directory / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record["loss"] for record in records}


uninterrupted = losses("run")
print("loss by step:", {step: round(loss, 2) for step, loss in uninterrupted.items()})

"""
## Stop and resume

A slice that is preempted receives SIGTERM: the run saves a checkpoint, and the process
exits with code 75. Here, the same run in another directory is stopped after its first
steps. (A process that is killed without a warning loses the steps since its last
checkpoint.)
"""

stopped = start(f"{pretrain} --output stopped_run")
while stopped.poll() is None and len(losses("stopped_run")) < 3:
    time.sleep(0.02)
stopped.send_signal(signal.SIGTERM)
print(finish(stopped, exit_code=75).splitlines()[-1])
before = losses("stopped_run")
print(f"The log has {len(before)} of {steps} steps.")

"""
The same command again resumes the run. On the same mesh this is bit-exact: the log has
the losses of the uninterrupted run, to the last digit.
"""

printed = keras_openllama(f"{pretrain} --output stopped_run")
print(next(line for line in printed.splitlines() if line.startswith("Resuming")))
resumed = losses("stopped_run")
print("The same losses as without the interruption:", resumed == uninterrupted)

"""
## The result

The run's directory is a preset, and so is each of its checkpoints.
"""

print(sorted(path.name for path in (output / "run").iterdir()))
text = keras_openllama("generate --preset run --max-new-tokens 16", "The value of")
print(text)

"""
[TPUs](../docs/tpu.md) has the rest: how to create a slice, where the data and the run's
directory go, and the plans of all sizes.
"""
