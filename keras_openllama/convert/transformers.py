"""Models in the format of transformers, loaded into ours."""

import json
import sys

import numpy as np

from keras_openllama.convert import weight_table
from keras_openllama.convert.building import fill, finish
from keras_openllama.convert.casting import value_for
from keras_openllama.convert.checkpoint import open_checkpoint
from keras_openllama.convert.stored import ReadAhead

_PROGRESS_BAR_BYTES = 1 << 30
_MAX_LISTED = 20
# Settings of transformers that our network has no counterpart for, and the values with
# which they change nothing.
_WITHOUT_COUNTERPART = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
_REQUIRED = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
}


def read_config(path):
    """Reads a `config.json`.

    Raises:
        ValueError: if it is not a JSON object.
    """
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return config


def backbone_arguments(config, path="config.json"):
    """Arguments of `OpenLlamaBackbone` for a `config.json` of transformers.

    Args:
        config: dict, as `read_config` returns.
        path: where it is from, for messages.

    Returns:
        Dict of keyword arguments.

    Raises:
        ValueError: if a setting is missing, or cannot be represented here.

    Example:

    ```python
    OpenLlamaBackbone(**backbone_arguments(read_config(path)))
    ```

    Source: `LlamaConfig` of transformers, whose defaults stand in for what is absent.
    """
    for name, allowed in _WITHOUT_COUNTERPART.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path} sets {name}={config[name]!r}, which OpenLLaMA's network does "
                f"not have; {name} may be {' or '.join(map(repr, allowed))}."
            )
    missing = [name for name in _REQUIRED.values() if name not in config]
    if missing:
        raise ValueError(f"{path} does not set {', '.join(missing)}.")
    arguments = {ours: config[theirs] for ours, theirs in _REQUIRED.items()}
    heads = arguments["num_query_heads"]
    wavelength, scaling = _rope(config, path)
    arguments.update(
        num_key_value_heads=_or_default(config, "num_key_value_heads", heads),
        head_dim=_or_default(config, "head_dim", None),
        rope_max_wavelength=wavelength,
        rope_scaling=scaling,
        layer_norm_epsilon=_or_default(config, "rms_norm_eps", 1e-6),
        max_sequence_length=_or_default(config, "max_position_embeddings", 2048),
        initializer_std=_or_default(config, "initializer_range", 0.02),
    )
    return arguments


def _or_default(config, name, default):
    value = config.get(name)
    return default if value is None else value


def _rope(config, path):
    """Base of the rotary frequencies, and our `rope_scaling`."""
    # transformers 5 writes `rope_parameters`, base included; before, it was
    # `rope_theta` and `rope_scaling`, whose "rope_type" once was called "type".
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    wavelength = settings.get("rope_theta", config.get("rope_theta"))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        scaling = None
    elif kind in ("linear", "dynamic"):
        scaling = {"rope_type": kind, "factor": settings.get("factor")}
    else:
        raise ValueError(
            f"{path} sets the RoPE scaling {settings}, of which only the types "
            "'linear' and 'dynamic' are supported here."
        )
    return 10000.0 if wavelength is None else float(wavelength), scaling


class Weights:
    """The weights of a checkpoint, for one model that was built without any.

    Use as a context manager around the building of the model: the files are checked
    before it, and read from the disk meanwhile.

    Args:
        repository: `hub.Directory` or `hub.HubRepository`.

    Raises:
        OSError: if a file is missing, or cannot be fetched or opened.
        ValueError: if a file is damaged.

    Example:

    ```python
    with Weights(hub.Directory(path)) as weights:
        with without_weights() as variables:
            model = OpenLlamaBackbone(**arguments)
        weights.fill(model, variables)
    ```
    """

    def __init__(self, repository):
        self._repository = repository
        self._tensors = _base_names(open_checkpoint(repository))
        self._ahead = ReadAhead(self._tensors.values())

    def __enter__(self):
        self._ahead.__enter__()
        return self

    def __exit__(self, *error):
        self._ahead.__exit__(*error)

    def fill(self, model, variables, tied=False):
        """Puts each tensor into its variable, one at a time.

        At any moment there is at most one tensor in memory beside the model's own.

        Args:
            model: `OpenLlamaBackbone` or `OpenLlamaCausalLM`.
            variables: the list that `without_weights` yielded.
            tied: bool, whether the head's weights are those of the embedding.

        Raises:
            ValueError: if tensors are missing, unexpected or of the wrong shape; the
                message lists them.
        """
        targets = _match(model, self._tensors, self._repository, tied)
        with _progress(sum(stored.nbytes for stored in self._tensors.values())) as bar:
            for stored in self._ahead:
                for variable in targets.get(id(stored), ()):
                    fill(variable, _value(variable, stored))
                stored.drop()
                bar.update(stored.nbytes)
        finish(model, variables)


def _value(variable, stored):
    try:
        return value_for(variable, stored.array())
    except ValueError as error:
        raise ValueError(f"{stored.name} in {stored.file.path}: {error}.") from error


def _base_names(tensors):
    """A checkpoint of `LlamaModel` alone has names without `model.`."""
    if "embed_tokens.weight" not in tensors:
        return tensors
    return {f"model.{name}": stored for name, stored in tensors.items()}


def _match(model, tensors, repository, tied):
    """The variables that each tensor fills, by the tensor's `id`.

    Raises where a variable or a tensor is left over, or a shape differs.
    """
    own = {weight.path: weight for weight in model.weights}
    has_head = weight_table.HEAD.path in own
    rows = weight_table.weights(_num_layers(model), head=has_head)
    unnamed = set(own) ^ {row.path for row in rows}
    if unnamed:
        raise ValueError(
            "These weights of the model are not those of an OpenLLaMA network without "
            f"adapters or quantisation: {_listed(unnamed)}. Load it as floating-point "
            "numbers, and call `enable_lora` or `quantize` afterwards."
        )
    left = {name: t for name, t in tensors.items() if not _is_buffer(name)}
    if not has_head:  # A backbone alone has no use for it.
        left.pop(weight_table.HEAD.transformers, None)
    elif tied:
        _tie_head(left)
    targets, missing, misshapen = {}, [], []
    for row in rows:
        variable, stored = own[row.path], left.pop(row.transformers, None)
        expected = tuple(variable.shape)
        if stored is None:
            missing.append(row.transformers)
        elif stored.shape != expected:
            misshapen.append(
                f"{row.transformers} has {stored.shape} where {expected} is expected"
            )
        else:
            targets.setdefault(id(stored), []).append(variable)
    problems = {"missing": missing, "unexpected": left, "misshapen": misshapen}
    found = [f"{what}: {_listed(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"The weights in {repository} are not those of this model. "
            f"{'; '.join(found)}. Check that config.json (or the preset, and any "
            "argument that overrides it) belongs to the weights."
        )
    return targets


def _num_layers(model):
    return getattr(model, "backbone", model).num_layers


def _is_buffer(name):
    """Old versions saved the rotary frequencies, which follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _tie_head(tensors):
    """Lets the head be read from the embedding."""
    embedding = tensors.get(weight_table.EMBEDDING.transformers)
    head = tensors.setdefault(weight_table.HEAD.transformers, embedding)
    if embedding is None or head is None:
        tensors.pop(weight_table.HEAD.transformers)
    elif not np.array_equal(embedding.array(), head.array()):
        raise ValueError(
            f"config.json sets tie_word_embeddings, and {head.file.path} has a "
            f"{head.name} that differs from {embedding.name}. Set it to false to load "
            "both."
        )


def _listed(names):
    names = list(names)
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _progress(total):
    """A progress bar where loading takes a while and somebody watches."""
    from tqdm import tqdm

    return tqdm(
        desc="Loading weights",
        total=total,
        unit="B",
        unit_scale=True,
        disable=total < _PROGRESS_BAR_BYTES or not sys.stderr.isatty(),
    )
