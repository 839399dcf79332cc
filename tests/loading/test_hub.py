"""`HubRepository` downloads files once, from one commit, with helpful errors."""

import json
import os
import socket
import subprocess
import sys

import pytest
from checkout import ROOT
from hub_server import HubServer
from huggingface_hub import constants
from tiny_models import TinyShape, random_lm

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.checkpoints.repository import LocalRepository
from keras_openllama.loading.hub import HubRepository, open_repository

pytestmark = pytest.mark.backend_free

REPOSITORY = "someone/small"
FILES = {
    "config.json": b"{}",
    "tokenizer.model": b"pieces",
    "assets/more/vocabulary.spm": b"vocabulary",
    "pytorch_model.bin": bytes(range(256)) * 4000,
    "README.md": b"read me",
}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch, cache):
    """A local server in place of the Hub, and an empty cache."""
    with HubServer().running() as server:
        use_endpoint(monkeypatch, server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        server.commit = server.publish(REPOSITORY, FILES)
        yield server


def use_endpoint(monkeypatch, endpoint):
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def disconnect(monkeypatch):
    """Replaces the server by an address on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        use_endpoint(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")


def open_small(revision=None):
    return HubRepository(f"hf://{REPOSITORY}", revision)


def test_file_downloads_only_requested_files_and_only_once(hub):
    assert open_small().file("tokenizer.model").read_bytes() == b"pieces"
    assert open_small().file("tokenizer.model").read_bytes() == b"pieces"
    assert hub.downloads() == ["tokenizer.model"]


def test_optional_returns_none_without_a_download(hub):
    repository = open_small()
    assert repository.optional("model.safetensors") is None
    assert not hub.downloads()
    assert repository.optional("config.json").read_bytes() == b"{}"


def test_file_names_a_missing_file_and_the_existing_ones(hub):
    with pytest.raises(FileNotFoundError, match=r"x\.bin is missing.*tokenizer\.model"):
        open_small().file("x.bin")


def test_glob_returns_names_that_match(hub):
    assert open_small().glob("*.json") == ["config.json"]
    assert open_small().glob("assets/**/*") == ["assets/more/vocabulary.spm"]


def test_file_uses_one_commit_for_all_files(hub):
    repository = open_small()
    repository.file("config.json")
    hub.publish(REPOSITORY, {**FILES, "tokenizer.model": b"other pieces"})
    assert repository.file("tokenizer.model").read_bytes() == b"pieces"
    assert open_small().file("tokenizer.model").read_bytes() == b"other pieces"


def test_file_uses_the_commit_that_glob_listed(hub):
    repository = open_small()
    assert "tokenizer.model" in repository.glob("*")
    hub.publish(REPOSITORY, {**FILES, "tokenizer.model": b"other pieces"})
    assert repository.file("tokenizer.model").read_bytes() == b"pieces"


@pytest.mark.parametrize("by", ["branch", "commit"])
def test_file_uses_the_revision(hub, by):
    commit = hub.publish(REPOSITORY, {"config.json": b"[]"}, branch="older")
    repository = open_small("older" if by == "branch" else commit)
    assert repository.file("config.json").read_bytes() == b"[]"


def test_file_of_a_cached_commit_sends_no_request(hub):
    open_small(hub.commit).file("config.json")
    hub.requests.clear()
    assert open_small(hub.commit).file("config.json").read_bytes() == b"{}"
    assert not hub.requests


def test_file_names_an_unknown_revision(hub):
    with pytest.raises(ValueError, match="revision='v9'"):
        open_small("v9").file("config.json")


# ----- Without a network


def test_file_uses_only_the_cache_offline(hub, monkeypatch):
    open_small().file("config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert open_small().file("config.json").read_bytes() == b"{}"
    assert open_small().optional("pytorch_model.bin") is None
    assert open_small().glob("*.json") == ["config.json"]
    assert not hub.requests


STALE = "Only cached files of .* may be older"


def test_file_uses_the_cache_without_a_network_and_warns(hub, monkeypatch):
    open_small().file("config.json")
    disconnect(monkeypatch)
    with pytest.warns(UserWarning, match=f"{STALE}.*cannot be reached"):
        assert open_small().file("config.json").read_bytes() == b"{}"


def test_file_of_a_cached_commit_needs_no_network(hub, monkeypatch, recwarn):
    open_small(hub.commit).file("config.json")
    disconnect(monkeypatch)
    assert open_small(hub.commit).file("config.json").read_bytes() == b"{}"
    assert not recwarn.list


@pytest.mark.parametrize("status", [503, 429, 408])
def test_file_uses_the_cache_if_the_hub_is_down_or_busy(hub, status):
    open_small().file("config.json")
    hub.status = status
    with pytest.warns(UserWarning, match=f"{STALE}.*{status}"):
        assert open_small().file("config.json").read_bytes() == b"{}"
    with (
        pytest.warns(UserWarning, match=STALE),
        pytest.raises(OSError, match=str(status)),
    ):
        open_small().file("tokenizer.model")


def test_from_preset_loads_a_gguf_file_of_a_repository(hub, tmp_path):
    lm = random_lm(TinyShape("tiny", 2, 2, 4, hidden_dim=8, num_layers=1))
    lm.export_to_gguf(tmp_path / "x.gguf", "f32")
    data = (tmp_path / "x.gguf").read_bytes()
    hub.publish("someone/files", {"a/x-F32.gguf": data, "y.gguf": b""})
    handle = "hf://someone/files/a/x-F32.gguf"
    loaded = OpenLlamaCausalLM.from_preset(handle, preprocessor=None)
    assert loaded.loaded_from == handle
    assert loaded.count_params() == lm.count_params()
    with pytest.raises(
        FileNotFoundError, match=r"GGUF files: y\.gguf\. Name .*y\.gguf"
    ):
        OpenLlamaCausalLM.from_preset("hf://someone/files")


def test_file_offline_raises_an_error_with_url_and_command(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError) as error:
        open_small().file("tokenizer.model")
    message = str(error.value)
    assert "tokenizer.model of the repository someone/small" in message
    assert f"{hub.endpoint}/someone/small/resolve/main/tokenizer.model" in message
    assert "HF_HUB_OFFLINE" in message
    assert "hf download someone/small --local-dir small" in message
    assert not hub.requests


def test_file_without_a_network_raises_an_error_with_the_revision(
    hub, monkeypatch, cache
):
    disconnect(monkeypatch)
    with (
        pytest.warns(UserWarning, match=STALE),
        pytest.raises(OSError, match=r"cannot be reached.*download .*--revision v1"),
    ):
        open_small("v1").file("tokenizer.model")
    assert not list(cache.glob("**/blobs/*"))


# ----- Access denied


def test_file_names_a_repository_that_does_not_exist(hub):
    with pytest.raises(OSError, match=r"nobody/nothing.*hf auth login"):
        HubRepository("hf://nobody/nothing").file("config.json")


def test_file_of_a_gated_repository_says_how_to_get_access(hub):
    hub.gated.add(REPOSITORY)
    with pytest.raises(OSError, match=r"Accept its terms at http.*hf auth login"):
        open_small().file("config.json")


@pytest.mark.parametrize("handle", ["hf://", "hf://one", "hf://a/b/c", "hf://a/../b"])
def test_open_repository_rejects_a_malformed_handle(handle):
    with pytest.raises(ValueError, match="hf://openlm-research/open_llama_3b"):
        open_repository(handle)


def test_open_repository_rejects_an_empty_revision():
    with pytest.raises(ValueError, match="must be a branch, tag or commit"):
        open_repository("hf://user/repo", revision="")


def test_open_repository_rejects_a_revision_of_a_directory(tmp_path):
    with pytest.raises(ValueError, match=r"is not one\. Received: revision='v1'"):
        open_repository(tmp_path, revision="v1")


# ----- Interrupted downloads


def test_file_resumes_an_interrupted_download(hub):
    name = "pytorch_model.bin"
    hub.break_after = {name: [100_000, 300_000]}
    assert open_small().file(name).read_bytes() == FILES[name]
    assert hub.downloads().count(name) == 3


def test_file_leaves_no_partial_file_if_the_download_fails(hub, cache, monkeypatch):
    name = "pytorch_model.bin"
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.break_after = {name: [0] * 50}
    with pytest.raises(OSError, match=r"pytorch_model\.bin of .* the download failed"):
        open_small().file(name)
    assert not [p for p in cache.glob("**/blobs/*") if p.is_file()]
    assert not list(cache.glob(f"**/snapshots/*/{name}"))
    hub.break_after = {}
    assert open_small().file(name).read_bytes() == FILES[name]


def test_file_recovers_from_a_process_that_was_killed(hub, cache):
    name = "pytorch_model.bin"
    program = (
        "import os\n"
        "from huggingface_hub import file_download\n"
        "file_download._chmod_and_move = lambda *_: os._exit(9)\n"
        "from keras_openllama.loading.hub import HubRepository\n"
        f"HubRepository('hf://{REPOSITORY}').file({name!r})\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    killed = subprocess.run([sys.executable, "-c", program], env=environment)
    assert killed.returncode == 9
    assert not list(cache.glob(f"**/snapshots/*/{name}"))
    assert open_small().file(name).read_bytes() == FILES[name]


# ----- Local directories


def test_local_repository_has_the_same_interface(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.json").write_text(json.dumps({}))
    directory = LocalRepository(tmp_path)
    assert directory.file("a/x.json").read_text() == "{}"
    assert directory.glob("**/*.json") == ["a/x.json"]
    assert directory.optional("y.json") is None
    with pytest.raises(FileNotFoundError, match=rf"y\.json is missing .*{tmp_path}"):
        directory.file("y.json")
