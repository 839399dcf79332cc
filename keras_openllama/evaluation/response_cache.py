"""What a model has answered already, in a file that survives a kill."""

import hashlib
import json
import sqlite3
from pathlib import Path

from keras import ops

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.layers import lora


class Answers:
    """Answers by request, each in the file as soon as its batch is computed.

    Args:
        path: path of an SQLite file; `None` keeps nothing.
        identity: dict of what the answers depend on beside the request, such as the
            model and its dtype.

    Raises:
        ValueError: if the file holds answers of another model, or is not SQLite's.
        OSError: if it cannot be opened.
    """

    def __init__(self, path, identity):
        self._known = {}
        self._path, self._file = path, None
        if path is None:
            return
        identity = json.dumps(identity, sort_keys=True)
        try:
            self._file = _open(path)
            self._check(path, identity)
            for key, value in self._file.execute("SELECT key, value FROM answers"):
                self._known[key] = json.loads(value)
        except sqlite3.OperationalError as error:
            raise OSError(f"{path} cannot be used: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no file of answers: {error}") from error

    def __contains__(self, key):
        return key in self._known

    def get(self, key):
        """The answer to a request; `key` is one of `key_of`."""
        return self._known[key]

    def add(self, answers):
        """Keeps a batch of answers, all of them or none.

        Args:
            answers: dict of what JSON holds, by `key_of` the request.

        Raises:
            OSError: if they cannot be written.
        """
        self._known.update(answers)
        if self._file is None:
            return
        rows = [(key, json.dumps(value)) for key, value in answers.items()]
        try:
            with self._file:
                self._file.executemany(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?)", rows
                )
        except sqlite3.OperationalError as error:
            raise OSError(f"{self._path} cannot be written: {error}") from error

    def _check(self, path, identity):
        with self._file:
            self._file.execute("CREATE TABLE IF NOT EXISTS model (identity TEXT)")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT)"
            )
            row = self._file.execute("SELECT identity FROM model").fetchone()
            if row is None:
                self._file.execute("INSERT INTO model VALUES (?)", (identity,))
            elif row[0] != identity:
                raise ValueError(
                    f"{path} has the answers of another model or setting: {row[0]}. "
                    f"This is {identity}. Choose another directory, or remove the file."
                )


def key_of(*request):
    """A short name of a request, the same for the same values that JSON can hold."""
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]


def fingerprint(lm):
    """A short hash of the first values of each weight, adapters included.

    Other weights under the same name, as after more training, have another one.

    Args:
        lm: `OpenLlamaCausalLM`.

    Returns:
        A string.
    """
    alphas = [layer.lora_alpha for layer in lora.adapted_layers(lm.backbone)]
    found = hashlib.sha256(str(alphas).encode())
    for variable in lm.weights:
        found.update(f"{variable.path} {variable.shape} {variable.dtype}".encode())
        values = to_numpy(ops.cast(variable.value[:1], "float32"))
        found.update(values.tobytes())
    return found.hexdigest()[:16]


def _open(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return sqlite3.connect(path)
