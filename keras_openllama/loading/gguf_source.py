"""The source for GGUF files, see `sources`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints import gguf_model
from keras_openllama.checkpoints.files.gguf_file import read_gguf
from keras_openllama.checkpoints.gguf_tokenizer import GgufTokenizer
from keras_openllama.loading.sources import StreamedSource
from keras_openllama.loading.weight_types import stored_formats

if TYPE_CHECKING:
    from keras_openllama.checkpoints.repository import Repository
    from keras_openllama.checkpoints.tensors import StoredTensor
    from keras_openllama.quantization.policies import MatrixFormat


class GgufSource(StreamedSource):
    """A GGUF file, which contains the weights, the architecture and the tokenizer.

    Args:
        repository: The directory or repository of the file.
        name: Path of the file inside the repository.
    """

    def __init__(self, repository: Repository, name: str):
        self._repository = repository
        self._name = name

    @functools.cached_property
    def _file(self):
        return read_gguf(self._repository.file(self._name))

    @property
    def _tokenizer(self):
        return GgufTokenizer(self._file)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `OpenLlamaBackbone`, before validation."""
        return gguf_model.backbone_arguments(self._file)

    def tokenizer_proto(self) -> bytes:
        """Returns the SentencePiece model, made from the list of tokens."""
        return self._tokenizer.proto()

    def start_token_id(self) -> int:
        """Returns the id of the start token in the metadata."""
        return self._tokenizer.start_token_id()

    def end_token_ids(self) -> list[int]:
        """Returns the end tokens of the metadata; none if the tokenizer's applies."""
        return self._tokenizer.end_token_ids()

    def preprocessing(self) -> dict[str, Any]:
        """Returns the chat template, and whether a text begins with the start token."""
        template = self._tokenizer.chat_template()
        settings = {} if template is None else {"chat_template": template}
        if not self._tokenizer.adds_start_token():
            settings["add_start_token"] = False
        return settings

    def tokenizer_settings(self) -> dict[str, Any]:
        """Returns the added tokens and settings of the metadata."""
        return self._tokenizer.settings()

    def read_tensors(
        self, arguments: dict[str, Any], head: bool = True
    ) -> dict[str, StoredTensor]:
        """Lists the weights by variable path, without reading their values."""
        return gguf_model.read_tensors(self._file, arguments, head)

    def formats(self, arguments: dict[str, Any]) -> dict[str, MatrixFormat]:
        """Returns how layers are quantized in the file, by path."""
        return stored_formats(self.read_tensors(arguments))
