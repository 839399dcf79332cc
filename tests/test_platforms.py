"""Loading, generating, saving and exporting need nothing that only POSIX has.

The package is tested on Linux. These tests take away what Windows and macOS lack, and
impose the rules that Windows has for open files.
"""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.backend_free

# What third-party packages import for themselves is their business, so they come first.
WITHOUT_POSIX = """
import errno, os, pathlib, shutil, signal, sys, tempfile, warnings

# On Windows KerasHub brings no TensorFlow.
for name in ("tensorflow", "tensorflow_text"):
    sys.modules[name] = None

import h5py, huggingface_hub, jax, keras, safetensors, sentencepiece, tqdm

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in (
    *("fork", "getuid", "geteuid", "getpgid", "killpg", "posix_fadvise", "pread"),
    *("pwrite", "sched_getaffinity", "sysconf", "uname"),
):
    delattr(os, name)
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "alarm"):
    delattr(signal, name)

real_open, real_fsync = os.open, os.fsync


def open_like_windows(path, flags, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Windows opens no directory", path)
    return real_open(path, flags, *arguments, **options)


def fsync_like_windows(descriptor):
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="utf-8") as info:
        (flags,) = [line.split()[1] for line in info if line.startswith("flags:")]
    if not int(flags, 8) & (os.O_RDWR | os.O_WRONLY):
        raise OSError(errno.EBADF, "Windows flushes only what is open for writing")
    real_fsync(descriptor)


def open_files():
    for link in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{link}")
        except OSError:
            pass
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            yield line.split(maxsplit=5)[-1].strip()


def unless_open(function):
    def checked(path, *others, **options):
        path = os.path.realpath(path)
        for name in open_files():
            if name == path or name.startswith(path + os.sep):
                raise PermissionError(errno.EACCES, "Windows: still open", name)
        return function(path, *others, **options)

    return checked


os.open, os.fsync = open_like_windows, fsync_like_windows
for name in ("rename", "replace", "remove", "unlink", "rmdir"):
    setattr(os, name, unless_open(getattr(os, name)))
shutil._use_fd_functions = False
# Text files are not in UTF-8 there unless the call says so.
warnings.filterwarnings("error", category=EncodingWarning, module="keras_openllama")
"""

USE = """
import keras_openllama
from keras_openllama import OpenLlamaCausalLM

lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
text = lm.generate("The sea", max_new_tokens=4)
lm.save_to_preset("saved")
lm.export_to_transformers("exported")
for directory in ("saved", "exported"):
    loaded = OpenLlamaCausalLM.from_preset(directory)
assert loaded.generate("The sea", max_new_tokens=4) == text
loaded.export_to_transformers("exported", force=True)
print(sorted(os.listdir(".")))
"""


def test_generate_save_and_export_without_posix(tmp_path):
    result = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", WITHOUT_POSIX + USE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "['exported', 'saved']"
