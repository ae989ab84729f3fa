"""What is printed can be copied: an address stays in one piece."""

import pytest
from nudge.pipelines import display

NAME = "serving-a-model-of-a-long-name@20261126-144205-ab12"
ADDRESS = "http://127.0.0.1:65535"
ROWS = [
    {
        "name": NAME,
        "state": "running",
        "address": ADDRESS,
        "pid": 4194304,
        "resident_mb": 12345,
        "log": "/x/services/serving.log",
    }
]


@pytest.mark.parametrize("columns", [64, 80, 200])
def test_no_address_folds(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    display.parts(ROWS)
    piped = capsys.readouterr().out
    assert any(NAME in line and ADDRESS in line for line in piped.splitlines())
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    display.parts(ROWS)
    shown = capsys.readouterr().out
    assert ADDRESS in shown
    assert "4194304" in shown
    assert columns == 200 or NAME not in shown
