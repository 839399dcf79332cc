"""A file system that is too small, mounted for real."""

import contextlib
import os
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(directory):
    """Yields a function that mounts a disk of so many kilobytes, or resizes it.

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
        # Files of what has failed may be open still.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
