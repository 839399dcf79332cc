"""What a conversion can be asked for. Imports nothing, so that `--help` is quick."""

FORMATS = ("transformers", "easylm", "keras")
DTYPES = ("float32", "bfloat16", "float16")
# What a file of EasyLM holds, in EasyLM's words, and the keys that lead to the weights.
EASYLM_CONTENTS = {
    "params": (),
    "trainstate_params": ("params", "params"),
    "flax_params": (),
}
MAX_SHARD_SIZE = "5GB"  # As transformers 4 had it.
