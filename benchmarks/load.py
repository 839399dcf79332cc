"""Memory and time of loading a sharded float16 `.bin` checkpoint, on JAX or PyTorch.

    python benchmarks/load.py                 # 3B: 6.9 GB of disk, 8 GB of memory
    python benchmarks/load.py --layers 4      # smaller
    python benchmarks/load.py --dtype float16 --backend torch   # mapped, not copied

Writes a random checkpoint with the sizes of `open_llama_3b` into a temporary directory,
then measures in new processes:

- reading the files into memory, `path.read_bytes()` one after the other;
- reading them through one buffer of 16 MB, which allocates no memory and so shows the
  cost of the files alone;
- `OpenLlamaCausalLM.from_preset(directory, dtype="bfloat16", preprocessor=None)`,
  without the imports and the initialization of the backend.

Each with a cold page cache (`posix_fadvise`) and with a warm one. Anonymous memory is
sampled every 5 ms. The goals are a peak of at most 1.15 x the model's bytes plus one
tensor and the interpreter, and at most 1.5 x the time of reading the files into memory.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BUFFER_BYTES = 16 << 20
SHARD_BYTES = 2 << 30
ALIGNMENT = 64  # as torch.save aligns storages
GOAL_MEMORY, GOAL_TIME = 1.15, 1.5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=26, help="layers (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="runs (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of weights (%(default)s)")
    parser.add_argument("--backend", default="jax", choices=("jax", "torch"))
    parser.add_argument("--directory", help="where to write (a temporary directory)")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--measure", choices=tuple(MEASURES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options)))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        write_checkpoint(Path(directory), options.layers)
        results = [
            measure(Path(directory), cache, options)
            for _ in range(options.repeats)
            for cache in ("cold", "warm")
        ]
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2))


# ----- The checkpoint


def write_checkpoint(directory, layers):
    """Writes config.json, shards in the format of `torch.save`, and their index."""
    config = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shards, size = [{}], 0
    for name, shape in shapes(config).items():
        nbytes = 2 * int(np.prod(shape))
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
        write_torch_file(directory / file, shard, seed=number)
        weight_map.update(dict.fromkeys(shard, file))
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shapes(config):
    """Names and shapes of the tensors of a LLaMA checkpoint."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    layer = {
        **{f"self_attn.{x}_proj.weight": (width, width) for x in "qkvo"},
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    return {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        **{
            f"model.layers.{i}.{name}": shape
            for i in range(config["num_hidden_layers"])
            for name, shape in layer.items()
        },
        "model.norm.weight": (width,),
        "lm_head.weight": (config["vocab_size"], width),
    }


def write_torch_file(path, tensors, seed):
    """Writes random float16 tensors in the format of `torch.save`, without PyTorch."""
    random = np.random.default_rng(seed)
    block = random.standard_normal(1 << 20, "float32").astype("float16").tobytes()
    folder = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{folder}/data.pkl", pickled(tensors))
        for key, shape in enumerate(tensors.values()):
            entry = zipfile.ZipInfo(f"{folder}/data/{key}")
            start = archive.fp.tell() + 30 + len(entry.filename) + 4
            padding = -start % ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            left = 2 * int(np.prod(shape))
            entry.file_size = left
            with archive.open(entry, "w") as file:
                while left:
                    left -= file.write(block[:left])
        archive.writestr(f"{folder}/version", b"3\n")


def pickled(tensors):
    """Pickle opcodes of a dict of float16 tensors, each with its own storage."""

    def text(value):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    items = []
    for key, (name, shape) in enumerate(tensors.items()):
        count = int(np.prod(shape))
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        storage = (
            b"(" + text("storage") + b"ctorch\nHalfStorage\n" + text(str(key))
            + text("cpu") + b"J" + struct.pack("<i", count) + b"tQ"
        )  # fmt: skip
        items.append(
            text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00"
            + numbers(shape) + numbers(strides) + b"\x89"
            + b"ccollections\nOrderedDict\n)R" + b"tR"
        )  # fmt: skip
    return b"\x80\x02}(" + b"".join(items) + b"u."


# ----- The measurements


def measure(directory, cache, options):
    """Measures with a cold or warm page cache; prints and returns the figures."""
    figures = {}
    for name in MEASURES:
        for path in directory.glob("*.bin"):
            if cache == "cold":
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                stream(path)
        command = [sys.executable, __file__, "--measure", name]
        environment = {
            **os.environ,
            "KERAS_BACKEND": options.backend,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        output = subprocess.run(
            [*command, "--directory", directory, "--dtype", options.dtype],
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
        )
        figures[name] = json.loads(output.stdout)
    load = figures["load"]
    allowed = GOAL_MEMORY * load["model"] + load["largest"]
    memory = load["peak"] - load["own"]
    gigabyte = 1e9
    size = figures["read"]["bytes"] / gigabyte
    print(f"{cache} page cache, {size:.2f} GB in files, from_preset in ", end="")
    print(f"{load['seconds']:.2f} s")
    print(
        f"  memory: model {load['model'] / gigabyte:.2f} GB, largest tensor "
        f"{load['largest'] / gigabyte:.2f} GB, interpreter "
        f"{load['own'] / gigabyte:.2f} GB, peak {load['peak'] / gigabyte:.2f} GB: "
        f"{memory / load['model']:.3f} x the model without the interpreter "
        f"({'within' if memory <= allowed else 'above'} the goal of {GOAL_MEMORY} x "
        "and one tensor)"
    )
    for name, what in (("read", "into memory"), ("stream", "through one buffer")):
        seconds = figures[name]["seconds"]
        ratio = load["seconds"] / seconds
        print(
            f"  time: reading {what} {seconds:.2f} s, from_preset {ratio:.2f} x "
            f"that ({'within' if ratio <= GOAL_TIME else 'above'} the goal of "
            f"{GOAL_TIME} x)",
            flush=True,
        )
    return {"cache": cache, **figures, "memory": memory}


def measure_read(options):
    """Measures reading the files into memory."""
    start = time.perf_counter()
    total = sum(len(path.read_bytes()) for path in files_of(options))
    return {"bytes": total, "seconds": time.perf_counter() - start}


def measure_stream(options):
    """Measures reading the files through one buffer."""
    start = time.perf_counter()
    total = sum(stream(path) for path in files_of(options))
    return {"bytes": total, "seconds": time.perf_counter() - start}


def files_of(options):
    """The files of the checkpoint, in order."""
    return sorted(Path(options.directory).glob("*.bin"))


def stream(path):
    """Reads a file through one buffer; returns its size in bytes."""
    total = 0
    buffer = bytearray(BUFFER_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def measure_load(options):
    """Measures `from_preset`."""
    import keras
    import numpy

    from keras_openllama import OpenLlamaCausalLM

    keras.ops.convert_to_numpy(keras.ops.zeros(()))
    own = anonymous_memory()
    peak = [own]
    done = threading.Event()

    def sample():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_memory())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    model = OpenLlamaCausalLM.from_preset(
        options.directory, dtype=options.dtype, preprocessor=None
    )
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    sizes = [2 * int(numpy.prod(weight.shape)) for weight in model.weights]
    return {
        "seconds": seconds,
        "own": own,
        "peak": max(peak[0], anonymous_memory()),
        "model": sum(sizes),
        "largest": max(sizes),
    }


def anonymous_memory():
    """Anonymous memory of this process, in bytes: memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon: this needs Linux 4.5 or later.")


MEASURES = {"read": measure_read, "stream": measure_stream, "load": measure_load}

if __name__ == "__main__":
    main()
