"""What training keeps in the machine's temporary folder, where every user may make folders."""

import os
import stat
from pathlib import Path

import pytest

from nudge.components.train.checkpoints import checkpoints, open_checkpoints
from nudge.components.train.ranks import Ranks

ONE = Ranks()


class Remote:
    """A store whose checkpoints are not on this disk."""

    def on_disk(self, name: str) -> None:
        return None

    def fetch(self, name: str, into: Path) -> None:
        into.mkdir()
        (into / "model").write_text("weights")


@pytest.mark.parametrize("kind", ["best", "fetched"])
def test_another_user_can_neither_guess_nor_open_the_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old = os.umask(0o002)
    names = set()
    try:
        for _ in range(2):
            open_folder = (
                open_checkpoints._shared_temporary(ONE)
                if kind == "best"
                else checkpoints._fetched(Remote(), "step-1", ONE)  # type: ignore[arg-type]
            )
            with open_folder:
                (folder,) = tmp_path.iterdir()
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700
                assert not folder.name.endswith(f"-{os.getpid()}")
                names.add(folder.name)
    finally:
        os.umask(old)
    assert len(names) == 2
    assert list(tmp_path.iterdir()) == []
