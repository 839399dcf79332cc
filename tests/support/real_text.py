"""Real text of every Python installation, in the formats of text sources."""

import importlib.metadata
import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

CODE = f"{sysconfig.get_path('stdlib')}/asyncio/*.py"


def prose():
    """Chapters of the Python language reference, a list of strings."""
    return [topics[name] for name in sorted(topics)]


def web():
    """Descriptions of installed packages, a list of strings."""
    found = importlib.metadata.distributions()
    described = {d.name: d.metadata.get_payload() or "" for d in found}
    return [described[name] for name in sorted(described)]


def code():
    """The modules that `CODE` matches, a list of strings."""
    directory, pattern = Path(CODE).parent, Path(CODE).name
    return [path.read_text("utf-8") for path in sorted(directory.glob(pattern))]


def write_jsonl(path, texts, field="text"):
    """Writes texts as JSON lines, and returns the path as a string."""
    with open(path, "w") as file:
        file.writelines(json.dumps({field: text}) + "\n" for text in texts)
    return str(path)


def write_parquet(path, texts, field="content", group=50):
    """Writes texts as a column of strings, and returns the path as a string."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": range(len(texts)), field: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return str(path)


def write_tfds(data_dir, splits, name="prose"):
    """Creates a dataset of TensorFlow Datasets; returns its directory as a string.

    Args:
        data_dir: path.
        splits: dict by split of lists of texts.
        name: string.
    """
    import numpy as np
    import tensorflow_datasets as tfds

    class Prose(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "number": np.int64}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {split: self._examples(texts) for split, texts in splits.items()}

        def _examples(self, texts):
            for number, text in enumerate(texts):
                yield number, {"text": text, "number": number}

        _generate_examples = _examples

    Prose.name = name
    builder = Prose(data_dir=str(data_dir))
    builder.download_and_prepare()
    return str(builder.data_path)
