"""`from_preset` of every class, for every kind of preset, and its errors."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from checkout import ROOT
from hub_server import HubServer
from tiny_models import TinyShape, assert_close, batch, in_transformers
from tokenizer_models import trained_model

from keras_openllama import (
    OpenLlamaBackbone,
    OpenLlamaCausalLM,
    OpenLlamaCausalLMPreprocessor,
    OpenLlamaTokenizer,
    presets,
)
from keras_openllama.loading import load

SHAPE = TinyShape("small", 4, 2, 16, vocabulary_size=512, context=48)
SMALL = {
    "vocabulary_size": SHAPE.vocabulary_size,
    "num_layers": SHAPE.num_layers,
    "num_query_heads": SHAPE.num_query_heads,
    "num_key_value_heads": SHAPE.num_key_value_heads,
    "head_dim": SHAPE.head_dim,
    "hidden_dim": SHAPE.hidden_dim,
    "intermediate_dim": SHAPE.intermediate_dim,
    "max_sequence_length": SHAPE.context,
}
HANDLE = "openlm-research/open_llama_3b_v2"


@pytest.fixture(scope="module")
def theirs():
    return in_transformers(SHAPE)


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory):
    """A directory in transformers format: sharded safetensors and a tokenizer."""
    path = tmp_path_factory.mktemp("transformers")
    theirs.save_pretrained(path, max_shard_size="200KB")
    (path / "tokenizer.model").write_bytes(trained_model(keep_spaces=True))
    return path


@pytest.fixture(scope="module")
def inputs():
    ids = batch(SHAPE)
    return {"token_ids": ids, "padding_mask": np.ones_like(ids, bool)}


# ----- The registry


@pytest.mark.backend_free
def test_presets_has_the_published_models():
    assert {
        "open_llama_3b",
        "open_llama_7b",
        "open_llama_13b",
        "open_llama_3b_v2",
        "open_llama_7b_v2",
        "open_llama_3b_v3",
    } <= set(presets.registry())
    descriptions = OpenLlamaCausalLM.presets
    assert set(descriptions) == set(presets.registry())
    assert descriptions["open_llama_7b_v2"]["parameters"] == 6_738_415_616
    assert descriptions["open_llama_7b_v2"]["description"]
    handles = descriptions["open_llama_3b_v3"]["handles"]
    assert handles["transformers"] == f"hf://{HANDLE}"


@pytest.mark.backend_free
def test_find_accepts_names_without_prefix():
    assert presets.find("7b_v2") is presets.find("open_llama_7b_v2")
    assert presets.find("3b_v9") is None


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "name, message",
    [
        ("open_lama_7b_v2", "Did you mean 'open_llama_7b_v2'"),
        ("13B", "Did you mean 'open_llama_13b'"),
        ("someone/model", "is 'hf://someone/model'"),
        ("/no/such/directory", "open_llama_3b_v2, .*Received: preset='/no/such/dir"),
    ],
)
def test_from_preset_of_an_unknown_name_lists_presets_and_the_closest(name, message):
    for cls in (OpenLlamaCausalLM, OpenLlamaBackbone, OpenLlamaTokenizer):
        with pytest.raises(ValueError, match=message):
            cls.from_preset(name)


@pytest.mark.backend_free
def test_from_preset_rejects_invalid_arguments(directory):
    with pytest.raises(ValueError, match="preset=3"):
        OpenLlamaCausalLM.from_preset(3)
    with pytest.raises(ValueError, match="revision='main'"):
        OpenLlamaCausalLM.from_preset(str(directory), revision="main")
    with pytest.raises(ValueError, match="preprocessor='none'"):
        OpenLlamaCausalLM.from_preset(str(directory), preprocessor="none")


@pytest.mark.backend_free
def test_registry_imports_neither_keras_nor_huggingface_hub():
    program = (
        "import sys; from keras_openllama.presets import registry; registry()\n"
        "print([m for m in ('keras', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout == "[]\n", result.stderr


# ----- Directories in transformers format


def test_from_preset_loads_a_task_with_its_tokenizer(theirs, directory, inputs):
    import torch

    lm = OpenLlamaCausalLM.from_preset(directory)
    with torch.no_grad():
        expected = theirs(torch.tensor(inputs["token_ids"])).logits
    assert_close(lm(inputs), expected)
    assert lm.preprocessor.sequence_length == SHAPE.context
    assert lm.preprocessor.tokenizer.keeps_spaces
    text = lm.generate("a word", max_new_tokens=3)
    assert text.startswith("a word")


def test_from_preset_loads_each_class(directory):
    backbone = OpenLlamaBackbone.from_preset(str(directory), dtype="bfloat16")
    assert (backbone.num_key_value_heads, backbone.head_dim) == (2, 16)
    assert backbone.token_embedding.embeddings.dtype == "bfloat16"
    tokenizer = OpenLlamaTokenizer.from_preset(str(directory), add_bos=True)
    assert tokenizer("a")[0] == tokenizer.start_token_id
    preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(str(directory))
    assert preprocessor.sequence_length == SHAPE.context
    preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(
        str(directory), sequence_length=7
    )
    assert preprocessor.sequence_length == 7


@pytest.mark.backend_free
def test_from_preset_of_a_directory_without_a_model_or_of_a_file(tmp_path):
    with pytest.raises(OSError, match=r"config\.json is missing from.*training run"):
        OpenLlamaCausalLM.from_preset(tmp_path)
    (tmp_path / "3b.msgpack").write_bytes(b"")
    with pytest.raises(ValueError, match=r"convert\.easylm\.load"):
        OpenLlamaCausalLM.from_preset(tmp_path / "3b.msgpack")


def test_from_preset_overrides_arguments_of_the_backbone(directory):
    scaling = {"rope_type": "linear", "factor": 2.0}
    lm = OpenLlamaCausalLM.from_preset(
        str(directory), rope_scaling=scaling, max_sequence_length=96
    )
    assert lm.backbone.rope_scaling == scaling
    assert lm.preprocessor.sequence_length == lm.backbone.context_length == 192


@pytest.mark.backend_free
def test_from_preset_accepts_a_preprocessor_or_none(directory, saved, tmp_path, theirs):
    own = OpenLlamaCausalLMPreprocessor(
        OpenLlamaTokenizer(trained_model(keep_spaces=False)), sequence_length=9
    )
    for path in (directory, saved):
        lm = OpenLlamaCausalLM.from_preset(str(path), preprocessor=own)
        assert lm.preprocessor is own and not own.tokenizer.keeps_spaces
    theirs.save_pretrained(tmp_path)
    assert OpenLlamaCausalLM.from_preset(tmp_path, preprocessor=None).preprocessor is (
        None
    )
    with pytest.raises(OSError, match=r"tokenizer\.model.*preprocessor=None"):
        OpenLlamaCausalLM.from_preset(tmp_path)


@pytest.mark.backend_free
def test_from_preset_rejects_a_tokenizer_with_more_pieces_than_embeddings(
    directory, tmp_path
):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    larger = trained_model(keep_spaces=True, vocab_size=600)
    (tmp_path / "tokenizer.model").write_bytes(larger)
    with pytest.raises(ValueError, match="600 pieces but the model has 512 embeddings"):
        OpenLlamaCausalLM.from_preset(tmp_path)


# ----- Directories in KerasHub format


@pytest.fixture(scope="module")
def saved(directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("keras_hub")
    OpenLlamaCausalLM.from_preset(str(directory)).save_to_preset(str(path))
    return path


def test_from_preset_loads_what_save_to_preset_saved(directory, saved, inputs):
    before = OpenLlamaCausalLM.from_preset(str(directory))
    after = OpenLlamaCausalLM.from_preset(str(saved))
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(after(inputs)),
        keras.ops.convert_to_numpy(before(inputs)),
    )
    assert after.preprocessor.sequence_length == SHAPE.context
    backbone = OpenLlamaBackbone.from_preset(str(saved), dtype="bfloat16")
    assert backbone.final_norm.weights[0].dtype == "bfloat16"
    assert OpenLlamaTokenizer.from_preset(str(saved)).keeps_spaces
    assert OpenLlamaCausalLMPreprocessor.from_preset(str(saved)).sequence_length == 48


def test_from_preset_of_a_saved_preset_accepts_overrides_and_dtype(saved, tmp_path):
    lm = OpenLlamaCausalLM.from_preset(
        str(saved), preprocessor=None, dtype="bfloat16", max_sequence_length=96
    )
    assert lm.preprocessor is None
    assert lm.backbone.max_sequence_length == 96
    assert {weight.dtype for weight in lm.weights} == {"bfloat16"}


@pytest.mark.backend_free
def test_from_preset_names_a_damaged_saved_preset(saved, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in saved.glob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "model.weights.h5"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OSError, match=rf"{copy}, in KerasHub's format"):
        OpenLlamaBackbone.from_preset(str(copy))
    weights.unlink()
    with pytest.raises(OSError, match=rf"{copy}.*model\.weights"):
        OpenLlamaBackbone.from_preset(str(copy))
    config = json.loads((copy / "config.json").read_text())
    config["registered_name"] = "other>Backbone"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"other>Backbone"):
        OpenLlamaBackbone.from_preset(str(copy))


# ----- The Hub

SMALL_PRESET = """
import dataclasses, sys
from keras_openllama import presets
known = presets.registry()
small = {small!r}
for name in ("open_llama_3b_v2", "open_llama_3b_v3"):
    known[name] = dataclasses.replace(known[name], config=small)
"""
GENERATE = """
from keras_openllama import OpenLlamaCausalLM
lm = OpenLlamaCausalLM.from_preset({preset!r}, dtype={dtype!r})
print(repr(lm.generate("a word", max_new_tokens=8)))
"""


@pytest.fixture(scope="module")
def hub_files(theirs, directory):
    """The files of a repository like the published ones: sharded float16 `.bin`."""
    import torch

    state = {name: tensor.half() for name, tensor in theirs.state_dict().items()}
    files, weight_map = {}, {}
    names = sorted(state)
    for number, part in enumerate((names[:7], names[7:]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        path = directory.parent / file
        torch.save({name: state[name] for name in part}, path)
        files[file] = path.read_bytes()
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    config = json.loads((directory / "config.json").read_text())
    # Neither is in the published repositories.
    del config["head_dim"], config["rope_parameters"]
    return {
        **files,
        "pytorch_model.bin.index.json": json.dumps(index).encode(),
        "config.json": json.dumps(config).encode(),
        "tokenizer.model": (directory / "tokenizer.model").read_bytes(),
        "README.md": b"read me",
        "generation_config.json": b"{}",
    }


@pytest.fixture
def hub(hub_files):
    with HubServer().running() as server:
        server.publish(HANDLE, hub_files)
        yield server


def run_program(hub, home, program, **variables):
    """Runs a program in a new process that uses the server as the Hub."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-c", SMALL_PRESET.format(small=SMALL) + program],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.backend_free
def test_from_preset_downloads_a_preset_once_and_then_works_offline(
    hub, hub_files, directory, tmp_path
):
    program = GENERATE.format(preset="open_llama_3b_v3", dtype="float32")
    hub.break_after = {"pytorch_model-00001-of-00002.bin": [50_000]}
    first = run_program(hub, tmp_path, program)
    assert first.returncode == 0, first.stderr
    required = {"tokenizer.model", *(n for n in hub_files if "pytorch_model" in n)}
    assert set(hub.downloads()) == required
    assert first.stderr.count("one release") == 1  # the notice of 3b_v3
    assert "pytorch_model-00001-of-00002.bin:" in first.stderr  # a progress bar

    hub.requests.clear()
    offline = run_program(hub, tmp_path, program, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert not hub.requests
    assert offline.stdout == first.stdout
    assert first.stdout.startswith("'a word")


@pytest.fixture
def in_process(hub, monkeypatch, tmp_path):
    """Makes this process use the server as the Hub."""
    from huggingface_hub import constants

    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


def small_registry(monkeypatch, **changes):
    """Gives `open_llama_3b_v2` the architecture of the small repository."""
    known = presets.registry()["open_llama_3b_v2"]
    monkeypatch.setitem(
        presets.registry(),
        "open_llama_3b_v2",
        dataclasses.replace(known, config=SMALL, **changes),
    )


@pytest.mark.backend_free
def test_from_preset_loads_a_repository(in_process, theirs, inputs):
    import torch

    lm = OpenLlamaCausalLM.from_preset(f"hf://{HANDLE}", dtype="float32")
    assert lm.backbone.rope_max_wavelength == 10000.0
    with torch.no_grad():
        expected = theirs(torch.tensor(inputs["token_ids"])).logits.numpy()
    got = keras.ops.convert_to_numpy(lm(inputs))
    assert np.abs(got - expected).max() < 1e-2 * np.abs(expected).max()  # float16
    assert "README.md" not in in_process.downloads()


@pytest.mark.backend_free
def test_from_preset_downloads_only_required_files(in_process, monkeypatch):
    small_registry(monkeypatch)
    OpenLlamaTokenizer.from_preset("3b_v2")
    assert in_process.downloads() == ["tokenizer.model"]
    OpenLlamaCausalLM.from_preset("3b_v2", load_weights=False, preprocessor=None)
    assert in_process.downloads() == ["tokenizer.model"]


@pytest.mark.backend_free
def test_from_preset_downloads_only_one_weight_format(in_process, directory, hub_files):
    safetensors = {
        path.name: path.read_bytes() for path in directory.glob("*safetensors*")
    }
    in_process.publish(HANDLE, {**hub_files, **safetensors})
    OpenLlamaBackbone.from_preset(f"hf://{HANDLE}")
    assert set(in_process.downloads()) == {"config.json", *safetensors}


@pytest.mark.backend_free
def test_from_preset_uses_the_revision(in_process, monkeypatch, hub_files):
    small_registry(monkeypatch)
    commit = in_process.publish(HANDLE, hub_files, branch="v1")
    in_process.publish(HANDLE, {"README.md": b"taken down"})
    with pytest.raises(OSError, match=r"No weights were found.*README\.md"):
        OpenLlamaBackbone.from_preset("open_llama_3b_v2")
    for revision in ("v1", commit):
        OpenLlamaBackbone.from_preset("open_llama_3b_v2", revision=revision)
    with pytest.raises(ValueError, match="revision='v2'"):
        OpenLlamaBackbone.from_preset("open_llama_3b_v2", revision="v2")


@pytest.mark.backend_free
def test_from_preset_names_a_truncated_file_of_the_cache(in_process, tmp_path):
    OpenLlamaBackbone.from_preset(f"hf://{HANDLE}")
    name = "pytorch_model-00002-of-00002.bin"
    shard = next((tmp_path / "cache").glob(f"**/snapshots/*/{name}")).resolve()
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{name}.*delete {shard}"):
        OpenLlamaBackbone.from_preset(f"hf://{HANDLE}")
    shard.unlink()
    OpenLlamaBackbone.from_preset(f"hf://{HANDLE}")


@pytest.mark.backend_free
def test_from_preset_rejects_the_tokenizer_of_another_version(
    in_process, monkeypatch, hub_files
):
    small_registry(monkeypatch)
    v1 = trained_model(keep_spaces=False)
    in_process.publish(HANDLE, {**hub_files, "tokenizer.model": v1})
    with pytest.raises(ValueError, match=r"tokenizer\.model merges runs of spaces"):
        OpenLlamaCausalLM.from_preset("open_llama_3b_v2")
    OpenLlamaCausalLM.from_preset(f"hf://{HANDLE}")  # Which has no expected version.


def git_lfs_pointers(source, directory):
    """Replaces each file of a model in turn by a Git LFS pointer; yields its path."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        shutil.copytree(source, directory)
        pointer = directory / path.relative_to(source)
        pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
        yield pointer
        shutil.rmtree(directory)


@pytest.mark.backend_free
@pytest.mark.parametrize("form", ["transformers", "sharded", "Keras"])
def test_from_preset_names_files_that_are_git_lfs_pointers(
    form, directory, saved, tmp_path
):
    source = {"sharded": directory, "Keras": saved}.get(form, tmp_path / "exported")
    if form == "transformers":
        model = OpenLlamaCausalLM.from_preset(str(saved))
        model.export_to_transformers(source)
        (source / "README.md").unlink()
    for pointer in git_lfs_pointers(source, tmp_path / "model"):
        with pytest.raises(ValueError, match=f"{pointer.name}.* is a Git LFS pointer"):
            OpenLlamaCausalLM.from_preset(str(tmp_path / "model"))


@pytest.mark.backend_free
def test_from_preset_loads_a_repository_in_keras_hub_format(in_process, saved, inputs):
    files = {
        str(path.relative_to(saved)): path.read_bytes()
        for path in saved.rglob("*")
        if path.is_file()
    }
    in_process.publish("someone/saved", {**files, "README.md": b""})
    lm = OpenLlamaCausalLM.from_preset("hf://someone/saved")
    local = OpenLlamaCausalLM.from_preset(str(saved))
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(lm(inputs)),
        keras.ops.convert_to_numpy(local(inputs)),
    )
    assert "README.md" not in in_process.downloads()


@pytest.mark.backend_free
def test_from_preset_without_network_and_cache_names_the_url(in_process, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    url = f"{in_process.endpoint}/{HANDLE}/resolve/main"
    with pytest.raises(OSError, match=rf"{url}/tokenizer\.model.*hf download"):
        OpenLlamaCausalLM.from_preset("open_llama_3b_v2")
    with pytest.raises(OSError, match=rf"{url}/pytorch_model.*hf download"):
        OpenLlamaCausalLM.from_preset("open_llama_3b_v2", preprocessor=None)


@pytest.mark.backend_free
def test_from_preset_warns_once_of_3b_v3(in_process):
    load._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="one release") as warnings:
        for _ in range(2):
            OpenLlamaTokenizer.from_preset("open_llama_3b_v3")
    assert len([w for w in warnings if "one release" in str(w.message)]) == 1
    assert warnings[0].filename == __file__
