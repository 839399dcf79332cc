"""Choices for an export. Imports nothing, so that `--help` is fast."""

FORMATS = ("transformers", "easylm", "keras", "gguf")
DTYPES = ("float32", "bfloat16", "float16")
# The kinds of EasyLM checkpoint, by EasyLM's names, and the keys of the nested dict
# under which each stores the weights.
EASYLM_CONTENTS = {
    "params": (),
    "trainstate_params": ("params", "params"),
    "flax_params": (),
}
# The quantizations of Keras's format.
KERAS_QUANTIZATIONS = ("int8", "int4")
# The types of GGUF that can be written.
GGUF_QUANTIZATIONS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
MAX_SHARD_SIZE = "5GB"  # The default of transformers 4.
