"""Arguments of the harness's own model `hf`, for the model `keras_openllama`.

Source: `lm_eval.models.huggingface.HFLM` of lm-evaluation-harness 0.4.13.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from keras_openllama import presets
from keras_openllama.config import START_TOKEN_ID
from keras_openllama.loading.hub import HUB_PREFIX
from keras_openllama.utils.validation import raise_invalid

# Arguments that mean the same here under another name.
_RENAMED = {
    "pretrained": "preset",
    "peft": "adapters",
    "add_bos_token": "add_bos",
    "torch_dtype": "dtype",
}
# Arguments that do not change results here: no code of a repository is run, sequences
# that are too long are always truncated, and attention has one result.
_IGNORED_BOOLEANS = (
    *("trust_remote_code", "use_fast_tokenizer", "truncation", "logits_cache"),
    *("low_cpu_mem_usage", "use_safetensors", "use_cache"),
)
_IGNORED = ("attn_implementation", "offload_folder")


class _Refusal(NamedTuple):
    """Values of an argument that mean what is done here, and the remedy for others."""

    allowed: tuple[Any, ...]
    remedy: str


_MESH = (
    "Pass the sizes of a device mesh instead (JAX), such as fsdp=4, or model=4 for "
    "tensor parallelism."
)
_FLOAT = (
    "Load the floating-point model with dtype=bfloat16, or quantize it with "
    "quantization=int8 or quantization=int4."
)
_REASONING = "These models do not separate their reasoning. Remove it."
_REFUSED = {
    "backend": _Refusal(("default", "causal"), "The models are causal. Remove it."),
    "subfolder": _Refusal(("",), "Download the folder and pass its path as preset."),
    "device_map": _Refusal(("auto", "cpu", "cuda", "cuda:0", "mps"), _MESH),
    "parallelize": _Refusal((False,), _MESH),
    "tp_plan": _Refusal((), _MESH),
    "max_memory_per_gpu": _Refusal((), _MESH),
    "max_cpu_memory": _Refusal((), "Weights are not offloaded. " + _MESH),
    "softmax_dtype": _Refusal(
        ("float32",), "The softmax is always computed in float32. Remove it."
    ),
    "mixed_precision_dtype": _Refusal((), "Pass dtype=mixed_bfloat16 instead."),
    "prefix_token_id": _Refusal(
        (START_TOKEN_ID,), "Texts are predicted from the start token. Remove it."
    ),
    "delta": _Refusal((), "Add the delta to the weights first, and load the result."),
    "autogptq": _Refusal((False,), _FLOAT),
    "gptqmodel": _Refusal((False,), _FLOAT),
    "load_in_8bit": _Refusal((False,), _FLOAT),
    "load_in_4bit": _Refusal((False,), _FLOAT),
    "quantization_config": _Refusal((), _FLOAT),
    "gguf_file": _Refusal(
        (), "Pass the file as the preset: its path, or hf://user/repo/file.gguf."
    ),
    "think_end_token": _Refusal((), _REASONING),
    "enable_thinking": _Refusal((False,), _REASONING),
    "chat_template_args": _Refusal(
        ({},), "Set the variables in the template itself, with {% set … %}."
    ),
    "cache_dir": _Refusal((), "Set the environment variable HF_HUB_CACHE instead."),
    "local_files_only": _Refusal(
        (False,), "Set the environment variable HF_HUB_OFFLINE=1 instead."
    ),
    "token": _Refusal((), "Set the environment variable HF_TOKEN instead."),
}


def translate_hf_arguments(
    given: Mapping[str, Any], own: Collection[str]
) -> dict[str, Any]:
    """Translates arguments of `hf` to those of `OpenLlamaLM`.

    Args:
        given: arguments that are not among `own`.
        own: names of the arguments of `OpenLlamaLM`.

    Returns:
        Arguments by names of `own`. Arguments without an effect on results are dropped.

    Raises:
        ValueError: if an argument is unknown, or is one of `hf` that is not supported.

    Example:
        >>> given = {"pretrained": "user/repo", "parallelize": False}
        >>> translate_hf_arguments(given, own=["preset"])
        {'preset': 'hf://user/repo'}
    """
    translated = {}
    for name, value in given.items():
        if name in _RENAMED:
            if value is not None:
                translated[_RENAMED[name]] = value
        elif name in _REFUSED:
            _check_supported(name, value)
        elif name in _IGNORED_BOOLEANS:
            if value not in (True, False, None):
                raise_invalid(name, value, "True or False")
        elif name not in _IGNORED:
            raise _unknown_argument(name, own)
    for name in ("preset", "adapters"):
        if isinstance(translated.get(name), str):
            translated[name] = with_hub_prefix(translated[name])
    return translated


def with_hub_prefix(name: str) -> str:
    """Adds `hf://` to the name of a repository on the Hub, as `hf` takes it.

    Example:
        >>> with_hub_prefix("user/repo"), with_hub_prefix("open_llama_nano")
        ('hf://user/repo', 'open_llama_nano')
    """
    is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    if is_repository and not presets.find(name) and not Path(name).exists():
        return HUB_PREFIX + name
    return name


def _check_supported(name, value):
    allowed, remedy = _REFUSED[name]
    if value is not None and value not in allowed:
        raise ValueError(
            f"`{name}` is an argument of the harness's model `hf` that this model does "
            f"not support. {remedy} Received: {name}={value!r}"
        )


def _unknown_argument(name, own):
    of_hf = sorted([*_RENAMED, *_IGNORED_BOOLEANS, *_IGNORED, *_REFUSED])
    close = difflib.get_close_matches(name, [*own, *of_hf], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"The model keras_openllama has no argument {name!r} (model_args).{hint} Its "
        f"arguments are {', '.join(own)}; of those of `hf` it understands "
        f"{', '.join(of_hf)}."
    )


def accept_hf_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Decorates a constructor so that it takes the arguments of `hf` too.

    Args:
        init: the constructor, with keyword arguments of its own.

    Returns:
        The decorated constructor. It raises a `ValueError` for unknown arguments, or if
        an argument is given under both of its names.
    """
    signature = inspect.signature(init)
    own = [name for name in signature.parameters if name != "self"]

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        given = {name: kwargs.pop(name) for name in list(kwargs) if name not in own}
        bound = signature.bind_partial(self, *args, **kwargs).arguments
        for name, value in translate_hf_arguments(given, own).items():
            if bound.get(name) is not None:
                raise ValueError(
                    f"`{name}` is given twice, under two names. Pass it once. "
                    f"Received: {name}={bound[name]!r} and {value!r}"
                )
            bound[name] = value
        return init(**bound)

    return wrapper
