"""Default training text: the files of the Python installation."""

import importlib.metadata
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

from keras_openllama.data.preparation import prepare_dataset
from keras_openllama.data.prepared_data import MANIFEST_FILE, PreparedData
from keras_openllama.utils import files


def prepare_default_text(
    output: str, tokenizer: str, report: Callable[[str], object] = print
) -> PreparedData:
    """Prepares code, prose and package descriptions of the Python installation.

    The text has about 5 MB.

    Args:
        output: directory to write. If it holds a prepared dataset, that is returned.
        tokenizer: see `preparation.prepare_dataset`.
        report: called with lines of text.

    Returns:
        The prepared dataset.
    """
    if files.exists(files.join(output, MANIFEST_FILE)):
        return PreparedData.open(output)
    text = Path(output, "text")
    text.mkdir(parents=True, exist_ok=True)
    descriptions = {
        distribution.name: distribution.metadata.get_payload()
        for distribution in importlib.metadata.distributions()
    }
    _write_jsonl(text / "prose.jsonl", [topics[name] for name in sorted(topics)])
    _write_jsonl(
        text / "web.jsonl",
        [descriptions[name] for name in sorted(descriptions, key=str)],
    )
    return prepare_dataset(
        {
            "code": [f"{sysconfig.get_path('stdlib')}/*.py"],
            "prose": [str(text / "prose.jsonl")],
            "web": [str(text / "web.jsonl")],
        },
        tokenizer,
        output,
        report=report,
        validation_fraction=0.05,  # Heuristic: there are few documents.
    )


def _write_jsonl(path, texts):
    lines = [json.dumps({"text": text}) + "\n" for text in texts if text]
    path.write_text("".join(lines), encoding="utf-8")
