"""The compiled YAML is what a dashboard takes, and made files are current."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from nudge.pipelines import compile as compiling
from nudge.pipelines.cli import main

COMPILED = Path(__file__).parents[2] / "pipelines" / "compiled" / "train_and_serve.yaml"


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPILED.read_text(encoding="ascii")))


def test_a_dashboard_takes_it(spec: dict[str, Any]) -> None:
    assert COMPILED.stat().st_size < 256 * 1024
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert 1 <= len(parameters) <= 15
    for name, parameter in parameters.items():
        assert 0 < len(parameter.get("description", "")) <= 255, name
        assert "defaultValue" in parameter, name


def test_nothing_is_installed_when_it_runs(spec: dict[str, Any]) -> None:
    executors = spec["deploymentSpec"]["executors"].values()
    assert len(executors) == 8
    for executor in executors:
        container = executor["container"]
        assert "pip install" not in " ".join(container["command"])
        assert "python" in container["image"]  # kfp.local warns about any other


def test_what_changes_the_world_or_reads_it_is_never_cached(spec: dict[str, Any]) -> None:
    tasks: dict[str, Any] = {}
    for component in (*spec["components"].values(), spec["root"]):
        tasks |= component.get("dag", {}).get("tasks", {})
    cached = {
        name
        for name, task in tasks.items()
        if task.get("cachingOptions", {}).get("enableCache") and f"exec-{name}" in str(spec)
    }
    assert cached == {"tokenize", "train", "evaluate"}


def test_the_promotion_gates_what_changes_the_world(spec: dict[str, Any]) -> None:
    gated = [c["dag"]["tasks"] for n, c in spec["components"].items() if "condition" in n]
    assert [set(tasks) for tasks in gated] == [{"upload", "register", "deploy"}]
    inner = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    (condition,) = (task for name, task in inner.items() if "condition" in name)
    assert "== 1" in condition["triggerPolicy"]["condition"]
    summary = spec["root"]["dag"]["tasks"]["summary"]
    assert summary["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_made_files_are_current() -> None:
    assert compiling.stale() == []


def test_check_names_what_is_stale_and_compile_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "ROOT", tmp_path)
    monkeypatch.setattr(compiling, "COMPILED", tmp_path / "compiled")
    check = CliRunner().invoke(main, ["compile", "--check"])
    assert check.exit_code == 1
    assert "compiled/train_and_serve.yaml" in check.stderr
    assert "run `nudge compile`" in check.stderr
    assert not list(tmp_path.iterdir())
    assert CliRunner().invoke(main, ["compile"]).exit_code == 0
    assert CliRunner().invoke(main, ["compile", "--check"]).output == "current\n"
    page = tmp_path / "components" / "train" / "README.md"
    page.write_text(page.read_text() + "an edit by hand\n")
    check = CliRunner().invoke(main, ["compile", "--check"])
    assert (check.exit_code, check.stderr.count(".md")) == (1, 1)


def test_every_row_of_a_readme_says_something() -> None:
    pages = [text for path, text in compiling.made().items() if path.suffix == ".md"]
    assert len(pages) == 8
    for page in pages:
        rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
        assert rows
        assert all(row[3].strip() for row in rows), page
