"""Programs that run on eight simulated CPU devices."""

import os
import subprocess
import sys

from checkout import ROOT


def xla_flags(devices):
    """Returns `XLA_FLAGS` of this process with a number of simulated devices."""
    added = f"--xla_force_host_platform_device_count={devices}"
    return f"{os.environ.get('XLA_FLAGS', '')} {added}".strip()


def run_on_eight_devices(program, *arguments):
    """Runs a Python program in a separate process, on JAX with eight devices.

    Args:
        program: string, its source.
        *arguments: what it finds in `sys.argv[1:]`.

    Returns:
        What it printed.

    Raises:
        AssertionError: if it fails; the message is what it wrote to stderr.
    """
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={
            **os.environ,
            "KERAS_BACKEND": "jax",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(devices=8),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
