"""Examples of fine-tuning, read from JSON lines."""

import json
import string
from pathlib import Path

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
    return [example for _, example in read_sources(paths, templates)]


def read_sources(paths, templates=None):
    """As `read`, with the source of each example: its file's name, without ending.

    Returns:
        List of `(source, example)`.
    """
    found = []
    for path in paths:
        source = Path(path).stem
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        found.append((source, _example(line.decode(), templates)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"There is no example in {', '.join(map(str, paths))}.")
    kinds = {frozenset(e) if isinstance(e, dict) else "text" for _, e in found}
    if len(kinds) > 1:
        raise ValueError(
            "The files hold examples of several kinds (pairs, chats, texts). Give "
            "those of one."
        )
    return found


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
