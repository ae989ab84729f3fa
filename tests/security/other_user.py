"""Acts as another user of the machine: a process with another uid, which needs root."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest

OTHER_UID = 65534

as_root = pytest.mark.skipif(
    os.getuid() != 0, reason="acting as another user of this machine needs root"
)


def as_other_user(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns, or the name of the exception it raises, as another user."""
    receiving, sending = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        os.setgroups([])
        os.setgid(OTHER_UID)
        os.setuid(OTHER_UID)
        try:
            sending.send(work(*arguments))
        except Exception as error:  # noqa: BLE001 - the test judges by its name
            sending.send(type(error).__name__)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert receiving.poll(1)
    return receiving.recv()
