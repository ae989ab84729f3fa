"""The workbench image under the contract of OpenShift AI: what its probes and its dashboard ask."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.local import processes
from tests.images.building import call, tool

PREFIX = "/notebook/some-project/some-bench"
# As the dashboard writes it.
ARGUMENTS = f"""--ServerApp.port=8888
                  --ServerApp.token=''
                  --ServerApp.password=''
                  --ServerApp.base_url={PREFIX}
                  --ServerApp.quit_button=False
                  --ServerApp.tornado_settings={{"user":"someone","hub_host":"","hub_prefix":"/projects/p"}}"""


@pytest.fixture(scope="module", params=["dashboard", "controller"])
def bench(request: pytest.FixtureRequest, docker: str, built: dict[str, str]) -> Iterator[str]:
    """The address of a running workbench: started by the dashboard, or with NB_PREFIX alone."""
    port = processes.free_port()
    options = ["--read-only", "--tmpfs=/tmp", "--user=1000760000:0", "--cap-drop=ALL"]
    options += ["--security-opt=no-new-privileges", f"--publish=127.0.0.1:{port}:8888"]
    # A new volume, as a PersistentVolumeClaim with the project's fsGroup.
    options += ["--tmpfs=/opt/app-root/src:mode=0770,gid=0", f"--env=NB_PREFIX={PREFIX}"]
    if request.param == "dashboard":
        options.append(f"--env=NOTEBOOK_ARGS={ARGUMENTS}")
    else:
        options.append("--env=JUPYTER_TOKEN=a-token")
    started = call(docker, "run", "--detach", *options, built["workbench"])
    name = started.stdout.strip()
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while not processes.answers(f"{address}{PREFIX}/api"):
            running = call(docker, "inspect", "--format={{.State.Running}}", name).stdout.strip()
            logs = call(docker, "logs", name)
            assert running == "true", logs.stderr
            assert time.monotonic() < deadline, logs.stderr
            time.sleep(0.5)
        yield f"{address}{PREFIX}"
    finally:
        call(docker, "rm", "--force", name)


def get(url: str) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Authorization": "token a-token"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_workbench_answers_its_probes_below_its_prefix(bench: str) -> None:
    status, body = get(f"{bench}/api")
    assert status == 200
    assert json.loads(body)["version"]
    # The culler asks what runs; the page itself is JupyterLab's.
    assert get(f"{bench}/api/kernels") == (200, b"[]")
    status, page = get(f"{bench}/lab")
    assert status == 200
    assert b"JupyterLab" in page
    assert get(bench.removesuffix(PREFIX) + "/api")[0] == 404


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_new_home_holds_the_walk(bench: str) -> None:
    status, body = get(f"{bench}/api/contents")
    assert status == 200
    assert [entry["name"] for entry in json.loads(body)["content"]] == ["walk.ipynb"]


def test_an_image_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'workbench'"):
        tool().build("docker", "workbenches")
