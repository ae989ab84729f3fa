"""Runs the tests of `on_a_device.py` in a process of their own.

PyTorch's autograd engine counts the device types once, at the first backward pass of a process, so
the second device must be registered before any other test trains.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import second_device

CASES = Path(__file__).with_name("on_a_device.py")


@pytest.mark.skipif(bool(second_device.why_not()), reason=second_device.why_not())
def test_every_path_runs_on_a_device_other_than_the_cpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", str(CASES)]
    done = subprocess.run(command, cwd=CASES.parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
