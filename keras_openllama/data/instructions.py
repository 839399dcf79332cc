"""What `train/finetune.py` reads: JSON lines of texts, pairs or chats."""

import json
import string

import numpy as np

from keras_openllama.text.inputs import CHAT, PAIR

_KINDS = (PAIR, CHAT, {"text"})


def read(paths, templates=None):
    """Reads examples from JSON lines.

    Args:
        paths: list of paths. Each line is an object with `"prompt"` and `"response"`,
            with `"messages"`, or with `"text"`; other keys do not matter.
        templates: pair of strings such as `"{question}\\n"` and `" {answer}"`: prompt
            and response from the keys of an object. `None` takes it as it is.

    Returns:
        List of pairs `{"prompt", "response"}`, of chats `{"messages"}`, or of strings.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a line is no such object, or files hold several kinds. The
            message names file and line.
    """
    examples = []
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        examples.append(_example(line.decode(), templates))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not examples:
        raise ValueError(f"There is no example in {', '.join(map(str, paths))}.")
    kinds = {frozenset(e) if isinstance(e, dict) else "text" for e in examples}
    if len(kinds) > 1:
        raise ValueError(
            "The files hold examples of several kinds (pairs, chats, texts). Give "
            "those of one."
        )
    return examples


def _example(line, templates):
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object: {line.strip()[:60]}")
    if templates is not None:
        prompt, response = (_filled(template, found) for template in templates)
        return {"prompt": prompt, "response": response}
    for keys in _KINDS:
        if keys <= set(found):
            chosen = {key: found[key] for key in sorted(keys)}
            _check_strings(chosen)
            return chosen["text"] if keys == {"text"} else chosen
    raise ValueError(
        'it has none of "prompt" and "response", "messages", or "text". It has: '
        f"{', '.join(found) or 'nothing'}. Say what to make of it by --prompt and "
        "--response."
    )


def _filled(template, found):
    names = _names(template)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"it has no {', '.join(map(repr, missing))}, which the template "
            f"{template!r} asks for. It has: {', '.join(found)}"
        )
    _check_strings({name: found[name] for name in names})
    return template.format(**{name: found[name] for name in names})


def _names(template):
    """The keys that a template asks for; `ValueError` for what is no template."""
    found = [name for _, name, _, _ in string.Formatter().parse(template)]
    names = [name for name in found if name is not None]
    if not all(name.isidentifier() for name in names):
        raise ValueError(
            f"the template {template!r} takes names in braces, such as {{question}}, "
            "and {{ and }} for braces"
        )
    return names


def _check_strings(values):
    for name, value in values.items():
        if name == "messages" and not isinstance(value, list):
            raise ValueError(f"its {name!r} is no list: {value!r:.60}")
        if name != "messages" and not isinstance(value, str):
            raise ValueError(f"its {name!r} is no string: {value!r:.60}")


def divide(examples, share, seed):
    """Sets some examples apart for validation.

    Args:
        examples: list.
        share: float from 0 to less than 1.
        seed: int.

    Returns:
        Two lists, those to train on and those apart, both in their order.
    """
    count = round(share * len(examples))
    count = min(max(count, share > 0), len(examples) - 1)  # One is left to train on.
    chosen = set(
        np.random.default_rng(seed).permutation(len(examples))[:count].tolist()
    )
    kept = [e for i, e in enumerate(examples) if i not in chosen]
    return kept, [e for i, e in enumerate(examples) if i in chosen]


class Batches:
    """The batch of each step, a function of the seed and the step alone.

    Each epoch goes through all rows once, in an order of its own; the last batch of an
    epoch is filled up from the next one's order.

    Args:
        arrays: `(x, y, weights)`, NumPy arrays of rows, as the preprocessor makes them.
        batch_size: int.
        seed: int.
    """

    def __init__(self, arrays, batch_size, seed):
        x, y, weights = arrays
        self._arrays = x["token_ids"], x["padding_mask"], y, weights
        self._batch_size, self._seed = batch_size, seed
        self.rows = len(y)
        self._epoch = None  # That `_permutation` is of.

    def steps(self, epochs):
        """Steps that go `epochs` times through the rows: int."""
        return max(1, -(-round(epochs * self.rows) // self._batch_size))

    def at(self, step):
        """The batch of a step, counted from 1: `(x, y, weights)`."""
        first = (step - 1) * self._batch_size
        places = range(first, first + self._batch_size)
        chosen = [
            self._order(place // self.rows)[place % self.rows] for place in places
        ]
        token_ids, padding_mask, y, weights = (a[chosen] for a in self._arrays)
        return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weights

    def _order(self, epoch):
        if self._epoch != epoch:
            random = np.random.default_rng([self._seed, epoch])
            self._epoch, self._permutation = epoch, random.permutation(self.rows)
        return self._permutation
