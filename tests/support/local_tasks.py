"""Synthetic documents of tasks of lm-evaluation-harness, with their fields."""

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

WORDS = sorted(
    {word for text in topics.values() for word in text.split() if word.isalpha()}
)


def write_tasks(directory, count=12, seed=0):
    """Writes documents for `keras-openllama evaluate --data`.

    Args:
        directory: path, made if it is not there.
        count: int, documents of each task.
        seed: int, for other words.

    Returns:
        The directory, a `Path`, with hellaswag, arc_easy, winogrande, boolq, record and
        truthfulqa_mc2.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    for name, make in DOCUMENTS.items():
        lines = [json.dumps(make(generator, number)) for number in range(count)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def write_own_task(directory, documents):
    """Writes `mine.yaml`, a user-defined task with questions like boolq's.

    Args:
        directory: path.
        documents: path of its JSON lines.
    """
    config = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(documents)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": ["no", "yes"],
    }
    Path(directory, "mine.yaml").write_text(json.dumps(config))  # JSON is YAML, too.


def words(generator, count):
    return " ".join(generator.choices(WORDS, k=count))


def _hellaswag(generator, number):
    endings = [words(generator, generator.randint(3, 9)) for _ in range(4)]
    return {
        "activity_label": words(generator, 2),
        "ctx_a": words(generator, 8) + ".",
        "ctx_b": words(generator, 4),
        "endings": [f"{ending} [step] more." for ending in endings],
        "label": str(generator.randrange(4)),
    }


def _arc_easy(generator, number):
    return {
        "question": words(generator, 7) + "?",
        "choices": {
            "text": [words(generator, 2) for _ in range(4)],
            "label": ["A", "B", "C", "D"],
        },
        "answerKey": generator.choice("ABCD"),
    }


def _winogrande(generator, number):
    return {
        "sentence": f"{words(generator, 5)} _ {words(generator, 5)}",
        "option1": words(generator, 1),
        "option2": words(generator, 2),
        "answer": generator.choice("12"),
    }


def _boolq(generator, number):
    return {
        "question": words(generator, 6),
        "passage": words(generator, 30) + ".",
        "label": generator.randrange(2),
    }


def _record(generator, number):
    return {
        "passage": f"{words(generator, 9)}\n@highlight\n{words(generator, 4)}",
        "query": f"{words(generator, 3)} @placeholder {words(generator, 2)}",
        "entities": ["The Alpha", "Beta One", "Gamma"],
        "answers": ["Beta One", "alpha"],
    }


def _truthfulqa_mc2(generator, number):
    answers = [words(generator, 3) for _ in range(4)]
    return {
        "question": words(generator, 6) + "?",
        "mc1_targets": {"choices": answers, "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": answers, "labels": [1, 0, 1, 0]},
    }


DOCUMENTS = {
    "hellaswag": _hellaswag,
    "arc_easy": _arc_easy,
    "winogrande": _winogrande,
    "boolq": _boolq,
    "record": _record,
    "truthfulqa_mc2": _truthfulqa_mc2,
}
