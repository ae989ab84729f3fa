"""Why a step of a run waits for Kueue, as `nudge submit` shows it."""

from pathlib import Path

import pytest

from nudge.pipelines.cluster.runs import POLL_S
from nudge.pipelines.cluster.waiting import INTERVAL_S, PATIENCE_S, Waiting
from tests.components.train.cluster.recorded_jobs import changes, reason_of
from tests.kubernetes_api import KubernetesApi


def test_a_reason_is_shown_within_thirty_seconds() -> None:
    assert INTERVAL_S + PATIENCE_S + POLL_S <= 30


@pytest.mark.parametrize("served", ["v1beta1", "v1beta2"])
def test_the_quota_that_a_steps_pod_waits_for_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: str
) -> None:
    """On clusters that serve one version of Kueue's API only."""
    recorded = changes("workloads", "trainjob-nudge-dry-ec9d4")
    status = next(each for each in recorded if reason_of(each) == "ExceedsMaxQuota")
    node = {
        "id": "run-12-3456",
        "name": "run-12.root.train.executor(0)",
        "phase": "Pending",
        "message": "SchedulingGated: Scheduling is blocked due to non-empty scheduling gates",
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "name": "run-12-system-container-impl-3456"}
    with KubernetesApi(role="nudge-author") as api:
        other = {"v1beta1": "v1beta2", "v1beta2": "v1beta1"}[served]
        api.forget_version(f"kueue.x-k8s.io/{other}")
        # Argo's CRD is not among the schemas here.
        api._kinds["workflows", "argoproj.io/v1alpha1"] = ("argoproj.io/v1alpha1", "Workflow")
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        meta = {"name": "run-12", "labels": {"pipeline/runid": "one"}}
        api.objects["Workflow", api.namespace, "run-12"] = {
            "metadata": meta,
            "status": {"nodes": {node["id"]: node}},
        }
        workload = {
            "apiVersion": f"kueue.x-k8s.io/{served}",
            "kind": "Workload",
            "metadata": {"name": "pod-1", "ownerReferences": [{**pod, "uid": "u"}]},
            "spec": {"queueName": "small"},
        }
        api.add(workload, **status)
        reason = Waiting("one").reasons()["train"]
    assert reason.startswith(
        "waits: in the queue small: cpu never fits in flavor nudge-gpu: 32 req"
    )
