"""Text that every machine has: that of the Python installation."""

import importlib.metadata
import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from keras_openllama.data.preparation import prepare
from keras_openllama.data.prepared_data import MANIFEST_FILE, PreparedData
from keras_openllama.utils import files


def prepare_default_text(output, tokenizer, report=print):
    """Prepares code, prose and descriptions of packages, some 5 MB.

    Args:
        output: string, directory to write; what is there already is taken.
        tokenizer: string, see `preparation.prepare`.
        report: called with lines of text.

    Returns:
        `prepared_data.PreparedData`.
    """
    if files.exists(files.join(output, MANIFEST_FILE)):
        return PreparedData.open(output)
    text = Path(output, "text")
    text.mkdir(parents=True, exist_ok=True)
    found = importlib.metadata.distributions()
    described = {d.name: d.metadata.get_payload() for d in found}
    _write(text / "prose.jsonl", [topics[name] for name in sorted(topics)])
    _write(text / "web.jsonl", [described[n] for n in sorted(described, key=str)])
    return prepare(
        {
            "code": [f"{sysconfig.get_path('stdlib')}/*.py"],
            "prose": [str(text / "prose.jsonl")],
            "web": [str(text / "web.jsonl")],
        },
        tokenizer,
        output,
        report=report,
        validation_fraction=0.05,  # Ours: there are few documents.
    )


def _write(path, texts):
    lines = [json.dumps({"text": text}) + "\n" for text in texts if text]
    path.write_text("".join(lines), encoding="utf-8")
