"""Models from and to checkpoints of EasyLM, which hold weights alone.

Source: https://github.com/young-geng/EasyLM.
"""

from keras_openllama.checkpoints import contents, writer
from keras_openllama.loading.load import find_source, load_task_from, origin
from keras_openllama.loading.sources import EasyLMSource
from keras_openllama.models.causal_lm import OpenLlamaCausalLM


def load(path, preset, *, dtype=None, preprocessor="auto", revision=None, **kwargs):
    """Loads a model from a checkpoint of EasyLM, tensor by tensor.

    Args:
        path: path of the file: a stream of parameters or of a whole train state, or
            Flax's plain msgpack. Which it is shows itself.
        preset: the model whose weights they are, which says what the file does not:
            architecture and tokenizer. A name of `OpenLlamaCausalLM.presets`, a
            directory or `"hf://user/repo"`; no weights are read from there.
        dtype: dtype or dtype policy; `None` is Keras's global policy.
        revision: branch, tag or commit of a repository on the Hub.
        preprocessor: `"auto"` loads the preset's; `None` loads no tokenizer.
        **kwargs: arguments of `OpenLlamaBackbone` in place of the preset's.

    Returns:
        An `OpenLlamaCausalLM`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is truncated or damaged, or holds another model's weights.

    Example:

    ```python
    lm = easylm.load("open_llama_3b_v2_easylm/params", "open_llama_3b_v2")
    ```
    """
    return load_task_from(
        OpenLlamaCausalLM,
        EasyLMSource(path, find_source(preset, revision)),
        origin(path, is_file=True),
        dtype=dtype,
        preprocessor=preprocessor,
        **kwargs,
    )


def save(lm, path, dtype="bfloat16", content="params", force=False):
    """Writes a model as a checkpoint of EasyLM, tensor by tensor.

    EasyLM loads it as `params::PATH`, `trainstate_params::PATH` or
    `flax_params::PATH`. The file takes the place of `path` when it is whole.

    Args:
        lm: `OpenLlamaCausalLM`.
        path: path of the file.
        dtype: `"bfloat16"`, `"float16"`, `"float32"`, or `None` for the model's own.
        content: `"params"` or `"trainstate_params"`, EasyLM's streams, or
            `"flax_params"`, Flax's plain msgpack.
        force: bool, whether to replace a file that exists.

    Raises:
        ValueError: for an unknown dtype or content; if a value is beyond the
            dtype's range; if the model is quantised.
        OSError: if the path exists already, or cannot be written.

    Example:

    ```python
    easylm.save(lm, "open_llama_3b_v2.msgpack")
    ```
    """
    request = writer.WriteRequest(
        path, "easylm", dtype=dtype, content=content, force=force
    )
    writer.write_model(contents.of_model(lm), request)
