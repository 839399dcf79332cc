"""Any format into any other, bit by bit; and nothing half-written when it fails."""

import itertools
import json
import os
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
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.formats import DTYPES, FORMATS
from keras_openllama.checkpoints.writer import as_bytes
from keras_openllama.convert import convert

pytestmark = pytest.mark.backend_free

SHAPE = TinyShape("grouped", 6, 2, 20, hidden_dim=60, num_layers=3, context=64)
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
    """What a file of EasyLM needs beside itself."""
    return models["transformers", "float32"] if path.is_file() else None


def tensors_of(path):
    """The bytes of all tensors, read without any code of this project."""
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
def test_there_and_back_every_bit_is_the_same(first, second, dtype, models, tmp_path):
    source = models[first, dtype]
    convert(source, tmp_path / "there", second, preset=preset_for(source, models))
    there = tmp_path / "there"
    convert(there, tmp_path / "back", first, preset=preset_for(there, models))
    assert tensors_of(there) == tensors_of(models[second, dtype])
    assert tensors_of(tmp_path / "back") == tensors_of(source)


def test_libraries_alone_read_the_same_numbers_from_each_format(models):
    path = models["transformers", "bfloat16"]
    ours = tensors_of(path)
    theirs = easylm_model.read_stream(models["easylm", "bfloat16"])
    sizes = {"query": SHAPE.num_query_heads, "key": SHAPE.num_key_value_heads}
    rows = weight_names.weights(SHAPE.num_layers)
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


def test_a_conversion_generates_what_its_source_does(models):
    text = "The import statement"
    expected = None
    for (to, dtype), path in models.items():
        if dtype == "float32" and to != "easylm":
            lm = OpenLlamaCausalLM.from_preset(str(path))
            found = lm.generate(text, max_new_tokens=8)
            assert expected in (None, found)
            expected = found


@pytest.mark.parametrize("dtype", DTYPES)
def test_kerashub_itself_loads_what_is_written(dtype, models):
    import keras_hub

    path = str(models["keras", dtype])
    lm = keras_hub.models.CausalLM.from_preset(path, dtype=dtype)
    assert isinstance(lm, OpenLlamaCausalLM)
    head = np.asarray(lm.lm_head.kernel.value)
    _, shape, data = tensors_of(models["transformers", dtype])["lm_head.weight"]
    assert np.array_equal(head, np.frombuffer(data, head.dtype).reshape(shape))


def test_a_directory_that_kerashub_wrote_is_read_in_shards_too(models, tmp_path):
    lm = OpenLlamaCausalLM.from_preset(str(models["transformers", "float32"]))
    lm.save_to_preset(tmp_path / "whole")
    by_kerashub = tensors_of(tmp_path / "whole")
    ours = tensors_of(models["keras", "float32"])
    assert ours == {k: v for k, v in by_kerashub.items() if "/optimizer/" not in k}
    lm.save_to_preset(tmp_path / "saved", max_shard_size=2e-4)
    assert len(list((tmp_path / "saved").glob("model_*.weights.h5"))) > 2
    convert(tmp_path / "saved", tmp_path / "out", "transformers")
    expected = tensors_of(models["transformers", "float32"])
    assert tensors_of(tmp_path / "out") == expected


def test_old_bin_checkpoints_are_sources_as_well(models, tmp_path):
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


# Shards, sizes, dry runs


def test_shards_are_as_large_as_allowed_and_indexed(models, tmp_path):
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
def test_a_dry_run_tells_the_sizes_and_writes_nothing(to, models, tmp_path):
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
def test_sizes_are_read(size, expected):
    assert as_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "five", "5XB", "-1GB", "0", 0, None])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="Received: max_shard_size="):
        as_bytes(size)


# Bad input


def refused(error, match, source, target, to="transformers", **options):
    """The conversion fails with that message, and leaves source and folder alone."""
    before = state(source), state(target.parent)
    with pytest.raises(error, match=match):
        convert(source, target, to, **options)
    assert (state(source), state(target.parent)) == before


def state(path):
    """Names and bytes of a file, or of all below a directory."""
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


def test_a_truncated_shard_is_refused(models, tmp_path):
    def cut(name, data):
        return data[:-100] if name.endswith(".safetensors") else data

    source = copy(models["transformers", "float16"], tmp_path / "source", cut)
    refused(ValueError, r"model\.safetensors .*get it again", source, tmp_path / "out")


def test_truncated_weights_of_keras_are_refused(models, tmp_path):
    source = tmp_path / "source"
    convert(models["transformers", "float16"], source, "keras")
    path = source / "model.weights.h5"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(ValueError, r"model\.weights\.h5 .*get it again", source, tmp_path / "out")
    path.unlink()
    refused(OSError, r"model\.weights\.h5 is missing", source, tmp_path / "out")


def test_weights_of_keras_in_another_order_of_bytes_are_refused(models, tmp_path):
    source = tmp_path / "source"
    convert(models["transformers", "float32"], source, "keras")
    with h5py.File(source / "task.weights.h5", "r+") as file:
        (name,) = [n for n in ("layers/projection/vars/0",) if n in file]
        value = file[name][()]
        del file[name]
        file[name] = value.astype(">f4")
    refused(ValueError, "byte order of another", source, tmp_path / "out")


def test_a_tokenizer_of_another_size_is_refused(models, tmp_path):
    lm = random_lm(SHAPE)  # Of 199 embeddings.
    lm.export_to_transformers(tmp_path / "source")
    path = tmp_path / "source" / "tokenizer.model"
    path.write_bytes(trained_model(True))
    refused(ValueError, "512 pieces and", tmp_path / "source", tmp_path / "out")


def test_an_index_that_names_a_missing_file_is_refused(models, tmp_path):
    source = tmp_path / "source"
    convert(
        models["transformers", "float16"], source, "transformers", max_shard_size="50KB"
    )
    name = sorted(source.glob("*.safetensors"))[1].name
    (source / name).unlink()
    refused(OSError, "names the file model-0000", source, tmp_path / "out")


def test_another_models_file_is_refused_by_its_shapes(models, tmp_path):
    other = tmp_path / "other"
    random_lm(TinyShape("other", 2, 2, 16), trained_model(True)).save_to_preset(other)
    source = models["easylm", "float32"]
    refused(ValueError, "misshapen: ", source, tmp_path / "out", preset=other)


def test_values_beyond_float16_are_refused_by_name(models, tmp_path):
    lm = random_lm(SHAPE, trained_model(True))
    path = "transformer_layer_1/self_attention/query/kernel"
    (kernel,) = (weight for weight in lm.weights if weight.path == path)
    value = np.array(kernel.value)
    value[3, 4] = 1e5
    kernel.assign(value)
    for to in FORMATS:
        lm.export_to_transformers(tmp_path / to)
        message = f"{QUERY}: it has values beyond float16's range.*bfloat16"
        refused(ValueError, message, tmp_path / to, tmp_path / "x", to, dtype="float16")
    with pytest.raises(ValueError, match=f"{path}: it has values beyond float16"):
        lm.export_to_transformers(tmp_path / "x", dtype="float16")
    assert not (tmp_path / "x").exists()


def test_unknown_names_are_refused(models, tmp_path):
    source, target = models["transformers", "float32"], tmp_path / "out"
    refused(ValueError, "Received: dtype='float8'", source, target, dtype="float8")
    refused(ValueError, "Received: to='gguf'", source, target, "gguf")
    refused(ValueError, "Received: max_shard_size=", source, target, max_shard_size="x")
    refused(ValueError, "only. Received: content=", source, target, content="params")
    for to in ("easylm", "keras"):
        match = "only. Received: max_shard_size='1GB'"
        refused(ValueError, match, source, target, to, max_shard_size="1GB")
    refused(ValueError, "exists", tmp_path / "nowhere", target)
    refused(ValueError, "Received: preset='3b'", source, target, preset="3b")
    refused(ValueError, "--preset", models["easylm", "float32"], target)


def test_a_quantised_model_is_refused(models, tmp_path):
    lm = random_lm(TinyShape("tiny", 2, 2, 16, num_layers=1), trained_model(True))
    lm.quantize("int8")
    with pytest.raises(ValueError, match="quantised"):
        lm.export_to_transformers(tmp_path / "out")
    lm.save_to_preset(tmp_path / "int8")
    refused(ValueError, "quantised model", tmp_path / "int8", tmp_path / "out")


def test_a_model_without_tokenizer_says_how_to_go_on(models, tmp_path):
    source = copy(models["transformers", "float32"], tmp_path / "source")
    (source / "tokenizer.model").unlink()
    refused(OSError, r"tokenizer\.model .*--no-tokenizer", source, tmp_path / "out")
    for to in ("transformers", "keras"):
        convert(source, tmp_path / to, to, tokenizer=False)
        assert not list((tmp_path / to).glob("**/tokenizer*"))
        assert not list((tmp_path / to).glob("**/*.spm"))
        lm = OpenLlamaCausalLM.from_preset(str(tmp_path / to), preprocessor=None)
        assert lm.backbone.num_layers == 3


def test_tensors_of_several_dtypes_need_a_choice(models, tmp_path):
    from safetensors.numpy import load_file, save_file

    source = copy(models["transformers", "float32"], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[QUERY] = tensors[QUERY].astype("float16")
    save_file(tensors, source / "model.safetensors")
    message = r"several dtypes \(29 float32, 1 float16\).*`dtype`"
    refused(ValueError, message, source, tmp_path / "out")
    convert(source, tmp_path / "out", "transformers", dtype="bfloat16")


@pytest.mark.parametrize("to", ["transformers", "keras"])
def test_the_source_is_never_the_target(to, models, tmp_path):
    source = copy(models["transformers", "float32"], tmp_path / "a")
    refused(OSError, "holds the source", source, source, to, force=True)
    refused(OSError, "holds 'a', which no", source, tmp_path, to, force=True)
    config = source / "config.json"
    refused(OSError, "a part of it", source, config, "easylm", force=True)
    link = tmp_path / "link"
    link.symlink_to(source)
    refused(OSError, "holds the source", link, source, to, force=True)
    refused(OSError, "holds the source", source, link, to, force=True)
    # Its files may be links elsewhere, as in the cache of the Hub.
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in source.iterdir():
        (linked / file.name).symlink_to(file)
    refused(OSError, "holds the source", linked, linked, to, force=True)


def test_the_preset_of_a_file_is_not_the_target(models, tmp_path):
    preset = copy(models["transformers", "float32"], tmp_path / "a")
    source, to = models["easylm", "float32"], "transformers"
    match = "holds the source"
    refused(OSError, match, source, preset, to, preset=preset, force=True)


def test_what_exists_is_replaced_only_if_forced(models, tmp_path):
    source = models["transformers", "float32"]
    convert(source, tmp_path / "out", "transformers")
    refused(FileExistsError, "--force", source, tmp_path / "out")
    convert(source, tmp_path / "out", "keras", force=True)
    assert (tmp_path / "out" / "model.weights.h5").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_place_that_cannot_be_written_to_is_named(models, tmp_path):
    source = models["transformers", "float32"]
    refused(OSError, "/proc/x/out cannot be written", source, Path("/proc/x/out"))
    (tmp_path / "file").write_text("")
    refused(OSError, "file/out cannot be written", source, tmp_path / "file" / "out")


# Memory

PEAK = r"""
import re, sys
from keras_openllama.convert import convert
source, target, to, preset = sys.argv[1:]
convert(source, target, to, preset=preset or None, tokenizer=False)
print(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("first, second", itertools.permutations(FORMATS, 2))
def test_memory_does_not_grow_with_the_model(first, second, tmp_path):
    peaks = []
    for layers in (2, 14):  # Of 26 MB each.
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
    # More layers make more names, and nothing else.
    assert peaks[1] - peaks[0] < 4 * 26e6, peaks


# Faults


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_is_too_small_is_told_before_writing(to, models, small_disk):
    source = models["transformers", "float32"]
    (small_disk / "other").write_bytes(bytes(600_000))
    refused(OSError, "no room.*bytes", source, small_disk / "out", to)


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    to, models, small_disk, monkeypatch
):
    # Something else takes the room after it was checked.
    from keras_openllama.checkpoints import writer

    def fill(directory, total):
        (small_disk / "other").write_bytes(bytes(600_000))

    monkeypatch.setattr(writer, "_check_room", fill)
    source = models["transformers", "float32"]
    with pytest.raises(OSError, match="cannot be written: No space left"):
        convert(source, small_disk / "out", to)
    assert os.listdir(small_disk) == ["other"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_limit_on_the_size_of_files_leaves_nothing(to, models, tmp_path):
    program = (
        "import resource, signal, sys\n"
        "from keras_openllama.convert import convert\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "convert(*sys.argv[1:])\n"
    )
    source = models["transformers", "float32"]
    command = [sys.executable, "-c", program, source, tmp_path / "out", to]
    result = subprocess.run(command, capture_output=True, text=True)
    assert f"{tmp_path / 'out'} cannot be written" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_conversion_leaves_no_target(to, kind, models, tmp_path):
    # The reader stops for ever at the last tensor.
    program = (
        "import sys, time\n"
        "from keras_openllama.__main__ import main\n"
        "from keras_openllama.checkpoints import writer\n"
        "calls = iter(range(25))\n"
        "real = writer._Values.__next__\n"
        "def stop(self):\n"
        "    if next(calls, None) is None:\n"
        "        print('stopped', flush=True)\n"
        "        time.sleep(600)\n"
        "    return real(self)\n"
        "writer._Values.__next__ = stop\n"
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
    if kind == signal.SIGKILL:  # What it leaves is hidden, and the next one removes it.
        assert all(path.name.startswith(".out.") for path in tmp_path.iterdir())
        convert(source, tmp_path / "out", to)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    else:
        assert not list(tmp_path.iterdir())
