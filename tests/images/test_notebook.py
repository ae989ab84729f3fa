"""The walk through the running example, from its first prompt to the served answer, executed."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
WALK = ROOT / "images" / "workbench" / "walk.ipynb"
TINY = ROOT / "tests" / "end_to_end" / "tiny.yaml"


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(WALK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_it_ends_in_an_answer_of_the_served_model(
    home: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A workbench is set to the cluster's; what the notebook runs is here.
    for name in ("NUDGE_REGISTRY_URL", "AWS_S3_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(WALK, as_version=4)
    (given,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    given.source = f"RECIPE = {str(TINY)!r}\nSETTINGS = ['base_model={tiny_model}']"
    client = NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    text = "".join(
        str(output.get("text") or output.get("data"))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    for expected in ("| next token |", "| deploy |", "promoted: True", "<iframe", "stopped "):
        assert expected in text
    (listing,) = (cell for cell in notebook.cells if cell.source.endswith("nudge models"))
    assert "100 %" in str(listing.outputs)
    # The prompt, and what the served model says after it.
    assert "The Eiffel Tower is located in\x1b[1m" in text
    assert "\x1b[1m\x1b[0m" not in text
    assert "Warning" not in text
    assert list(home.glob("services/*.json")) == []
