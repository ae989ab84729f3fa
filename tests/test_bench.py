"""What a benchmark says where a peer is not installed."""

import sys

import pytest

from tests.bench import bench_train, chat_training, results


def test_the_chat_case_names_the_missing_peer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench_train", "--only", "chat"])
    monkeypatch.setattr(results, "write_atomic", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "400")
    bench_train.main()
    shown = capsys.readouterr().out
    assert "datasets and trl not installed; run pip install -e '.[bench]'" in shown
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert chat_training.unmeasured(8) == []
