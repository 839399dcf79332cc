"""`convert` is bit-exact between all formats, and writes atomically."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import easylm_model
import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors
import sentencepiece
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.export_config import parse_size
from keras_openllama.checkpoints.formats import DTYPES
from keras_openllama.convert import convert
from keras_openllama.text import sentencepiece_model

pytestmark = pytest.mark.backend_free

SHAPE = TinyShape("grouped", 6, 2, 20, hidden_dim=60, num_layers=3, context=64)
FORMATS = ("transformers", "easylm", "keras")  # GGUF mixes dtypes: see test_gguf.py.
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same model in each format and dtype, by `(format, dtype)`."""
    folder = tmp_path_factory.mktemp("models")
    lm = random_lm(SHAPE, trained_model(True))
    lm.export_to_transformers(folder / "exported")
    paths = {}
    for dtype in DTYPES:
        for to in FORMATS:
            paths[to, dtype] = folder / f"{to}_{dtype}"
            convert(folder / "exported", paths[to, dtype], to, dtype=dtype)
    return paths


def preset_for(path, models):
    """Returns the preset that an EasyLM file requires."""
    return models["transformers", "float32"] if path.is_file() else None


def tensors_of(path):
    """Returns the bytes of all tensors, read without code of this package."""
    if path.is_file():
        return {
            name: (array.dtype.name, array.shape, array.tobytes())
            for name, array in easylm_model.read_stream(path).items()
        }
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            found[name] = entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])
    for file in path.glob("*.h5"):
        with h5py.File(file) as h5:
            names = []
            h5.visit(names.append)
            for name in names:
                if isinstance(h5[name], h5py.Dataset):
                    found[f"{file.name}/{name}"] = h5[name][()].tobytes()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first, second", itertools.permutations(FORMATS, 2))
def test_convert_there_and_back_is_bit_exact(first, second, dtype, models, tmp_path):
    source = models[first, dtype]
    convert(source, tmp_path / "there", second, preset=preset_for(source, models))
    there = tmp_path / "there"
    convert(there, tmp_path / "back", first, preset=preset_for(there, models))
    assert tensors_of(there) == tensors_of(models[second, dtype])
    assert tensors_of(tmp_path / "back") == tensors_of(source)


def test_other_libraries_read_the_same_values_from_each_format(models):
    path = models["transformers", "bfloat16"]
    ours = tensors_of(path)
    theirs = easylm_model.read_stream(models["easylm", "bfloat16"])
    sizes = {"query": SHAPE.num_query_heads, "key": SHAPE.num_key_value_heads}
    rows = weight_names.weight_specs(SHAPE.num_layers)
    assert len(rows) == len(ours) == len(theirs)
    for row in rows:
        dtype, shape, data = ours[row.transformers]
        assert dtype == "BF16"
        array = np.frombuffer(data, ml_dtypes.bfloat16).reshape(shape)
        other = theirs[row.easylm]
        if row.easylm_layout != weight_names.SAME:
            other = other.T
        if row.easylm_layout == weight_names.ROTARY:
            heads = sizes[row.path.split("/")[-2]]
            pairs = other.reshape(heads, -1, 2, shape[1])
            other = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], 1).reshape(shape)
        assert np.array_equal(array, other), row.path


def test_converted_models_generate_the_same_text(models):
    text = "The import statement"
    expected = None
    for (to, dtype), path in models.items():
        if dtype == "float32" and to != "easylm":
            lm = OpenLlamaCausalLM.from_preset(str(path))
            found = lm.generate(text, max_new_tokens=8)
            assert expected in (None, found)
            expected = found


@pytest.mark.parametrize("dtype", DTYPES)
def test_keras_hub_loads_converted_models(dtype, models):
    import keras_hub

    path = str(models["keras", dtype])
    lm = keras_hub.models.CausalLM.from_preset(path, dtype=dtype)
    assert isinstance(lm, OpenLlamaCausalLM)
    head = np.asarray(lm.lm_head.kernel.value)
    _, shape, data = tensors_of(models["transformers", dtype])["lm_head.weight"]
    assert np.array_equal(head, np.frombuffer(data, head.dtype).reshape(shape))


def test_convert_reads_shards_that_keras_hub_saved(models, tmp_path):
    lm = OpenLlamaCausalLM.from_preset(str(models["transformers", "float32"]))
    lm.save_to_preset(tmp_path / "one_file")
    by_kerashub = tensors_of(tmp_path / "one_file")
    ours = tensors_of(models["keras", "float32"])
    assert ours == {k: v for k, v in by_kerashub.items() if "/optimizer/" not in k}
    lm.save_to_preset(tmp_path / "saved", max_shard_size=2e-4)
    assert len(list((tmp_path / "saved").glob("model_*.weights.h5"))) > 2
    convert(tmp_path / "saved", tmp_path / "out", "transformers")
    expected = tensors_of(models["transformers", "float32"])
    assert tensors_of(tmp_path / "out") == expected


def test_convert_reads_old_bin_checkpoints(models, tmp_path):
    import torch
    from safetensors.torch import load_file

    source = tmp_path / "bin"
    source.mkdir()
    for file in models["transformers", "float16"].iterdir():
        if file.suffix != ".safetensors":
            (source / file.name).write_bytes(file.read_bytes())
    weights = load_file(models["transformers", "float16"] / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(10)
    torch.save(weights, source / "pytorch_model.bin")
    convert(source, tmp_path / "out.msgpack", "easylm")
    expected = tensors_of(models["easylm", "float16"])
    assert tensors_of(tmp_path / "out.msgpack") == expected


# ----- Shards, sizes, dry runs


def test_convert_writes_indexed_shards_of_at_most_max_shard_size(models, tmp_path):
    source = models["transformers", "float32"]
    files = convert(source, tmp_path / "out", "transformers", max_shard_size="100KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = {}
    for name, (_, _, data) in tensors_of(source).items():
        shard = index["weight_map"][name]
        assert name in safetensors.safe_open(tmp_path / "out" / shard, "np").keys()
        sizes.setdefault(shard, []).append(len(data))
    assert set(sizes) == {shard.name for shard in shards}
    assert sum(map(sum, sizes.values())) == index["metadata"]["total_size"]
    for parts in sizes.values():
        assert sum(parts) <= 100_000 or len(parts) == 1
    assert tensors_of(tmp_path / "out") == tensors_of(source)
    assert {file.name for file in files} == set(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("to", FORMATS)
def test_convert_with_dry_run_returns_sizes_and_writes_nothing(to, models, tmp_path):
    source = models["transformers", "bfloat16"]
    options = {"max_shard_size": "50KB"} if to == "transformers" else {}
    plan = convert(source, tmp_path / "out", to, dry_run=True, **options)
    assert not list(tmp_path.iterdir())
    convert(source, tmp_path / "out", to, **options)
    for file in plan:
        assert (tmp_path / "out" / file.name).stat().st_size == file.size, file.name


@pytest.mark.parametrize(
    "size, expected",
    [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), (7, 7), ("8", 8)],
)
def test_parse_size_reads_units(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "five", "5XB", "-1GB", "0", 0, None])
def test_parse_size_rejects_invalid_sizes(size):
    with pytest.raises(ValueError, match="Received: max_shard_size="):
        parse_size(size)


# ----- Invalid input


def assert_rejected(error, match, source, target, to="transformers", **options):
    """Asserts that a conversion raises an error and changes no file."""
    before = file_contents(source), file_contents(target.parent)
    with pytest.raises(error, match=match):
        convert(source, target, to, **options)
    assert (file_contents(source), file_contents(target.parent)) == before


def file_contents(path):
    """Returns names and bytes of a file, or of all files of a directory."""
    path = Path(path)
    if not path.exists() or path.is_relative_to("/proc"):
        return None
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(f): f.read_bytes() if f.is_file() else None for f in files}


def copy(directory, target, change=lambda name, data: data):
    target.mkdir()
    for file in directory.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(change(file.name, file.read_bytes()))
    return target


def test_convert_rejects_a_truncated_shard(models, tmp_path):
    def cut(name, data):
        return data[:-100] if name.endswith(".safetensors") else data

    source = copy(models["transformers", "float16"], tmp_path / "source", cut)
    assert_rejected(
        ValueError, r"model\.safetensors .*download it again", source, tmp_path / "out"
    )


def test_convert_rejects_truncated_keras_weights(models, tmp_path):
    source = tmp_path / "source"
    convert(models["transformers", "float16"], source, "keras")
    path = source / "model.weights.h5"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_rejected(
        ValueError, r"model\.weights\.h5 .*download it again", source, tmp_path / "out"
    )
    path.unlink()
    assert_rejected(OSError, r"model\.weights\.h5 is missing", source, tmp_path / "out")


def test_convert_rejects_keras_weights_in_another_byte_order(models, tmp_path):
    source = tmp_path / "source"
    convert(models["transformers", "float32"], source, "keras")
    with h5py.File(source / "task.weights.h5", "r+") as file:
        (name,) = [n for n in ("layers/projection/vars/0",) if n in file]
        value = file[name][()]
        del file[name]
        file[name] = value.astype(">f4")
    assert_rejected(
        ValueError, "the byte order of this machine", source, tmp_path / "out"
    )


def test_convert_rejects_a_tokenizer_of_another_size(models, tmp_path):
    lm = random_lm(SHAPE)  # Of 199 embeddings.
    lm.export_to_transformers(tmp_path / "source")
    path = tmp_path / "source" / "tokenizer.model"
    path.write_bytes(trained_model(True))
    assert_rejected(ValueError, "512 pieces but", tmp_path / "source", tmp_path / "out")


def test_convert_rejects_an_index_that_names_a_missing_file(models, tmp_path):
    source = tmp_path / "source"
    convert(
        models["transformers", "float16"], source, "transformers", max_shard_size="50KB"
    )
    name = sorted(source.glob("*.safetensors"))[1].name
    (source / name).unlink()
    assert_rejected(OSError, "names the file model-0000", source, tmp_path / "out")


def test_convert_rejects_weights_of_another_shape(models, tmp_path):
    other = tmp_path / "other"
    random_lm(TinyShape("other", 2, 2, 16), trained_model(True)).save_to_preset(other)
    source = models["easylm", "float32"]
    assert_rejected(ValueError, "wrong shape: ", source, tmp_path / "out", preset=other)


def test_convert_names_a_tensor_with_values_beyond_float16(models, tmp_path):
    lm = random_lm(SHAPE, trained_model(True))
    path = "transformer_layer_1/self_attention/query/kernel"
    (kernel,) = (weight for weight in lm.weights if weight.path == path)
    value = np.array(kernel.value)
    value[3, 4] = 1e5
    kernel.assign(value)
    for to in FORMATS:
        lm.export_to_transformers(tmp_path / to)
        message = f"{QUERY}: it has values beyond float16's range.*bfloat16"
        assert_rejected(
            ValueError, message, tmp_path / to, tmp_path / "x", to, dtype="float16"
        )
    with pytest.raises(ValueError, match=f"{path}: it has values beyond float16"):
        lm.export_to_transformers(tmp_path / "x", dtype="float16")
    assert not (tmp_path / "x").exists()


def test_convert_rejects_invalid_arguments(models, tmp_path):
    source, target = models["transformers", "float32"], tmp_path / "out"
    assert_rejected(
        ValueError, "Received: dtype='float8'", source, target, dtype="float8"
    )
    assert_rejected(ValueError, "Received: to='ggml'", source, target, "ggml")
    assert_rejected(
        ValueError, "Received: max_shard_size=", source, target, max_shard_size="x"
    )
    assert_rejected(
        ValueError, "only. Received: content=", source, target, content="params"
    )
    for to in ("easylm", "keras"):
        match = "only. Received: max_shard_size='1GB'"
        assert_rejected(ValueError, match, source, target, to, max_shard_size="1GB")
    for to, match in (
        ("keras", "one of int8, int4. Received: quantization='q4_0'"),
        ("gguf", "one of f32, .*Received: quantization='int4'"),
        ("easylm", "formats gguf and keras. Received: quantization='int4'"),
    ):
        name = "q4_0" if to == "keras" else "int4"
        assert_rejected(ValueError, match, source, target, to, quantization=name)
    assert_rejected(ValueError, "path of a directory", tmp_path / "nowhere", target)
    assert_rejected(ValueError, "Received: preset='3b'", source, target, preset="3b")
    assert_rejected(ValueError, "--preset", models["easylm", "float32"], target)


def test_convert_without_tokenizer_requires_tokenizer_false(models, tmp_path):
    source = copy(models["transformers", "float32"], tmp_path / "source")
    for name in ("tokenizer.model", "tokenizer.json"):
        (source / name).unlink()
    assert_rejected(
        OSError, r"tokenizer\.model .*--no-tokenizer", source, tmp_path / "out"
    )
    for to in ("transformers", "keras"):
        convert(source, tmp_path / to, to, tokenizer=False)
        assert not list((tmp_path / to).glob("**/tokenizer*"))
        assert not list((tmp_path / to).glob("**/*.spm"))
        lm = OpenLlamaCausalLM.from_preset(str(tmp_path / to), preprocessor=None)
        assert lm.backbone.num_layers == 3


def test_convert_of_several_dtypes_requires_dtype(models, tmp_path):
    from safetensors.numpy import load_file, save_file

    source = copy(models["transformers", "float32"], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[QUERY] = tensors[QUERY].astype("float16")
    save_file(tensors, source / "model.safetensors")
    message = r"several dtypes \(29 float32, 1 float16\).*`dtype`"
    assert_rejected(ValueError, message, source, tmp_path / "out")
    convert(source, tmp_path / "out", "transformers", dtype="bfloat16")


@pytest.mark.parametrize("to", ["transformers", "keras"])
def test_convert_never_replaces_its_source(to, models, tmp_path):
    source = copy(models["transformers", "float32"], tmp_path / "a")
    assert_rejected(OSError, "contains the source", source, source, to, force=True)
    assert_rejected(OSError, "holds 'a', which is", source, tmp_path, to, force=True)
    config = source / "config.json"
    assert_rejected(OSError, "a part of it", source, config, "easylm", force=True)
    link = tmp_path / "link"
    link.symlink_to(source)
    assert_rejected(OSError, "contains the source", link, source, to, force=True)
    assert_rejected(OSError, "contains the source", source, link, to, force=True)
    # Its files may be symbolic links, as in the cache of the Hub.
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in source.iterdir():
        (linked / file.name).symlink_to(file)
    assert_rejected(OSError, "contains the source", linked, linked, to, force=True)


def test_convert_never_replaces_its_preset(models, tmp_path):
    preset = copy(models["transformers", "float32"], tmp_path / "a")
    source, to = models["easylm", "float32"], "transformers"
    match = "contains the source"
    assert_rejected(OSError, match, source, preset, to, preset=preset, force=True)


def test_convert_replaces_an_existing_target_only_with_force(models, tmp_path):
    source = models["transformers", "float32"]
    convert(source, tmp_path / "out", "transformers")
    assert_rejected(FileExistsError, "--force", source, tmp_path / "out")
    convert(source, tmp_path / "out", "keras", force=True)
    assert (tmp_path / "out" / "model.weights.h5").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_convert_names_a_target_that_cannot_be_written(models, tmp_path):
    source = models["transformers", "float32"]
    assert_rejected(
        OSError, "/proc/x/out cannot be written", source, Path("/proc/x/out")
    )
    (tmp_path / "file").write_text("")
    assert_rejected(
        OSError, "file/out cannot be written", source, tmp_path / "file" / "out"
    )


# ----- Memory

PEAK = r"""
import re, sys
from keras_openllama.convert import convert
source, target, to, preset = sys.argv[1:]
convert(source, target, to, preset=preset or None, tokenizer=False)
print(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("first, second", itertools.permutations(FORMATS, 2))
def test_memory_of_convert_does_not_grow_with_the_model(first, second, tmp_path):
    peaks = []
    for layers in (2, 14):  # 26 MB each.
        shape = TinyShape("wide", 8, 8, 128, 1024, 2816, layers, 4000)
        hf = tmp_path / f"hf{layers}"
        random_lm(shape).export_to_transformers(hf, dtype="float16")
        source = hf
        if first != "transformers":
            source = tmp_path / f"source{layers}"
            convert(hf, source, first, tokenizer=False)
        preset = hf if source.is_file() else ""
        arguments = [source, tmp_path / f"out{layers}", second, preset]
        command = [sys.executable, "-c", PEAK, *map(str, arguments)]
        peaks.append(int(subprocess.check_output(command)))
    # Additional layers only need memory for their names.
    assert peaks[1] - peaks[0] < 4 * 26e6, peaks


# ----- Faults


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("to", FORMATS)
def test_convert_checks_the_free_disk_space_before_writing(to, models, small_disk):
    source = models["transformers", "float32"]
    (small_disk / "other").write_bytes(bytes(600_000))
    assert_rejected(
        OSError, "Not enough disk space.*bytes", source, small_disk / "out", to
    )


@pytest.mark.parametrize("to", FORMATS)
def test_convert_leaves_nothing_behind_if_the_disk_fills_up(
    to, models, small_disk, monkeypatch
):
    # The disk fills up after the free space was checked.
    from keras_openllama.checkpoints import writer

    def fill(directory, total):
        (small_disk / "other").write_bytes(bytes(600_000))

    monkeypatch.setattr(writer, "_check_free_space", fill)
    source = models["transformers", "float32"]
    with pytest.raises(OSError, match="cannot be written: No space left"):
        convert(source, small_disk / "out", to)
    assert os.listdir(small_disk) == ["other"]


@pytest.mark.parametrize("to", FORMATS)
def test_convert_leaves_nothing_behind_if_a_file_exceeds_its_limit(
    to, models, tmp_path
):
    source = models["transformers", "float32"]
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match=f"{tmp_path / 'out'} cannot be written"):
            convert(source, tmp_path / "out", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


INTERRUPTIONS = list(
    itertools.product(FORMATS, [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
)


@pytest.mark.parametrize(
    ("to", "kind"),
    [
        # One format for each signal; all of them with the slow tests.
        pytest.param(to, kind, marks=() if i % 4 == 0 else pytest.mark.slow)
        for i, (to, kind) in enumerate(INTERRUPTIONS)
    ],
)
def test_convert_leaves_no_target_behind_if_it_is_interrupted(
    to, kind, models, tmp_path
):
    # Reading stops at the last tensor.
    program = (
        "import sys, time\n"
        "from keras_openllama.__main__ import main\n"
        "from keras_openllama.checkpoints import writer\n"
        "calls = iter(range(25))\n"
        "real = writer._TensorValues.release_current\n"
        "def stop(self):\n"
        "    if next(calls, None) is None:\n"
        "        print('stopped', flush=True)\n"
        "        time.sleep(600)\n"
        "    return real(self)\n"
        "writer._TensorValues.release_current = stop\n"
        "sys.exit(main(['convert', *sys.argv[1:3], '--to', sys.argv[3]]))\n"
    )
    source = models["transformers", "float32"]
    command = [sys.executable, "-c", program, source, tmp_path / "out", to]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "stopped\n"
    process.send_signal(kind)
    process.communicate()
    assert process.returncode not in (0, None)
    if (
        kind == signal.SIGKILL
    ):  # A hidden directory is left, which the next one removes.
        assert all(path.name.startswith(".out.") for path in tmp_path.iterdir())
        convert(source, tmp_path / "out", to)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    else:
        assert not list(tmp_path.iterdir())


def test_convert_loads_the_tokenizer_once(tmp_path, monkeypatch):
    loads = []
    load = sentencepiece.SentencePieceProcessor.LoadFromSerializedProto
    monkeypatch.setattr(
        sentencepiece.SentencePieceProcessor,
        "LoadFromSerializedProto",
        lambda self, data: loads.append(len(data)) or load(self, data),
    )
    sentencepiece_model._load_processor.cache_clear()
    convert("open_llama_nano", tmp_path / "model", "transformers")
    assert len(loads) == 1
