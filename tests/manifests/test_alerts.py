"""The alerts: Prometheus's own promtool reads them and says when they fire."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests.test_manifests import of_kind

DAY_MINUTES = 24 * 60
FAILED = "train-and-serve-7xk2p-system-container-impl-1"


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool: Debian's package prometheus has it")
    return found


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """The rules as Prometheus reads them, without the object around them."""
    made = {yaml.safe_dump(rule["spec"], sort_keys=False) for rule in of_kind("PrometheusRule")}
    assert len(made) == 1
    (tmp_path / "rules.yaml").write_text(made.pop())
    return tmp_path / "rules.yaml"


def fires(
    promtool: str, rules: Path, alert: str, series: dict[str, str], expected: dict[str, list[str]]
) -> None:
    """Check at each time which values of the label ``pod`` or ``deployment`` an alert names."""
    annotations = {
        rule["alert"]: (rule["labels"], rule["annotations"])
        for group in yaml.safe_load(rules.read_text())["groups"]
        for rule in group["rules"]
    }
    labels, written = annotations[alert]

    def one(name: str) -> dict[str, Any]:
        key = "deployment" if alert == "NudgeServedModelDown" else "pod"
        texts = {
            what: text.replace(f"{{{{ $labels.{key} }}}}", name).replace(
                "{{ $labels.namespace }}", "nudge"
            )
            for what, text in written.items()
        }
        return {
            "exp_labels": {key: name, "namespace": "nudge", **labels},
            "exp_annotations": texts,
        }

    test = {
        "rule_files": [rules.name],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": k, "values": v} for k, v in series.items()],
                "alert_rule_test": [
                    {"eval_time": at, "alertname": alert, "exp_alerts": [one(n) for n in names]}
                    for at, names in expected.items()
                ],
            }
        ],
    }
    (rules.parent / "test.yaml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        [promtool, "test", "rules", "test.yaml"], cwd=rules.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_reads_them(promtool: str, rules: Path) -> None:
    done = subprocess.run(
        [promtool, "check", "rules", "--lint=all", "--lint-fatal", str(rules)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 rules found" in done.stdout


def test_a_failed_step_is_told_for_a_day_and_nobody_elses(promtool: str, rules: Path) -> None:
    names = (FAILED, "somebody-elses-job")
    fires(
        promtool, rules, "NudgeRetrainingFailed",
        {
            **{
                f'kube_pod_status_phase{{namespace="nudge",pod="{name}",phase="Failed",uid="1"}}':
                    f"0x9 1x{2 * DAY_MINUTES}"
                for name in names
            },
            **{
                f'kube_pod_created{{namespace="nudge",pod="{name}",uid="1"}}':
                    f"0x{2 * DAY_MINUTES}"
                for name in names
            },
        },
        {"5m": [], "30m": [FAILED], "23h": [FAILED], "25h": []},
    )  # fmt: skip


def test_a_step_that_waits_is_told_after_an_hour(promtool: str, rules: Path) -> None:
    pods = {"distributed-training-a": "1x200", "train-and-serve-b": "1x30 0x170", "other": "1x200"}
    fires(
        promtool, rules, "NudgeRetrainingWaits",
        {
            f'kube_pod_status_phase{{namespace="nudge",pod="{name}",phase="Pending"}}': values
            for name, values in pods.items()
        },
        {"59m": [], "61m": ["distributed-training-a"]},
    )  # fmt: skip


def test_a_model_without_servers_is_told_and_one_scaled_to_nothing_is_not(
    promtool: str, rules: Path
) -> None:
    series = {}
    for name, wanted, there in (
        ("m-1-predictor", 1, "1x20 0x100"), ("m-2-predictor", 0, "0x120"), ("web", 1, "0x120"),
    ):  # fmt: skip
        labels = f'{{namespace="nudge",deployment="{name}"}}'
        series[f"kube_deployment_spec_replicas{labels}"] = f"{wanted}x120"
        series[f"kube_deployment_status_replicas_available{labels}"] = there
    fires(
        promtool, rules, "NudgeServedModelDown", series,
        {"15m": [], "25m": [], "40m": ["m-1-predictor"]},
    )  # fmt: skip
