"""The Ray that a step starts on this machine takes no work from another user."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

JOIN = """
import sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(lambda: "attacked").remote()))
"""
STEP = """
import os, subprocess, sys
from nudge.components.common.clients.ray_cluster import joined_ray
with joined_ray("ingest", "", 1) as ray:
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
"""


def join(address: str, variables: dict[str, str]) -> str:
    """What a stranger's work prints. Ray keeps trying when it is refused, so that is ended."""
    command = ["timeout", "60", sys.executable, "-c", JOIN, address]
    return subprocess.run(command, env=variables, capture_output=True, text=True).stdout


@pytest.mark.long
@pytest.mark.timeout(600)
def test_only_this_process_can_use_a_local_ray() -> None:
    pytest.importorskip("ray")
    variables = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
    variables |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "200"}
    step = subprocess.Popen(
        [sys.executable, "-c", STEP], env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert step.stdin is not None
        assert step.stdout is not None
        address = step.stdout.readline().strip()
        assert address.startswith("127.0.0.1:")
        family = psutil.Process(step.pid).children(recursive=True)
        listening = {
            each.laddr.ip.removeprefix("::ffff:")  # an IPv4 address on an IPv6 socket
            for process in family
            for each in process.net_connections(kind="inet")
            if each.status == "LISTEN"
        }
        assert listening <= {"127.0.0.1", "::1"}, listening
        words = [word for process in family for word in process.cmdline()]
        folders = {each[0] for word in words if (each := re.search(r"/tmp/nudge-ray-\w+", word))}
        assert len(folders) == 1
        assert stat.S_IMODE(Path(*folders).stat().st_mode) == 0o700
        assert not [word for word in words if word.startswith(("/tmp/ray/", "--temp-dir=/tmp/ray"))]
        known = next(found for each in family if (found := each.environ().get("RAY_AUTH_TOKEN")))
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # to look at the loopback address
        right = {**variables, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": known}
        assert "attacked" in join(address, right)
        for mode in ("disabled", "token"):
            wrong = {**variables, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "0" * 64}
            assert "attacked" not in join(address, wrong), mode
        step.stdin.write("\n")
        step.stdin.flush()
        assert step.wait(120) == 0
    finally:
        if step.poll() is None:
            for process in psutil.Process(step.pid).children(recursive=True):
                process.kill()
            step.kill()
