"""Compiled steps are read from the disk by the hash of their program."""

import os
import signal
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import pytest

from keras_openllama.planning import compilation_cache
from keras_openllama.planning.aot_compile import compile_step_ahead_of_time
from keras_openllama.planning.compilation_cache import CompilationCache, program_key
from keras_openllama.runs.recipe import preset_recipe

pytestmark = pytest.mark.backend_free

CONFIG = {
    "vocabulary_size": 64,
    "num_layers": 2,
    "num_query_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
}
MESH = {"data": 1, "fsdp": 1, "model": 1}


def compile_tiny_step(cache):
    recipe = preset_recipe("nano").replace(batch_size=2, sequence_length=8)
    return compile_step_ahead_of_time(CONFIG, recipe, MESH, jax.devices()[:1], cache)


def test_compile_step_ahead_of_time_reads_a_finished_compilation(tmp_path):
    cache = CompilationCache(tmp_path)
    first = compile_tiny_step(cache)
    (path,) = tmp_path.iterdir()
    again = compile_tiny_step(cache)
    assert (first.cached, again.cached) == (False, True)
    assert again.hlo == first.hlo and "ENTRY" in again.hlo
    assert again.peak_memory == first.peak_memory > 0
    assert again.compile_seconds == first.compile_seconds
    # A damaged file, and one of another version, is compiled and written again.
    content = path.read_bytes()
    for other in (content[:-100], zlib.compress(b'{"program": "text"}')):
        path.write_bytes(other)
        repaired = compile_tiny_step(cache)
        assert not repaired.cached and repaired.peak_memory == first.peak_memory
    assert compile_tiny_step(cache).cached


def lowered(size=4):
    return jax.jit(jnp.tanh).lower(jax.ShapeDtypeStruct((size,), "float32"))


def test_program_key_depends_on_all_that_changes_the_compilation(monkeypatch):
    devices = jax.devices()
    key = program_key(lowered(), devices)
    assert key == program_key(lowered(), devices, {})
    others = [
        program_key(lowered(5), devices),
        program_key(lowered(), [*devices, *devices]),
        program_key(lowered(), devices, {"xla_flag": "1"}),
    ]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--flag=1")
    others.append(program_key(lowered(), devices))
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    monkeypatch.setattr(compilation_cache, "_version", lambda package: "0.0.1")
    others.append(program_key(lowered(), devices))
    assert len({key, *others}) == 6


@pytest.mark.parametrize("content", [b"", b"no zlib", b"x\x9c+\xce,IU\x00\x00"])
def test_compilation_cache_ignores_a_damaged_entry(content, tmp_path):
    cache = CompilationCache(tmp_path)
    cache.save("key", {"hlo": "text"})
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    assert cache.load("key") is None


def test_compilation_cache_removes_the_least_recently_used_entry(tmp_path):
    cache = CompilationCache(tmp_path)
    entry = {"hlo": "HloModule"}  # The same for all, so that all files have one size.
    for second, key in enumerate("abc"):
        cache.save(key, entry)
        (path,) = tmp_path.glob(f"{key}.*")
        os.utime(path, (second, second))
    assert cache.load("a") == entry  # It was the oldest.
    cache.max_bytes = 3 * path.stat().st_size
    cache.save("d", entry)
    assert cache.load("b") is None
    assert all(cache.load(key) for key in "acd")


KILLED_WRITER = """
import os, signal, sys
from keras_openllama.planning.compilation_cache import CompilationCache

def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

os.fsync = kill
CompilationCache(sys.argv[1]).save("killed", {"hlo": "text"})
"""


def test_compilation_cache_removes_what_a_killed_process_left(tmp_path):
    cache = CompilationCache(tmp_path)
    cache.save("before", {})
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2 and cache.load("killed") is None
    cache.save("after", {})
    names = {path.name.partition(".")[0] for path in tmp_path.iterdir()}
    assert names == {"before", "after"}


def test_compilation_cache_reads_entries_that_it_may_not_write(monkeypatch, tmp_path):
    cache = CompilationCache(tmp_path)
    cache.save("key", {"hlo": "text"})

    def fail(*args):
        raise PermissionError

    # Root may write everywhere, so the mode of a file would not tell.
    monkeypatch.setattr(os, "utime", fail)
    assert cache.load("key") == {"hlo": "text"}


def test_compilation_cache_lies_in_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CompilationCache().directory == tmp_path / "keras_openllama" / "plans"


def test_compilation_cache_warns_once_if_entries_cannot_be_written(tmp_path, caplog):
    path = tmp_path / "file"
    path.touch()
    cache = CompilationCache(path)
    for key in ("a", "b"):
        cache.save(key, {})
    assert caplog.text.count("are not saved for the next plan") == 1
    assert "XDG_CACHE_HOME" in caplog.text and "--no-plan-cache" in caplog.text
