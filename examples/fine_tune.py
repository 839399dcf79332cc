"""
Title: Fine-tune on instructions
Author: The keras_openllama developers
Date created: 2026/11/27
Description: Teach the small model to answer questions, with LoRA, on a CPU.
Accelerator: none (two minutes on two CPU cores, of which training takes one)
"""

"""
`open_llama_nano` has 4.5 million parameters and was trained on Jane Austen, the Bible,
Moby-Dick and speeches of presidents. It continues a text; it does not answer questions.
A minute of LoRA on two CPU cores teaches it to, also for questions that it has not
seen.

The files of this run go to a temporary directory, or to `EXAMPLES_OUTPUT`.
`EXAMPLES_QUICK=1`, for tests, uses fewer examples and steps.

## Install

In a notebook, this cell fetches the repository, which has the questions, and installs
the package. In a checkout, `make install` has done this.
"""

"""shell
git clone --quiet --depth 1 REPOSITORY repository
pip install --quiet ./repository matplotlib transformers peft torch
"""

import os

os.environ["KERAS_BACKEND"] = "jax"  # Or "tensorflow", or "torch".

import json
import math
import random
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.optimizers import AdamW, WarmupCosine
from keras_openllama.utils import plots

quick = os.environ.get("EXAMPLES_QUICK") == "1"
places = (Path.cwd() / "repository", Path.cwd(), *Path.cwd().parents)
root = next(p for p in places if (p / "examples" / "instructions.jsonl").exists())
output = Path(os.environ.get("EXAMPLES_OUTPUT") or tempfile.mkdtemp())
# `keras.utils.set_random_seed` would import TensorFlow.
random.seed(0)  # Keras draws the initial adapters with it,
np.random.seed(0)  # and the order of the examples with this.

"""
## The examples

[instructions.jsonl](instructions.jsonl) has short questions, written for this project,
with one answer each. Every eighth is held out: the model never trains on it.
"""

lines = (root / "examples" / "instructions.jsonl").read_text("utf-8").splitlines()
pairs = [json.loads(line) for line in lines]
if quick:
    pairs = pairs[:128]
held_out = pairs[7::8]
training = [pair for number, pair in enumerate(pairs) if number % 8 != 7]

print(f"{len(training)} to train on, {len(held_out)} held out. The first three:\n")
for pair in training[:3]:
    print(pair["prompt"] + pair["response"])

"""
## Before

The model ends the line, or continues with a story.
"""

lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
lm.preprocessor.sequence_length = 128 if quick else 256


def answers_of(lm, pairs):
    """Returns the first line of each answer."""
    prompts = [pair["prompt"] for pair in pairs]
    texts = lm.generate(prompts, max_new_tokens=16, strip_prompt=True)
    return [text.strip().partition("\n")[0] for text in texts]


def measure(lm):
    """Returns loss, accuracy, perplexity and bits per byte on the held-out pairs."""
    return lm.evaluate(held_out, batch_size=2, pack=True, verbose=0, return_dict=True)


before, measured_before = answers_of(lm, held_out), measure(lm)
print(f"held-out loss {measured_before['loss']:.2f} nats per token")

"""
## Fine-tuning

Adapters of rank 16 are added to every projection; everything else is frozen. The loss
is that of the answers only. `pack=True` packs several pairs into a sequence; each
attends to itself only. The learning-rate schedule is as long as the training: the pairs
fill 83 sequences of 256 tokens. Without `pack` there are as many sequences as pairs.
"""

lm.backbone.enable_lora(16, ["query", "key", "value", "output", "gate", "up", "down"])
trained = sum(math.prod(v.shape) for v in lm.trainable_variables)
print(f"{trained:,} of {lm.count_params():,} parameters are trained")

epochs = 1 if quick else 5
sequences = 20 if quick else 83
schedule = WarmupCosine.over_epochs(
    3e-3, sequences, batch_size=2, epochs=epochs, warmup=0.05
)
lm.compile(optimizer=AdamW(schedule, weight_decay=0.0))
history = lm.fit(
    training,
    validation_data=held_out,
    batch_size=2,
    epochs=epochs,
    pack=True,
    verbose=0,
).history

"""
## After
"""

after, measured_after = answers_of(lm, held_out), measure(lm)
expected = [pair["response"].strip() for pair in held_out]
for when, answers, measured in (
    ("before", before, measured_before),
    ("after", after, measured_after),
):
    correct = sum(map(str.__eq__, answers, expected))
    print(
        f"{when:6}  {correct:3} of {len(held_out)} answers are correct, "
        f"loss {measured['loss']:.3f} nats per token, "
        f"{measured['bits_per_byte']:.3f} bits per byte"
    )

"""
In the full run on two CPU cores:

| held out | correct answers | loss (nats per token) | bits per byte |
|---|---|---|---|
| before | 0 of 141 | 5.594 | 3.913 |
| after | 124 of 141 | 0.086 | 0.060 |

## By kind of question

The blue bars show how many held-out questions of each kind are answered correctly, the
orange marks what the most frequent answer of the training examples would reach.
"""

kinds = {
    "Q: Who could": "who wrote this",
    "Q: Who writes": "who writes of it",
    "Q: In which": "in which book",
    "Q: Is": "man or woman",
    "Q: One": "one or many",
    "Q: Past": "tense",
    "Q: What sort": "sort of word",
    "Q: Who": "author of a book",
}


def kind_of(pair):
    """Returns the first kind whose beginning is the prompt's."""
    return next(kinds[start] for start in kinds if pair["prompt"].startswith(start))


def percent_correct(answers, kind):
    """Returns how many held-out questions of a kind have exactly the right answer."""
    rows = zip(answers, expected, held_out, strict=True)
    hits = [given == answer for given, answer, pair in rows if kind_of(pair) == kind]
    return 100 * sum(hits) / len(hits)


def percent_of_one_answer(kind):
    """Returns the same for the most frequent answer of the training examples."""
    answers = [pair["response"] for pair in training if kind_of(pair) == kind]
    guess = max(sorted({*answers}), key=answers.count).strip()
    return percent_correct([guess] * len(held_out), kind)


asked = [kind for kind in kinds.values() if kind in {*map(kind_of, held_out)}]
shares = [percent_correct(after, kind) for kind in asked]
guesses = [percent_of_one_answer(kind) for kind in asked]
ends = np.arange(epochs + 1)
losses = [measured_before["loss"], *history["val_loss"]]
with plots.style():
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    left.plot(ends[1:] - 0.5, history["loss"], "o-", color=plots.GRAY, label="training")
    left.plot(ends, losses, "o-", label="held out")
    left.set(
        title="Loss on answers",
        yscale="log",
        xlabel="epoch",
        ylabel="loss (nats per token)",
        xticks=ends,
    )
    left.yaxis.set_major_formatter("{x:g}")
    left.legend()
    rows = -np.arange(len(asked))
    right.barh(rows, shares, 0.6, label="after fine-tuning")
    right.plot(guesses, rows, "C1|", ms=16, mew=3, label="the most frequent answer")
    right.set_yticks(rows, asked)
    right.set(title="Held-out questions", xlim=(0, 100), xlabel="correct answers (%)")
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower right", ncols=2
    )
plt.show()

"""
![Loss by epoch, and correct answers by kind](../docs/images/fine_tune.png)

The first two held-out questions of each kind, right or wrong:
"""

for kind in asked:
    for i in [i for i, pair in enumerate(held_out) if kind_of(pair) == kind][:2]:
        print(held_out[i]["prompt"].removesuffix("\nA:"))
        print(f"   before:   {before[i][:60]}")
        print(f"   after:    {after[i]}")
        print(f"   expected: {expected[i]}")

"""
## Save the adapters, and load them into another model

The files are in PEFT's format. `merge_lora` merges the adapters into the weights; the
model is then as large and as fast as before.
"""

lm.save_adapters(output / "adapters")
for file in sorted((output / "adapters").iterdir()):
    print(f"{file.name:26} {file.stat().st_size / 1000:9,.1f} KB")

merged = OpenLlamaCausalLM.from_preset("open_llama_nano")
merged.load_adapters(output / "adapters")
merged.merge_lora()
print("The merged model gives the same answers:", answers_of(merged, held_out) == after)

"""
## Export to transformers

transformers loads the merged model as it is, and PEFT loads the adapters onto the model
that they were trained on. All three compute the same logits.
"""

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)  # Of PEFT and transformers.
merged.export_to_transformers(output / "model")
nano = OpenLlamaCausalLM.from_preset("open_llama_nano")
nano.export_to_transformers(output / "nano")

tokenizer = AutoTokenizer.from_pretrained(output / "model")
transformers_model = AutoModelForCausalLM.from_pretrained(output / "model")
base = AutoModelForCausalLM.from_pretrained(output / "nano")
adapted = peft.PeftModel.from_pretrained(base, output / "adapters")

ids = tokenizer(held_out[0]["prompt"], return_tensors="pt").input_ids
ours = np.asarray(lm.score(ids.numpy()))
with torch.no_grad():
    theirs = {
        "transformers, merged": transformers_model(ids).logits.numpy(),
        "PEFT, not merged": adapted(ids).logits.numpy(),
    }
for name, logits in theirs.items():
    difference = np.abs(logits - ours).max() / np.abs(ours).max()
    print(f"{name:22} logits differ by {difference:.1e} of the largest")
    assert difference < 1e-5

answer = transformers_model.generate(ids, max_new_tokens=16, do_sample=False)
print("\n" + tokenizer.decode(answer[0], skip_special_tokens=True))

"""
The command line trains in the same way, with a random 5 % held out, a warmup of 3 %,
checkpoints to resume from and a plot of the loss:

```bash
keras-openllama finetune --preset nano --data examples/instructions.jsonl \\
    --lora-rank 16 --lora-targets query key value output gate up down \\
    --sequence-length 256 --pack --batch-size 2 --epochs 5 --learning-rate 3e-3
```
"""
