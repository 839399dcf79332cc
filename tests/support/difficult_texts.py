"""Texts on which tokenizers are compared with SentencePiece."""

import inspect
import json
import random
import string
from pydoc_data.topics import topics

SCRIPTS = {
    "CJK": (0x4E00, 0x9FFF),
    "kana": (0x3040, 0x30FF),
    "hangul": (0xAC00, 0xD7A3),
    "arabic": (0x0600, 0x06FF),
    "devanagari": (0x0900, 0x097F),
    "combining": (0x0300, 0x036F),
    "emoji": (0x1F300, 0x1F64F),
    "control": (0x00, 0x1F),
    "punctuation": (0x2000, 0x206F),
    "latin": (0xA0, 0x24F),
}


def difficult_texts():
    """Returns more than 20,000 different texts of many kinds."""
    rng = random.Random(0)
    found = set()
    # Prose and code, complete and by line, with indentation.
    for text in [*topics.values(), *map(inspect.getsource, (json, random, string))]:
        found.update(text.splitlines(keepends=True))
        found.update(text.split("\n\n"))
    for length in range(
        1, 201
    ):  # Runs of white space: separate, before, after and inside text.
        run = " " * length
        found.update((run, run + "x", "x" + run, f"x{run}y", f"\n{run}def f():\n"))
        found.update(
            ("\n" * length, "\t" * length, f"a{' ' * length}\n{' ' * length}b")
        )
    words = [word for text in topics.values() for word in text.split()]
    white = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "    ",
        "\u00a0",
        "\u3000",
        "▁",
        " ▁",
    ]
    for _ in range(4000):
        row = [rng.choice(words) + rng.choice(white) for _ in range(12)]
        found.add("".join(row))
        found.add(rng.choice(white) + "".join(row[:3]) + rng.choice(white))
    for first, last in SCRIPTS.values():
        for _ in range(400):
            length = rng.randint(1, 20)
            letters = [chr(rng.randint(first, last)) for _ in range(length)]
            found.add("".join(letters))
            found.add("a" + " b".join(letters))
    for _ in range(2000):  # Digits, and whatever can be encoded.
        found.add(str(rng.randrange(10 ** rng.randint(1, 40))))
        points = (rng.randrange(0x110000) for _ in range(rng.randint(1, 30)))
        found.add("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
        found.add(rng.randbytes(rng.randint(1, 40)).decode("utf-8", "ignore"))
    for letters in ("a", "ab", "xyz", "é", "日", string.ascii_letters):
        found.update((letters * 2000)[:length] for length in (50, 257, 1000, 2000))
    found.update(
        ["", "<s>", "</s>", "<unk>", "<0x0A>", "a<s>b", "e\u0301", "🙂\u200d🙂"]
    )
    assert len(found) > 20_000
    return sorted(found)
