"""
Title: From zero
Author: The keras_openllama developers
Date created: 2026/11/27
Description: Tokenizer, data, pretraining, fine-tuning and export, with no download.
Accelerator: none (six minutes on two CPU cores)
"""

"""
This guide makes a language model from nothing: a tokenizer, data, pretraining,
fine-tuning on instructions, and the export to transformers. The text is what every
Python installation has, its library and its documentation.

The files go to a temporary directory, or to `EXAMPLES_OUTPUT`. `EXAMPLES_QUICK=1`, for
tests, shortens both trainings to a few steps.

## Install

In a notebook, this cell fetches the repository and installs the package. In a checkout,
`make install` has done this.
"""

"""shell
git clone --quiet --depth 1 REPOSITORY repository
pip install --quiet "./repository[train]" transformers torch
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import ast
import collections
import json
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.optimizers import AdamW, WarmupCosine

quick = os.environ.get("EXAMPLES_QUICK") == "1"
places = (Path.cwd() / "repository", Path.cwd(), *Path.cwd().parents)
root = next(p for p in places if (p / "examples" / "instructions.jsonl").exists())
output = Path(os.environ.get("EXAMPLES_OUTPUT") or tempfile.mkdtemp())
random.seed(0)
np.random.seed(0)


def keras_openllama(command, *arguments):
    """Runs `keras-openllama COMMAND ARGUMENTS` in the directory `output`.

    Returns the lines that it printed.
    """
    words = [sys.executable, "-m", "keras_openllama", *command.split(), *arguments]
    done = subprocess.run(words, cwd=output, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.splitlines()


"""
## Text

There are two sources: the modules of the standard library, and English, which is the
docstrings of these modules and the manual behind `help()`.
"""

library = Path(sysconfig.get_path("stdlib"))
excluded = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


def documentation(path):
    """Returns the docstrings of a module, its classes and its functions."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(path.read_text("utf-8", errors="replace"))
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


modules = [p for p in sorted(library.rglob("*.py")) if not excluded & {*p.parts}]
english = [*filter(None, map(documentation, modules)), *topics.values()]
with open(output / "english.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps({"text": text}) + "\n" for text in english)
sources = [f"code={library}/*.py", "english=english.jsonl"]
print(f"{len(english)} English texts, {sum(map(len, english)) / 1e6:.1f} MB")

"""
## A tokenizer

SentencePiece BPE with byte fallback, in the layout of OpenLLaMA v2, which keeps every
space. It has 3,072 pieces, the vocabulary size of `open_llama_nano`.
"""

printed = keras_openllama(
    "train-tokenizer --output tokenizer --vocab-size 3072 --style v2 --input", *sources
)
table = printed.index("") + 1
print("\n".join(printed[table : table + 5]))

"""
With Python 3.11 this prints 3.12 bytes per token for all sources, where the tokenizer
of `open_llama_nano`, which has seen no code, reaches 1.95, and Mistral's, with 32,000
pieces, 3.50.

## Data

Documents become token shards. Some documents are held out for validation.
"""

printed = keras_openllama(
    "prepare-data --output data --tokenizer tokenizer --validation-fraction 0.05",
    *(f"--source={source}" for source in sources),
)
print("\n".join(line for line in printed if re.search("for train|validation", line)))

"""
## Pretraining

The architecture is the preset's, 4.5 million parameters, with random weights. Muon with
a high learning rate learns most in few steps. Running the same command again would
resume the run.
"""

(output / "pretrain.yaml").write_text(
    f"""
steps: {10 if quick else 200}
batch_size: {4 if quick else 16}
optimizer: muon
learning_rate: 0.005
final_learning_rate: 0.0001
warmup_steps: {2 if quick else 20}
validate_every: {5 if quick else 50}
sample_every: 0
"""
)
words = "pretrain --preset nano --config pretrain.yaml --data data --output run"
command = [sys.executable, "-m", "keras_openllama", *words.split()]
messages = []
with subprocess.Popen(
    command, cwd=output, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
) as process:
    for line in process.stderr:  # Of the progress bar, too.
        messages.append(line)
        if "validation loss" in line:
            print(line.strip(), flush=True)
if process.returncode:
    raise RuntimeError("".join(messages)[-2000:])

print("The curve:", output / "run" / "loss.png")

"""
The full run reaches a validation loss of 4.02 nats per token (1.81 bits per byte) after
819,200 tokens:

![Loss by tokens](../docs/images/from_zero.png)

The run's directory is a preset. The model writes code-like text; it has seen very
little.
"""

lm = OpenLlamaCausalLM.from_preset(str(output / "run"))
lm.compile(sampler="top_k")
for prompt in ("def __init__(self,", "    if not isinstance(", "Return True if"):
    print(lm.generate(prompt, max_new_tokens=48))
    print("-" * 40)

"""
## Fine-tuning

The questions and answers are those of [fine_tune.ipynb](fine_tune.ipynb), but all
weights are trained, not adapters. The questions are about novels, the Bible and
speeches, of which this model has not read a line. What it answers correctly it has from
Python's English, such as what an `s` at the end of a word means, or from the other
questions.
"""

lines = (root / "examples" / "instructions.jsonl").read_text("utf-8").splitlines()
pairs = [json.loads(line) for line in lines]
held_out = pairs[7::8]
training = [pair for number, pair in enumerate(pairs) if number % 8 != 7]

lm.preprocessor.sequence_length = 256
epochs = 1 if quick else 5
# About 43 steps per epoch, of two sequences that each hold several pairs (`pack`).
schedule = WarmupCosine(1e-3, final=1e-4, warmup_steps=10, steps=43 * epochs)
# This sets the sampler, too: greedy again.
lm.compile(optimizer=AdamW(schedule, weight_decay=0.0))
options = dict(batch_size=2, pack=True, verbose=0)
before = lm.evaluate(held_out, return_dict=True, **options)
lm.fit(training, epochs=epochs, **options)
after = lm.evaluate(held_out, return_dict=True, **options)
print(f"held-out loss {before['loss']:.2f} before, {after['loss']:.2f} after")

"""
The full run goes from 5.30 to 0.19. How many held-out questions of each kind it
answers:
"""

prompts = [pair["prompt"] for pair in held_out]
answers = lm.generate(prompts, max_new_tokens=16, strip_prompt=True)
asked, correct, examples = collections.Counter(), collections.Counter(), {}
for pair, answer in zip(held_out, answers, strict=True):
    kind = re.match(r"Q: (Is|\S+ \S+)", pair["prompt"])[1]
    examples.setdefault(kind, pair["prompt"].removeprefix("Q: ").removesuffix("\nA:"))
    asked[kind] += 1
    correct[kind] += answer == pair["response"]
for kind, count in asked.most_common(7):
    print(f"{correct[kind]:3} of {count:3} correct, such as: {examples[kind]}")

"""
| held-out questions such as | asked | correct |
|---|---|---|
| What sort of word is sister? | 38 | 5 |
| One or many: neighbor? | 27 | 25 |
| Is King Saul a man or a woman? | 18 | 11 |
| Past, present or future? He says nothing. | 18 | 13 |
| Who writes of a whale-boat? | 14 | 7 |
| In which book is Admiral Croft? | 12 | 4 |
| Who could have written this? … | 11 | 10 |

## Export to transformers

The directory needs no code of this package. Both implementations choose the same
tokens.
"""

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
lm.export_to_transformers(output / "model")
model = AutoModelForCausalLM.from_pretrained(output / "model")
tokenizer = AutoTokenizer.from_pretrained(output / "model")

for prompt in prompts[:3]:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    theirs = model.generate(ids, max_new_tokens=32, do_sample=False)[0]
    ours = lm.generate(
        {"token_ids": ids.numpy(), "padding_mask": np.ones(ids.shape, bool)},
        max_new_tokens=32,
    )
    ours = ours["token_ids"][0][ours["padding_mask"][0]]
    theirs = theirs.numpy()[: len(ours)]  # It includes </s>.
    print(tokenizer.decode(theirs, skip_special_tokens=True))
    print(f"-- the same {len(ours)} tokens: {(theirs == ours).all()}\n")
