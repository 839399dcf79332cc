"""Writes a model as an ONNX graph that ONNX Runtime GenAI runs without this package."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints import transformers
from keras_openllama.checkpoints.contents import contents_of_model
from keras_openllama.checkpoints.model_files import foreign_content
from keras_openllama.generation.onnx_runtime.file import GRAPH_FILE
from keras_openllama.generation.onnx_runtime.graph import (
    decoder_graph,
    padded_half_head,
)
from keras_openllama.utils.staging import staged
from keras_openllama.utils.types import PathLike

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

_GENAI_CONFIG = "genai_config.json"
# Files of the transformers format that describe its weights.
_OF_TRANSFORMERS = ("config.json", "README.md")


def export_to_onnx(model: CausalLM, path: PathLike, force: bool = False) -> None:
    """Implements `OpenLlamaCausalLM.export_to_onnx`.

    Args:
        model: `OpenLlamaCausalLM`.
        path: path of the new directory.
        force: whether to replace an existing directory that contains a model.

    Raises:
        ValueError: for dynamic RoPE scaling, or a matrix that ONNX Runtime cannot
            multiply by.
        OSError: if the path exists already, or cannot be written.
    """
    backbone = model.backbone
    if backbone.rotary_embedding.is_dynamic:
        raise ValueError(
            "A graph has the same rotary tables for all sequences, and with dynamic "
            "RoPE scaling they depend on the length of a sequence. Load the model with "
            "`rope_scaling=None` or linear scaling. Received: rope_scaling="
            f"{backbone.rope_scaling}"
        )
    contents = contents_of_model(model)
    files = transformers.output_files(contents, "float32", 1 << 62)
    with staged(path, force=force, foreign_content=foreign_content) as directory:
        description = f"OpenLLaMA, from {contents.origin or 'random weights'}"
        decoder_graph(model, backbone.max_sequence_length).save(directory, description)
        for file in files:
            if not file.tensors and file.name not in _OF_TRANSFORMERS:
                with open(directory / file.name, "wb") as target:
                    file.write(target, iter(()))
        config = json.dumps(genai_config(model), indent=2) + "\n"
        (directory / _GENAI_CONFIG).write_text(config, encoding="utf-8")


def genai_config(model: CausalLM) -> dict[str, Any]:
    """Returns the settings of ONNX Runtime GenAI for the graph of a model.

    Args:
        model: `OpenLlamaCausalLM`.

    Example:
        >>> genai_config(lm)["model"]["decoder"]["num_key_value_heads"]
        2

    Source: https://onnxruntime.ai/docs/genai/reference/config.html
    """
    backbone, start = model.backbone, 1
    if model.preprocessor is not None:
        start = model.preprocessor.tokenizer.start_token_id
    past, present = "past_key_values.%d", "present.%d"
    decoder = {
        "session_options": {},
        "filename": GRAPH_FILE,
        "hidden_size": backbone.hidden_dim,
        "head_size": 2 * padded_half_head(backbone.head_dim),
        "num_attention_heads": backbone.num_query_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "num_hidden_layers": backbone.num_layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": f"{past}.key",
            "past_value_names": f"{past}.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{present}.key",
            "present_value_names": f"{present}.value",
        },
    }
    length = backbone.max_sequence_length
    return {
        "model": {
            "type": "llama",
            "vocab_size": backbone.vocabulary_size,
            "context_length": length,
            "bos_token_id": start,
            "eos_token_id": model.end_token_ids or [2],
            "pad_token_id": 0,
            "decoder": decoder,
        },
        # The graph updates the cache in place.
        "search": {"max_length": length, "past_present_share_buffer": True},
    }
