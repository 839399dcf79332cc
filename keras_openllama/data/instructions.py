"""Fine-tuning examples in JSON files."""

from __future__ import annotations

import collections
import dataclasses
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from keras_openllama.data.json_values import read_json_values
from keras_openllama.text.messages import UnusableExampleError
from keras_openllama.text.records import Example, check_text, example_from_record
from keras_openllama.utils.types import PathLike

T = TypeVar("T")

# Fraction of the examples that may be skipped. Heuristic: Stanford Alpaca has less than
# 0.1 % of empty outputs; a wrong template or key makes most examples unusable.
MAX_SKIPPED = 0.1
_MAX_LISTED = 20  # Lines of a file that a message lists.


@dataclasses.dataclass(frozen=True)
class LocatedExample:
    """A fine-tuning example, and where it is from.

    Attributes:
        source: Name of its file without the suffix.
        place: Its file and line, for messages.
        example: The example.
    """

    source: str
    place: str
    example: Example


class ExampleErrors:
    """Collects what is wrong with examples, to report all of it at once.

    An example that is malformed is an error. An example from which a model cannot
    learn, such as one with an empty response, is skipped and counted; too many of them
    are an error as well.

    Args:
        max_skipped: Largest fraction of the examples that may be skipped.

    Example:
        >>> errors = ExampleErrors(max_skipped=0.1)
        >>> errors.add("a.jsonl, line 7", UnusableExampleError("empty response"))
        >>> errors.summary()
        ['1 example skipped: empty response (a.jsonl, line 7)']
        >>> errors.check(total=100)
    """

    def __init__(self, max_skipped: float = MAX_SKIPPED):
        self.max_skipped = max_skipped
        self._malformed: list[str] = []
        self._skipped: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, place: str, error: ValueError) -> None:
        """Adds the error of an example.

        Args:
            place: Its file and line; `""` if the error names them.
            error: The error.
        """
        if isinstance(error, UnusableExampleError):
            self._skipped[error.reason].append(place)
        else:
            self._malformed.append(f"{place}: {error}" if place else str(error))

    def check(self, total: int) -> None:
        """Raises all errors.

        Args:
            total: Number of examples, with malformed and skipped ones.

        Raises:
            ValueError: If an example is malformed, or too many are skipped.
        """
        if self._malformed:
            errors = _listed(self._malformed, f"of {total} examples")
            raise ValueError("\n".join([errors, *self.summary()]))
        count = sum(map(len, self._skipped.values()))
        if count > self.max_skipped * total:
            raise ValueError(
                f"{count} of {total} examples would be skipped, more than the fraction "
                f"{self.max_skipped:g} that `max_skipped` (--max-skipped) allows:\n"
                + "\n".join(self.summary())
            )

    def summary(self) -> list[str]:
        """Returns a line for each reason to skip examples, with counts and places."""
        return [
            f"{len(places)} example{'s' * (len(places) > 1)} skipped: {reason} "
            f"({_joined(places)})"
            for reason, places in self._skipped.items()
        ]


def _listed(errors, of_all):
    if len(errors) == 1:
        return errors[0]
    more = len(errors) - _MAX_LISTED
    lines = [f"{len(errors)} errors {of_all}:", *errors[:_MAX_LISTED]]
    return "\n".join([*lines, *([f"… and {more} more"] if more > 0 else [])])


def _joined(places):
    more = len(places) - _MAX_LISTED
    listed = "; ".join(places[:_MAX_LISTED])
    return f"{listed}; … and {more} more" if more > 0 else listed


def read_examples(
    paths: Sequence[PathLike],
    templates: tuple[str, str] | None = None,
    max_skipped: float = MAX_SKIPPED,
) -> list[Example]:
    r"""Reads fine-tuning examples from JSON files.

    Args:
        paths: Files of JSON Lines or JSON arrays. Their objects have `"prompt"` and
            `"response"` (or `"completion"`), `"instruction"`, `"input"` and `"output"`,
            `"question"` and `"answer"`, `"messages"`, `"conversations"`, or `"text"`;
            see `text.records`. Other keys are ignored.
        templates: Templates of the prompt and the response, such as `"{question}\n"`
            and `" {answer}"`, with keys of the objects in braces. `None` takes the
            objects as they are.
        max_skipped: Largest fraction of the examples that may be skipped because there
            is nothing to learn from them.

    Returns:
        Examples, see `records.Example`.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If examples are malformed, too many are skipped, or texts are mixed
            with other examples. The message names the files and lines.

    Example:
        >>> _ = open("qa.jsonl", "w").write('{"question": "2 + 2?", "answer": "4"}\n')
        >>> read_examples(["qa.jsonl"], templates=("{question}", " {answer}"))
        [{'prompt': '2 + 2?', 'response': ' 4'}]
    """
    errors = ExampleErrors(max_skipped)
    found, total = read_located_examples(paths, templates, errors)
    errors.check(total)
    return [located.example for located in found]


def read_located_examples(
    paths: Sequence[PathLike],
    templates: tuple[str, str] | None,
    errors: ExampleErrors,
) -> tuple[list[LocatedExample], int]:
    """Reads fine-tuning examples, each with its place.

    Args:
        paths: See `read_examples`.
        templates: See `read_examples`.
        errors: Takes the errors of the examples; call its `check` afterwards.

    Returns:
        The usable examples, and the number of all.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a template is invalid, or texts are mixed with other examples.
    """
    for template in templates or ():
        _template_keys(template)
    found, total = [], 0
    for path in paths:
        try:
            values = read_json_values(path)
            if not values:
                raise ValueError(f"{path} has no examples.")
        except ValueError as error:
            errors.add("", error)
            continue
        total += len(values)
        for line, value, damage in values:
            place = f"{path}, line {line}"
            try:
                if damage:
                    raise ValueError(damage)
                example = _example(value, templates)
                found.append(LocatedExample(Path(path).stem, place, example))
            except ValueError as error:
                errors.add(place, error)
    _check_kinds(found)
    return found, total


def _check_kinds(examples):
    """Raises if texts are mixed with other examples."""
    first = {isinstance(x.example, str): x.place for x in reversed(examples)}
    if len(first) > 1:
        raise ValueError(
            f"The files mix several kinds of examples: texts ({first[True]}), and "
            f"prompts with responses or chats ({first[False]}). Use files of one kind."
        )


def _example(value, templates):
    if templates is None:
        return example_from_record(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"not a JSON object: {value!r:.60}")
    kinds = zip(("prompt", "response"), templates, strict=True)
    return {kind: _fill_template(template, value, kind) for kind, template in kinds}


def _fill_template(template, found, kind):
    """Fills a template with the values of an object."""
    names = _template_keys(template)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"it does not have {', '.join(map(repr, missing))}, which the template "
            f"{template!r} needs. It has: {', '.join(map(str, found))}"
        )
    values = {name: "" if found[name] is None else found[name] for name in names}
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"its {name!r} must be a string: {value!r:.60}")
    if names and not any(value.strip() for value in values.values()):
        raise UnusableExampleError(f"empty {kind}")
    return check_text(template.format(**values), kind, kind)


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
