"""Fine-tuning examples in JSON lines files."""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from keras_openllama.text.inputs import CHAT_KEYS, PAIR_KEYS
from keras_openllama.utils.text_files import without_mark
from keras_openllama.utils.types import PathLike

# A pair, a chat or a text, as `OpenLlamaCausalLM.fit` takes them.
Example: TypeAlias = dict[str, Any] | str
T = TypeVar("T")

_KINDS = (PAIR_KEYS, CHAT_KEYS, {"text"})


def read_examples(
    paths: Sequence[PathLike], templates: tuple[str, str] | None = None
) -> list[Example]:
    r"""Reads fine-tuning examples from JSON lines files.

    Args:
        paths: JSON lines files. Each line is an object with `"prompt"` and
            `"response"`, with `"messages"`, or with `"text"`; other keys are ignored.
        templates: templates of the prompt and the response, such as `"{question}\n"`
            and `" {answer}"`, with keys of the objects in braces. `None` takes the
            objects as they are.

    Returns:
        Pairs `{"prompt", "response"}`, chats `{"messages"}`, or strings.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a line has another form, or the files mix several kinds of
            examples. The message names the file and the line.

    Example:
        >>> _ = open("qa.jsonl", "w").write('{"question": "2 + 2?", "answer": "4"}\n')
        >>> read_examples(["qa.jsonl"], templates=("{question}", " {answer}"))
        [{'prompt': '2 + 2?', 'response': ' 4'}]
    """
    return [example for _, example in read_examples_with_sources(paths, templates)]


def read_examples_with_sources(
    paths: Sequence[PathLike], templates: tuple[str, str] | None = None
) -> list[tuple[str, Example]]:
    """Reads fine-tuning examples, each with its source.

    Args:
        paths: see `read_examples`.
        templates: see `read_examples`.

    Returns:
        List of `(source, example)`. The source is the file's name without its suffix.

    Raises:
        OSError: if a file cannot be read.
        ValueError: see `read_examples`.
    """
    found = []
    for path in paths:
        source = Path(path).stem
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = without_mark(line, path)
                try:
                    if line.strip():
                        found.append((source, _example(line.decode(), templates)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))} has no examples.")
    kinds = {frozenset(e) if isinstance(e, dict) else "text" for _, e in found}
    if len(kinds) > 1:
        raise ValueError(
            "The files mix several kinds of examples (pairs, chats, texts). Use files "
            "of one kind."
        )
    return found


def _example(line, templates):
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"not a JSON object: {line.strip()[:60]}")
    if templates is not None:
        prompt, response = (_fill_template(template, found) for template in templates)
        return {"prompt": prompt, "response": response}
    for keys in _KINDS:
        if keys <= set(found):
            example = {key: found[key] for key in sorted(keys)}
            _check_values(example)
            return example["text"] if keys == {"text"} else example
    raise ValueError(
        'it must have the keys "prompt" and "response", "messages", or "text". It has: '
        f"{', '.join(found) or 'none'}. For other keys, pass the templates --prompt "
        "and --response."
    )


def _fill_template(template, found):
    """Fills a template with the values of an object."""
    names = _template_keys(template)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"it does not have {', '.join(map(repr, missing))}, which the template "
            f"{template!r} needs. It has: {', '.join(found)}"
        )
    _check_values({name: found[name] for name in names})
    return template.format(**{name: found[name] for name in names})


def _template_keys(template):
    """Returns the keys in a template; raises a `ValueError` for an invalid one."""
    found = [name for _, name, _, _ in string.Formatter().parse(template)]
    names = [name for name in found if name is not None]
    if not all(name.isidentifier() for name in names):
        raise ValueError(
            f"the template {template!r} must have keys in braces, such as "
            "{question}; write {{ and }} for literal braces"
        )
    return names


def _check_values(values):
    for name, value in values.items():
        if name == "messages" and not isinstance(value, list):
            raise ValueError(f"its {name!r} must be a list: {value!r:.60}")
        if name != "messages" and not isinstance(value, str):
            raise ValueError(f"its {name!r} must be a string: {value!r:.60}")


def split_examples(
    examples: Sequence[T], fraction: float, seed: int
) -> tuple[list[T], list[T]]:
    """Splits examples at random into a training and a validation set.

    Args:
        examples: the examples.
        fraction: fraction of the examples for validation, from 0 to less than 1. Above
            0, both sets get at least one example if there are two.
        seed: seed of the random choice.

    Returns:
        Training and validation examples, both in their original order.

    Example:
        >>> train, validation = split_examples(range(10), 0.2, seed=0)
        >>> len(train), len(validation)
        (8, 2)
    """
    count = round(fraction * len(examples))
    count = min(max(count, fraction > 0), len(examples) - 1)  # One for training.
    chosen = set(
        np.random.default_rng(seed).permutation(len(examples))[:count].tolist()
    )
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [example for i, example in enumerate(examples) if i in chosen]
