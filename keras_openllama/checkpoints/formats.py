"""Choices for an export. Imports nothing, so that `--help` is fast."""

FORMATS = ("transformers", "easylm", "keras")
DTYPES = ("float32", "bfloat16", "float16")
# The kinds of EasyLM checkpoint, by EasyLM's names, and the keys of the nested dict
# under which each stores the weights.
EASYLM_CONTENTS = {
    "params": (),
    "trainstate_params": ("params", "params"),
    "flax_params": (),
}
MAX_SHARD_SIZE = "5GB"  # The default of transformers 4.
