"""Attacks on a home by another user of the machine.

Each home here is in a folder that everybody can reach: only what nudge does itself protects it.
"""

import os
import stat
from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.local import processes
from nudge.components.common.local.private_home import private_home
from tests.security.other_user import OTHER_UID, as_other_user, as_root


@as_root
def test_a_home_that_an_older_nudge_left_open_is_closed(open_folder: Path) -> None:
    old = open_folder / "old"
    (old / "services").mkdir(parents=True)
    (old / "runs").mkdir()
    (old / "runs" / "recipe.yaml").write_text("private")
    for path in (old, old / "services", old / "runs"):
        path.chmod(0o775)
    assert as_other_user((old / "runs" / "recipe.yaml").read_text) == "private"
    with processes.locked(old, "up"):
        pass
    assert as_other_user((old / "runs" / "recipe.yaml").read_text) == "PermissionError"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (old, old / "services", old / "runs")}
    assert modes == {0o700}


@as_root
def test_a_home_that_another_user_made_is_refused(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shared folder, somebody may make `.nudge` before nudge does."""
    trap = open_folder / "trap"
    trap.mkdir(mode=0o777)
    os.chown(trap, OTHER_UID, OTHER_UID)
    with (
        pytest.raises(UserError, match=f"belongs to another user .uid {OTHER_UID}."),
        processes.locked(trap, "up"),
    ):
        pass
    assert list(trap.iterdir()) == []
    (open_folder / "mine").mkdir(mode=0o700)
    link = open_folder / "link"
    link.symlink_to(open_folder / "mine")
    os.chown(link, OTHER_UID, OTHER_UID, follow_symlinks=False)
    with pytest.raises(UserError, match="belongs to another user"):
        private_home(link)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a volume of a pod
    with processes.locked(trap, "up"):
        pass


@as_root
def test_what_another_user_put_into_a_home_is_refused(open_folder: Path) -> None:
    """A folder of tokens that is theirs, and a token in a folder that an older nudge left open."""
    theirs = open_folder / "with-their-folder"
    (theirs / "services").mkdir(parents=True)
    os.chown(theirs / "services", OTHER_UID, OTHER_UID)
    token = open_folder / "with-their-token" / "services" / "model-registry.token"
    token.parent.mkdir(parents=True)
    token.parent.chmod(0o777)
    token.write_text("a" * 43)
    os.chown(token, OTHER_UID, OTHER_UID)
    for home in (theirs, token.parents[1]):
        with pytest.raises(UserError, match="something in it, belongs to another user"):
            private_home(home)


@as_root
def test_a_home_in_a_folder_of_root_that_everybody_can_write_to_is_refused(
    open_folder: Path,
) -> None:
    """Somebody else may make the folder of the tokens there."""
    shared = open_folder / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    assert as_other_user(private_home, shared) == "UserError"
    own = shared / "own"
    assert as_other_user(private_home, own) is None
    assert own.stat().st_uid == OTHER_UID
