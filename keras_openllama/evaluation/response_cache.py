"""A cache of model responses in an SQLite file."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.layers import lora
from keras_openllama.utils.types import PathLike

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM


class ResponseCache:
    """Responses by request. Each batch is committed to the file as it is added.

    Args:
        path: path of an SQLite file. `None` caches in memory only.
        identity: what determines a response besides the request, such as the model and
            its dtype. It must be serializable as JSON.

    Raises:
        ValueError: if the file holds responses of another model, or is not an SQLite
            file.
        OSError: if the file cannot be opened.

    Example:
        >>> cache = ResponseCache("responses.sqlite", {"model": "nano"})
        >>> key = request_key("loglikelihood", [1, 5, 9])
        >>> cache.add({key: -1.5})
        >>> ResponseCache("responses.sqlite", {"model": "nano"}).get(key)
        -1.5
    """

    def __init__(self, path: PathLike | None, identity: dict[str, Any]):
        self._responses = {}
        self._path, self._file = path, None
        if path is None:
            return
        identity = json.dumps(identity, sort_keys=True)
        try:
            self._file = _open(path)
            self._check(path, identity)
            for key, value in self._file.execute("SELECT key, value FROM answers"):
                self._responses[key] = json.loads(value)
        except sqlite3.OperationalError as error:
            raise OSError(f"{path} cannot be opened: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is not a response cache: {error}") from error

    def __contains__(self, key: str) -> bool:
        return key in self._responses

    def get(self, key: str) -> Any:
        """Returns the response to a request; `key` is a `request_key`."""
        return self._responses[key]

    def add(self, responses: dict[str, Any]):
        """Adds a batch of responses in one transaction.

        Args:
            responses: values that JSON can represent, by `request_key`.

        Raises:
            OSError: if the file cannot be written.
        """
        self._responses.update(responses)
        if self._file is None:
            return
        rows = [(key, json.dumps(value)) for key, value in responses.items()]
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
                    f"{path} holds responses of another model or setting: {row[0]}. "
                    f"Received: {identity}. Choose another directory, or delete the "
                    "file."
                )


def request_key(*request: Any) -> str:
    """Hashes a request, whose values JSON can represent, to 32 hexadecimal digits.

    Example:
        >>> request_key("loglikelihood", [1, 2]) == request_key("loglikelihood", (1, 2))
        True
    """
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]


def weights_fingerprint(lm: OpenLlamaCausalLM) -> str:
    """Hashes a part of each weight of a model to 16 hexadecimal digits.

    It tells weights of the same name apart, such as those of two training steps.
    Adapters are included.

    Args:
        lm: the model.

    Returns:
        The fingerprint.
    """
    alphas = [layer.lora_alpha for layer in lora.adapted_layers(lm.backbone)]
    digest = hashlib.sha256(str(alphas).encode())
    for variable in lm.weights:
        digest.update(f"{variable.path} {variable.shape} {variable.dtype}".encode())
        values = to_numpy(ops.cast(variable.value[:1], "float32"))
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]


def declared_end_tokens(lm: OpenLlamaCausalLM) -> dict[str, list[int]]:
    """Returns the end tokens of a model, for the description of a cache.

    Args:
        lm: a model with a preprocessor.

    Returns:
        A dict of `"end_token_ids"`. Empty if a text ends at the end token of the
        tokenizer only, so that the files of older versions remain valid.

    Example:
        >>> declared_end_tokens(lm)
        {}
    """
    ids = lm.end_token_ids
    is_default = ids == [lm.preprocessor.tokenizer.end_token_id]
    return {} if is_default else {"end_token_ids": ids}


def _open(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return sqlite3.connect(path)
