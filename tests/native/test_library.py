"""Compilation of the products for the processor at hand."""

import subprocess

import native_products
import pytest

from keras_openllama.native import library as library_module
from keras_openllama.native.library import native_library

pytestmark = [pytest.mark.backend_free, native_products.needs_them]


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library.cache_clear()
    yield
    native_library.cache_clear()


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false", "gcc -I'x"])
def test_native_library_without_a_compiler_warns_and_is_none(
    compiler, monkeypatch, no_cache
):
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match="Install a C compiler"):
        assert native_library() is None


def test_native_library_of_an_old_processor_is_none(monkeypatch, no_cache):
    monkeypatch.setattr(library_module, "_instructions", lambda: {"sse2"})
    assert native_library() is None


def test_native_library_is_compiled_once(monkeypatch, no_cache):
    calls, run = [], subprocess.run
    monkeypatch.setattr(
        library_module.subprocess,
        "run",
        lambda *a, **k: calls.append(a) or run(*a, **k),
    )
    first = native_library()
    native_library.cache_clear()
    assert native_library() == first
    assert len(calls) == 1


def test_native_library_replaces_a_damaged_one(no_cache, monkeypatch, tmp_path):
    name = native_library().path.relative_to(tmp_path)
    # In another directory, since the system knows the first by its path.
    damaged = tmp_path / "other" / name
    damaged.parent.mkdir(parents=True)
    damaged.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    native_library.cache_clear()
    assert native_library().path == damaged
    assert damaged.stat().st_size


def test_native_library_takes_options_of_the_compiler_from_cc(monkeypatch, no_cache):
    monkeypatch.setenv("CC", "gcc -pipe")
    assert native_library().path.is_file()
