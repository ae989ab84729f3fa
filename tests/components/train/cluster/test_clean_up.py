"""What a launch that ends early leaves in the handover folder."""

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.spending.budget import OverBudget
from nudge.components.train.cluster import launch as launching
from nudge.components.train.cluster import trainjob
from nudge.components.train.cluster.launch import launch
from nudge.components.train.settings import TrainSettings
from tests.components.train.cluster.test_launch import NAME, fails, handover_of, sends_a_model
from tests.components.train.conftest import outputs
from tests.kubernetes_api import KubernetesApi

ENDS: dict[str, type[UserError]] = {"permanent": UserError, "budget": OverBudget}
"""The errors of the ranks in the tests of `launch`."""


def leaves_checkpoints(tmp_path: Path) -> Path:
    """The folder of the job, in which a rank has written a checkpoint."""
    folder = tmp_path / "shared" / NAME
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step-3").write_text("x")
    return folder


@pytest.mark.parametrize("end", ["refused", "cancelled", "late", "permanent", "budget"])
def test_the_folder_of_a_job_that_ended_early_is_removed(
    api: KubernetesApi, settings: TrainSettings, tokens: Path, tmp_path: Path, end: str
) -> None:
    """Only checkpoints stay, where a retry can resume from them."""
    (tmp_path / "shared").mkdir()
    sent = threading.Event()
    # Only where it is meant: on a slow machine a deadline of seconds would come before the SIGTERM,
    # which would then end the tests.
    hours = 0.0006 if end == "late" else settings.cluster.deadline_hours
    cluster = dataclasses.replace(settings.cluster, deadline_hours=hours)

    def control(job: dict[str, Any]) -> None:
        assert handover_of(job).read("tokens")
        leaves_checkpoints(tmp_path)
        sent.set()
        if end in ENDS:
            fails(api, ENDS[end].status)(job)
        if end == "cancelled":
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)

    api.on_change(launching.ENGINES[settings.launcher].KIND.name, control)
    if end == "refused":
        api.forbid("create", settings.launcher + "s")
    with pytest.raises((UserError, SystemExit)) as ended:
        launch(
            dataclasses.replace(settings, cluster=cluster), {"tokens": tokens, **outputs(tmp_path)}
        )
    assert type(ended.value) is ENDS.get(end, type(ended.value))
    assert sent.is_set() is (end != "refused")
    left = sorted(path.name for path in (tmp_path / "shared").glob("*/*"))
    assert left == ([] if end in ("refused", "permanent") else ["checkpoints"])


def test_the_folder_of_an_abandoned_job_is_removed_by_a_later_launch(
    api: KubernetesApi, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    abandoned, running = (tmp_path / "shared" / f"nudge-{n}-0123abcd" for n in ("a", "b"))
    for folder in (abandoned, running):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "one").write_text("x")
        for each in (folder / "checkpoints" / "one", folder / "checkpoints"):
            os.utime(each, (1, 1))
    spec = {"runtimeRef": {"name": "r"}}
    kind = {"apiVersion": trainjob.KIND.api_version, "kind": "TrainJob"}
    api.add({**kind, "metadata": {"name": running.name}, "spec": spec})

    def control(job: dict[str, Any]) -> None:
        if job["metadata"]["name"] == NAME:
            sends_a_model(api, tmp_path / "made")(job)

    if settings.launcher == "trainjob":
        api.forget_version("ray.io/v1")  # as on a cluster without KubeRay
    api.on_change(launching.ENGINES[settings.launcher].KIND.name, control)
    launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [running.name]
