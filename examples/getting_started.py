"""
Title: Getting started
Author: The keras_openllama developers
Date created: 2026/11/27
Description: Load a model, generate text, score it, fine-tune it and save it.
Accelerator: none (a minute on a CPU)
"""

"""
## Install

In a notebook, this cell installs the package from its repository. With a checkout, `pip
install -c constraints.txt .` does the same with the tested versions, and `make demo`
sets everything up in `.venv`.
"""

"""shell
pip install --quiet "git+REPOSITORY"
"""

"""
Keras computes with JAX, TensorFlow or PyTorch. The choice is made before the first
import.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"  # Or "tensorflow", or "torch".

import keras
import keras_hub

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.optimizers import AdamW

"""
## Load a model

`open_llama_nano` has 4.5 million parameters and comes with the package, so nothing is
downloaded. It was trained on Jane Austen, the Bible, Moby-Dick and speeches, and writes
like them. The published models have names such as `open_llama_3b_v2`; they are
downloaded from the Hugging Face Hub when they are first used (7 GB for 3B;
`dtype="bfloat16"` halves the memory).
"""

lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
for name, preset in OpenLlamaCausalLM.presets.items():
    print(f"{name:20} {preset['description']}")

"""
## Generate

The first call compiles the program, and later calls reuse it.
"""

print(lm.generate("The captain looked at the sea and said,", max_new_tokens=32))

"""
Greedy decoding always gives the same text. Any sampler of KerasHub can be used instead.
Text can also be streamed, and ended at a stop string.
"""

lm.compile(sampler=keras_hub.samplers.TopPSampler(p=0.9, temperature=0.8, seed=1))
for piece in lm.stream("It was a dark night, and", max_new_tokens=32, stop="\n"):
    print(piece, end="", flush=True)

"""
A list of prompts is one batch. Each prompt gives the text that it gives alone.
"""

prompts = ["The sea", "In the beginning God", "It is a truth universally"]
lm.compile(sampler="greedy")
for text in lm.generate(prompts, max_new_tokens=16):
    print(text)

"""
## Score

`score` returns the loss of each token, in nats. The nonsense is less likely.
"""

for text in ("The whale was in the sea.", "The whale was in the teacup."):
    losses = lm.score(text, scoring_mode="loss")
    print(f"{float(keras.ops.mean(losses)):.2f} nats per token: {text}")

"""
## Fine-tune

LoRA adapters are added to the projections of queries and values, and everything else is
frozen. The loss is that of the responses. Nothing more than prompts with responses is
needed:
"""

pairs = [
    {"prompt": "The opposite of hot is", "response": " cold."},
    {"prompt": "The opposite of up is", "response": " down."},
    {"prompt": "The opposite of long is", "response": " short."},
    {"prompt": "The opposite of day is", "response": " night."},
]
lm.preprocessor.sequence_length = 32
lm.backbone.enable_lora(8)
lm.compile(optimizer=AdamW(1e-2, weight_decay=0.0))
history = lm.fit(pairs, batch_size=4, epochs=5, verbose=0).history
print("loss by epoch:", [round(loss, 2) for loss in history["loss"]])

"""
## Save

`save_adapters` writes the adapters alone, in PEFT's format. `save_to_preset` (in
KerasHub's format) and `export_to_transformers` (for transformers'
`AutoModelForCausalLM.from_pretrained`) write the whole model with the adapters merged,
and `from_preset` loads both.
"""

import tempfile
from pathlib import Path

output = Path(os.environ.get("EXAMPLES_OUTPUT") or tempfile.mkdtemp())
lm.save_adapters(output / "adapters")
lm.save_to_preset(output / "preset")
lm.export_to_transformers(output / "model")
print(sorted(path.name for path in (output / "model").iterdir()))

lm = OpenLlamaCausalLM.from_preset(output / "model")
print(lm.generate("The opposite of up is", max_new_tokens=3))

"""
## Next

- [Fine-tune on instructions](fine_tune.ipynb), with validation and plots.
- [From zero](from_zero.ipynb): tokenizer, data, pretraining, fine-tuning, export.
- [Evaluate a model](evaluate.ipynb) and
  [plan and pretrain on a TPU](pretrain_on_tpu.ipynb).
"""
