"""A mounted file system of limited size."""

import contextlib
import os
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(directory):
    """Yields a function that mounts or resizes a disk of a size in kilobytes.

    The function returns the directory. Where it may not mount, the test is skipped.

    Args:
        directory: `pathlib.Path` of a directory that does not exist yet.
    """
    directory.mkdir()

    def mount(kilobytes):
        remount = "remount," if os.path.ismount(directory) else ""
        options = f"{remount}size={kilobytes}k"
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
        if subprocess.run(line, capture_output=True).returncode:
            pytest.skip("only root may mount a file system")
        return directory

    yield mount
    if os.path.ismount(directory):
        # Files of failed code may still be open.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
