"""Models without weights, from which Keras's format takes names and configurations."""

from keras_openllama.loading.uninitialized import without_weights
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.models.tokenizer import OpenLlamaTokenizer


def build_task(arguments, dtype, tokenizer=None, preprocessing=None):
    """Builds a task whose variables have no values.

    Args:
        arguments: dict, as `config.validate_architecture` returns.
        dtype: string.
        tokenizer: bytes of the SentencePiece model; `None` is no preprocessor.
        preprocessing: dict, settings of the preprocessor.

    Returns:
        `OpenLlamaCausalLM`.
    """
    preprocessor = None
    if tokenizer is not None:
        settings = {
            "sequence_length": arguments["max_sequence_length"],
            **(preprocessing or {}),
        }
        preprocessor = OpenLlamaCausalLMPreprocessor(
            OpenLlamaTokenizer(tokenizer), **settings
        )
    with without_weights():
        backbone = OpenLlamaBackbone(**arguments, dtype=dtype)
        return OpenLlamaCausalLM(backbone, preprocessor, compile=False)
