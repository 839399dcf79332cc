"""
Title: Evaluate a model
Author: The keras_openllama developers
Date created: 2026/11/27
Description: Perplexity, bits per byte, and tasks of lm-evaluation-harness.
Accelerator: none (a minute on a CPU)
"""

"""
Everything here runs offline with `open_llama_nano`. For the published models, change
the name.

## Install

In a notebook, this cell fetches the repository, which has questions for a task, and
installs the package with the extra `eval`. In a checkout, `make install` has done this.
"""

"""shell
git clone --quiet --depth 1 REPOSITORY repository
pip install --quiet "./repository[eval]"
"""

import os

os.environ["KERAS_BACKEND"] = "jax"  # Or "tensorflow", or "torch".

import json
import tempfile
from pathlib import Path

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.evaluation import perplexity

quick = os.environ.get("EXAMPLES_QUICK") == "1"
places = (Path.cwd() / "repository", Path.cwd(), *Path.cwd().parents)
root = next(p for p in places if (p / "examples" / "instructions.jsonl").exists())
output = Path(os.environ.get("EXAMPLES_OUTPUT") or tempfile.mkdtemp())

lm = OpenLlamaCausalLM.from_preset("open_llama_nano")

"""
## Perplexity and bits per byte

Two texts of the same meaning, in the style of the Bible and of the Python manual. The
model has read the Bible.
"""

passages = {
    "bible": "And it came to pass, when the king heard it, that he was very sorry, and "
    "he commanded that they should bring the man before him.",
    "manual": "The handler is called if the interpreter receives the signal; it raises "
    "an exception whose argument is the object that was requested.",
}
rows = perplexity.evaluate_perplexity(lm, passages, progress=False)
print(perplexity.perplexity_table(rows))

"""
Perplexity is per token, so it cannot compare models with different tokenizers. Bits per
byte can: they count the bytes of the original text. On held-out English,
`open_llama_nano` reaches 1.38 bits per byte.

`keras_openllama.evaluation.texts.read_texts(paths, lm)` reads files, directories and
prepared datasets. On the command line:

```bash
keras-openllama evaluate --preset open_llama_nano --perplexity book.txt
```

## A task of your own

lm-evaluation-harness defines a task by a YAML file (JSON is YAML, too). This one is
multiple choice: the model scores each choice after the prompt, and the more likely one
is its answer.
"""

lines = (root / "examples" / "instructions.jsonl").read_text("utf-8").splitlines()
pairs = [json.loads(line) for line in lines]
questions = [pair for pair in pairs if pair["prompt"].startswith("Q: One or many")]
questions = questions[: 16 if quick else 200]
choices = ["One.", "Many."]
documents = output / "one_or_many.jsonl"
documents.write_text(
    "".join(
        json.dumps(
            {"prompt": pair["prompt"], "label": choices.index(pair["response"].strip())}
        )
        + "\n"
        for pair in questions
    )
)
task = {
    "task": "one_or_many",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"validation": str(documents)}},
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "label",
    "doc_to_choice": choices,
}
(output / "one_or_many.yaml").write_text(json.dumps(task))

"""
The adapter `OpenLlamaLM` lets the harness evaluate a model that is loaded already. A
model that has read stories does not know what is asked: it should be near chance.
"""

import lm_eval
from lm_eval.tasks import TaskManager

from keras_openllama.evaluation.lm_eval_model import OpenLlamaLM


def accuracy_of(lm):
    """Returns the share of correct answers to the task."""
    results = lm_eval.simple_evaluate(
        OpenLlamaLM(lm=lm),
        tasks=["one_or_many"],
        task_manager=TaskManager(include_path=str(output)),
        bootstrap_iters=0,
    )
    return results["results"]["one_or_many"]["acc,none"]


accuracy = accuracy_of(lm)
print(f"accuracy {accuracy:.2f} on {len(questions)} questions")

"""
[Fine-tuning on instructions](fine_tune.ipynb) brings the same model to 26 of 27
held-out questions of this kind.

## Published tasks

`keras-openllama evaluate` measures the 21 metrics that OpenLLaMA published, and prints
measured and published values side by side. It downloads the datasets, and takes hours
without an accelerator, so it is not run here:

```bash
keras-openllama evaluate --preset 7b_v2 --suite openllama --output evaluations/7b_v2
keras-openllama evaluate --preset 7b_v2 --tasks hellaswag piqa --limit 500
```

Any task of the harness works with its own command line, too:

```bash
keras-openllama lm-eval --model keras_openllama --model_args preset=7b_v2 --tasks mmlu
```

[The guide](../docs/evaluation.md) explains how the results differ from those of 2023.
"""
