"""Files come from the Hub once, from one commit, and errors say what to do."""

import json
import os
import socket
import subprocess
import sys

import pytest
from checkout import ROOT
from hub_server import HubServer
from huggingface_hub import constants

from keras_openllama.checkpoints.repository import Directory
from keras_openllama.loading.hub import HubRepository

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
    """A running server that this process takes for the Hub, and an empty cache."""
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


def unplug(monkeypatch):
    """From here on, nobody listens where the Hub was."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        use_endpoint(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")


def small(revision=None):
    return HubRepository(f"hf://{REPOSITORY}", revision)


def test_only_the_files_asked_for_are_downloaded_and_only_once(hub):
    assert small().file("tokenizer.model").read_bytes() == b"pieces"
    assert small().file("tokenizer.model").read_bytes() == b"pieces"
    assert hub.downloads() == ["tokenizer.model"]


def test_optional_files_are_there_or_not_without_a_download(hub):
    repository = small()
    assert repository.optional("model.safetensors") is None
    assert not hub.downloads()
    assert repository.optional("config.json").read_bytes() == b"{}"


def test_a_missing_file_is_named_with_those_that_exist(hub):
    with pytest.raises(FileNotFoundError, match=r"x\.bin is missing.*tokenizer\.model"):
        small().file("x.bin")


def test_files_are_found_by_pattern(hub):
    assert small().glob("*.json") == ["config.json"]
    assert small().glob("assets/**/*") == ["assets/more/vocabulary.spm"]


def test_all_files_are_of_the_commit_that_was_first_seen(hub):
    repository = small()
    repository.file("config.json")
    hub.publish(REPOSITORY, {**FILES, "tokenizer.model": b"other pieces"})
    assert repository.file("tokenizer.model").read_bytes() == b"pieces"
    assert small().file("tokenizer.model").read_bytes() == b"other pieces"


def test_a_branch_that_moves_between_listing_and_first_file_does_not_mix(hub):
    repository = small()
    assert "tokenizer.model" in repository.glob("*")
    hub.publish(REPOSITORY, {**FILES, "tokenizer.model": b"other pieces"})
    assert repository.file("tokenizer.model").read_bytes() == b"pieces"


@pytest.mark.parametrize("by", ["branch", "commit"])
def test_a_revision_is_used_instead_of_main(hub, by):
    commit = hub.publish(REPOSITORY, {"config.json": b"[]"}, branch="older")
    repository = small("older" if by == "branch" else commit)
    assert repository.file("config.json").read_bytes() == b"[]"


def test_a_cached_commit_needs_no_request_at_all(hub):
    small(hub.commit).file("config.json")
    hub.requests.clear()
    assert small(hub.commit).file("config.json").read_bytes() == b"{}"
    assert not hub.requests


def test_an_unknown_revision_is_named(hub):
    with pytest.raises(ValueError, match="revision='v9'"):
        small("v9").file("config.json")


# ----- Without a network


def test_offline_the_cache_is_enough(hub, monkeypatch):
    small().file("config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert small().file("config.json").read_bytes() == b"{}"
    assert small().optional("pytorch_model.bin") is None
    assert small().glob("*.json") == ["config.json"]
    assert not hub.requests


@pytest.mark.parametrize("revision", [None, "commit"])
def test_without_a_network_the_cache_is_enough(hub, monkeypatch, revision):
    revision = revision and hub.commit
    small(revision).file("config.json")
    unplug(monkeypatch)
    assert small(revision).file("config.json").read_bytes() == b"{}"


def test_when_the_hub_is_down_the_cache_is_enough(hub):
    small().file("config.json")
    hub.down = True
    assert small().file("config.json").read_bytes() == b"{}"
    with pytest.raises(OSError, match="503"):
        small().file("tokenizer.model")


def test_offline_an_error_names_file_address_and_how_to_fetch_it(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError) as error:
        small().file("tokenizer.model")
    message = str(error.value)
    assert "tokenizer.model of the repository someone/small" in message
    assert f"{hub.endpoint}/someone/small/resolve/main/tokenizer.model" in message
    assert "HF_HUB_OFFLINE" in message
    assert "hf download someone/small --local-dir small" in message
    assert not hub.requests


def test_without_a_network_an_error_comes_soon_and_names_the_revision(
    hub, monkeypatch, cache
):
    unplug(monkeypatch)
    with pytest.raises(
        OSError, match=r"cannot be reached.*hf download .*--revision v1"
    ):
        small("v1").file("tokenizer.model")
    assert not list(cache.glob("**/blobs/*"))


# ----- Denied


def test_a_repository_that_does_not_exist_is_named(hub):
    with pytest.raises(OSError, match=r"nobody/nothing.*hf auth login"):
        HubRepository("hf://nobody/nothing").file("config.json")


def test_a_gated_repository_says_how_to_get_in(hub):
    hub.gated.add(REPOSITORY)
    with pytest.raises(OSError, match=r"Accept its terms at http.*hf auth login"):
        small().file("config.json")


@pytest.mark.parametrize("handle", ["hf://", "hf://one", "hf://a/b/c", "hf://a/../b"])
def test_a_malformed_handle_is_a_value_error(hub, handle):
    with pytest.raises(ValueError, match="hf://openlm-research/open_llama_3b"):
        HubRepository(handle).optional("config.json")


# ----- Interrupted


def test_a_download_that_breaks_off_is_resumed(hub):
    name = "pytorch_model.bin"
    hub.break_after = {name: [100_000, 300_000]}
    assert small().file(name).read_bytes() == FILES[name]
    assert hub.downloads().count(name) == 3


def test_a_download_that_fails_leaves_nothing_half_written(hub, cache, monkeypatch):
    name = "pytorch_model.bin"
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.break_after = {name: [0] * 50}
    with pytest.raises(OSError, match=r"pytorch_model\.bin of .* the download failed"):
        small().file(name)
    assert not [p for p in cache.glob("**/blobs/*") if p.is_file()]
    assert not list(cache.glob(f"**/snapshots/*/{name}"))
    hub.break_after = {}
    assert small().file(name).read_bytes() == FILES[name]


def test_a_process_killed_while_downloading_leaves_a_usable_cache(hub, cache):
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
    assert small().file(name).read_bytes() == FILES[name]


# ----- Directories


def test_a_directory_answers_the_same_questions(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.json").write_text(json.dumps({}))
    directory = Directory(tmp_path)
    assert directory.file("a/x.json").read_text() == "{}"
    assert directory.glob("**/*.json") == ["a/x.json"]
    assert directory.optional("y.json") is None
    with pytest.raises(FileNotFoundError, match=rf"y\.json is missing .*{tmp_path}"):
        directory.file("y.json")
