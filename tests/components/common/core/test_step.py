"""Reuse of finished steps: by content, and only complete ones."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.core import provenance
from nudge.components.common.core.step import reusable, reuse_key, step
from tests.kubernetes_api import KubernetesApi

CALLS: list[str] = []


@step("double", outputs=("out",))
def double(times: int, *, source: Path, out: Path) -> dict[str, Any]:
    CALLS.append(source.read_text())
    out.mkdir()
    (out / "text").write_text(source.read_text() * times)
    if times == 13:
        raise RuntimeError("unlucky")
    return {"length": len(source.read_text()) * times}


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setenv("NUDGE_REUSE", str(tmp_path / "reuse"))
    monkeypatch.setenv("NUDGE_EVENTS", str(tmp_path / "events.jsonl"))
    (tmp_path / "a").write_text("ab")


def ends(tmp_path: Path) -> list[tuple[str, Any]]:
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    return [(e["event"], e.get("status")) for e in lines if e["event"] != "step_start"]


def test_the_same_content_is_reused_from_another_path(tmp_path: Path) -> None:
    first = double(2, source=tmp_path / "a", out=tmp_path / "one")
    (tmp_path / "b").write_text("ab")
    second = double(2, source=tmp_path / "b", out=tmp_path / "two")
    assert first == second == {"length": 4}
    assert (tmp_path / "two" / "text").read_text() == "abab"
    assert CALLS == ["ab"]
    assert ends(tmp_path) == [("step_end", "done"), ("step_end", "reused")]


def test_a_search_within_a_step_decides_whether_the_rest_is_reused(tmp_path: Path) -> None:
    """The search is part of the step: it is shown as running, and its result counts."""

    @reusable("outer", outputs=("out",))
    def rest(found: str, *, out: Path) -> dict[str, Any]:
        CALLS.append(found)
        out.write_text(found)
        return {"found": found}

    @step("outer", outputs=("out",), reuse=False)
    def outer(*, source: Path, out: Path) -> dict[str, Any]:
        events = (tmp_path / "events.jsonl").read_text().splitlines()
        assert json.loads(events[-1])["event"] == "step_start"
        return rest(source.read_text(), out=out)

    for name in ("one", "two"):
        assert outer(source=tmp_path / "a", out=tmp_path / name) == {"found": "ab"}
        assert (tmp_path / name).read_text() == "ab"
    (tmp_path / "a").write_text("xy")
    outer(source=tmp_path / "a", out=tmp_path / "three")
    assert CALLS == ["ab", "xy"]
    assert ends(tmp_path) == [("step_end", status) for status in ("done", "reused", "done")]


@pytest.mark.parametrize("damaged", ["out/text", "result.json", "digests.json", "out"])
@pytest.mark.parametrize("content", [b"", b"\0\0\0\0", b"ab", None])
def test_a_damaged_result_is_not_reused(
    damaged: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    double(2, source=tmp_path / "a", out=tmp_path / "one")
    (kept,) = (path for path in (tmp_path / "reuse" / "double").iterdir() if path.is_dir())
    target = kept / damaged
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    if content is not None:
        target.write_bytes(content)
    result = double(2, source=tmp_path / "a", out=tmp_path / "two")
    assert (result, (tmp_path / "two" / "text").read_text()) == ({"length": 4}, "abab")
    without_digests = damaged == "digests.json" and content is None  # as an older nudge kept it
    assert len(CALLS) == (1 if without_digests else 2)
    assert ("is damaged" in capsys.readouterr().err) is not without_digests
    double(2, source=tmp_path / "a", out=tmp_path / "three")
    assert len(CALLS) == (1 if without_digests else 2)


def test_changed_content_or_settings_rerun_the_step(tmp_path: Path) -> None:
    double(2, source=tmp_path / "a", out=tmp_path / "one")
    double(3, source=tmp_path / "a", out=tmp_path / "two")
    (tmp_path / "a").write_text("xy")
    double(2, source=tmp_path / "a", out=tmp_path / "three")
    assert len(CALLS) == 3


def test_a_failed_call_is_not_kept(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with pytest.raises(RuntimeError, match="unlucky"):
            double(13, source=tmp_path / "a", out=tmp_path / name)
    assert len(CALLS) == 2
    assert ends(tmp_path) == [("step_failed", None)] * 2


@dataclasses.dataclass(frozen=True)
class Settings:
    base_model: str


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_base_model_that_changed_in_place_is_new_input(tmp_path: Path, scheme: str) -> None:
    """The settings have only its path, which does not identify its content."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    settings = Settings(f"{scheme}{model}")
    before = reuse_key("train", {"settings": settings})
    assert reuse_key("train", {"settings": settings}) == before
    (model / "config.json").write_text('{"layers": 2}')
    assert reuse_key("train", {"settings": settings}) != before


def test_the_first_of_two_runs_that_finish_the_same_step_is_kept(tmp_path: Path) -> None:
    """The other began before anything was kept, and must finish too."""
    other: dict[str, Any] = {}

    @step("slow", outputs=("out",))
    def slow(text: str, *, out: Path) -> dict[str, Any]:
        if not other:
            other["result"] = "begun"
            other["result"] = slow(text, out=tmp_path / "two")
        (out / "deep").mkdir(parents=True)
        (out / "deep" / "text").write_text(text)
        return {"length": len(text)}

    assert slow("abc", out=tmp_path / "one") == other["result"] == {"length": 3}
    (kept,) = (tmp_path / "reuse" / "slow").glob("[!.]*")
    same = [tmp_path / "two" / "deep" / "text", kept / "out" / "deep" / "text"]
    assert same[0].samefile(same[1])
    assert (tmp_path / "one" / "deep" / "text").read_text() == "abc"


def test_the_log_of_a_pod_ends_with_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    double(2, source=tmp_path / "a", out=tmp_path / "one")
    assert capfd.readouterr().err == ""  # `nudge run` has them from the events
    monkeypatch.delenv("NUDGE_EVENTS")
    double(2, source=tmp_path / "a", out=tmp_path / "two")
    (line,) = capfd.readouterr().err.splitlines()
    results = json.loads(line.removeprefix("double: results "))
    assert results["length"] == 4
    assert results["usage"]["core_seconds"] >= 0


def test_a_build_folder_does_not_change_the_code_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "native.py").write_text("x = 1")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    fingerprint = provenance.code_fingerprint.__wrapped__
    before = fingerprint()
    built = tmp_path / "kernels" / "build" / "lib" / "nudge" / "kernels"
    built.mkdir(parents=True)
    (built / "native.py").write_text("x = 1")
    assert fingerprint() == before
    (tmp_path / "kernels" / "native.py").write_text("x = 2")
    assert fingerprint() != before


WORKFLOW = "train-and-serve-7vk7x"
STEP = """
import sys
from pathlib import Path
from nudge.components.common.core import step
from nudge.components.common.core.errors import Transient, UserError

step.TERMINATION_LOG = Path(sys.argv[1])
with step.exit_with_user_errors():
    print("the data is read")
    if sys.argv[2] == "bug":
        raise KeyError("a bug")
    raise {"refused": UserError, "outage": Transient}[sys.argv[2]]("train.epochs = -1: too few")
"""


def attempt_of_step(
    api: KubernetesApi, folder: Path, number: int, how: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a step as attempt ``number`` in a pod; its end is written into the pod's status."""
    name = f"{WORKFLOW}-retry-system-container-impl-{number + 100}"
    label = {"workflows.argoproj.io/workflow": WORKFLOW}
    node = {"workflows.argoproj.io/node-name": f"{WORKFLOW}.root.train.executor({number})"}
    meta = {"name": name, "labels": label, "annotations": node}
    spec = {"containers": [{"name": "main", "image": "x"}]}
    api.add({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    log = folder / f"termination-log-{number}"
    environment = {
        **os.environ,
        "KUBECONFIG": str(api.kubeconfig(folder)),
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KFP_POD_NAME": name,
        "KFP_RETRY_INDEX": str(number),
        **variables,
    }
    command = [sys.executable, "-c", STEP, str(log), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    ended = {"exitCode": 1, "reason": "Error"}
    if log.exists():
        ended["message"] = log.read_text()
    found = api.find("Pod", name)
    assert found is not None
    status: dict[str, Any] = {
        "name": "main",
        "image": "x",
        "imageID": "x",
        "ready": False,
        "restartCount": 0,
    }
    status["state"] = {"terminated": ended}
    api.set_status(found, phase="Failed", containerStatuses=[status])
    return done


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with KubernetesApi() as api:
        yield api


def test_a_retry_repeats_a_refusal_and_reads_no_data(api: KubernetesApi, tmp_path: Path) -> None:
    first = attempt_of_step(api, tmp_path, 0, "refused")
    assert (first.returncode, first.stdout) == (2, "the data is read\n")
    assert first.stderr == "error: train.epochs = -1: too few\n"
    assert (tmp_path / "termination-log-0").read_text() == first.stderr.strip()
    for number in (1, 2):
        retried = attempt_of_step(api, tmp_path, number, "refused")
        assert (retried.returncode, retried.stdout) == (2, "")
        assert retried.stderr == first.stderr


def test_a_server_that_does_not_count_attempts_is_accepted(
    api: KubernetesApi, tmp_path: Path
) -> None:
    attempt_of_step(api, tmp_path, 0, "refused", KFP_RETRY_INDEX="")
    assert attempt_of_step(api, tmp_path, 1, "refused", KFP_RETRY_INDEX="").stdout == ""


@pytest.mark.parametrize("how", ["outage", "bug"])
def test_a_retry_after_any_other_end_does_its_work(
    api: KubernetesApi, tmp_path: Path, how: str
) -> None:
    """A stopped training must resume from its checkpoint, so its error is not a refusal."""
    first = attempt_of_step(api, tmp_path, 0, how)
    assert ("Traceback" in first.stderr) is (how == "bug")
    assert attempt_of_step(api, tmp_path, 1, how).stdout == "the data is read\n"


def test_a_retry_that_may_not_list_pods_does_its_work(api: KubernetesApi, tmp_path: Path) -> None:
    attempt_of_step(api, tmp_path, 0, "refused")
    api.forbid("list", "pods")
    assert attempt_of_step(api, tmp_path, 1, "refused").stdout == "the data is read\n"
