"""What of a Hugging Face repository is in the local cache, without importing much."""

import json
from pathlib import Path

# One format is enough to load from: each is one file, or an index beside its shards.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def cache_state(handle):
    """Tells what of a preset's files is on this machine.

    Args:
        handle: string, a repository as `hf://user/repo`, or the name of a directory
            that comes with the package.

    Returns:
        `(state, size)`: `"yes"` when a whole snapshot is there, weights and
        tokenizer, so that it loads without a network; `"partly"`; `"no"`; or
        `"embedded"` for what comes with the package. The size is in bytes, and counts
        interrupted downloads as well.

    Example:
        >>> cache_state("open_llama_nano")
        ('embedded', 0)
    """
    if not handle.startswith("hf://"):
        return "embedded", 0
    from huggingface_hub import constants

    name = "models--" + handle.removeprefix("hf://").replace("/", "--")
    repository = Path(constants.HF_HUB_CACHE, name)
    blobs = repository.glob("blobs/*")
    size = sum(blob.stat().st_size for blob in blobs if blob.is_file())
    if not size:
        return "no", 0
    complete = any(_is_complete(path) for path in repository.glob("snapshots/*"))
    return ("yes" if complete else "partly"), size


def _is_complete(snapshot):
    if not (snapshot / "tokenizer.model").exists():
        return False
    for single, index in _WEIGHTS:
        if (snapshot / single).exists():
            return True
        if (snapshot / index).exists():
            shards = json.loads((snapshot / index).read_text())["weight_map"].values()
            if all((snapshot / shard).exists() for shard in set(shards)):
                return True
    return False
