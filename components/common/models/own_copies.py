"""Files of an upload that this machine has already, because a run here made them.

A run's model folder and the object store have a version's weights; everything else that needs them
(serving, an incumbent to compare with, a base model) links to the run's files instead of keeping a
third copy. A hard link stays valid after the run's folder is deleted.
"""

import os
from pathlib import Path

from nudge.components.common.artifacts import model_files
from nudge.components.common.core.environment import nudge_home
from nudge.components.common.core.publish import sha256_file

TRAINED = "artifacts/*/train/model"
"""Where a run's model is, below the run's folder."""


def link_own_files(uri: str, folder: Path, names: set[str]) -> set[str]:
    """Link those files ``names`` of the version at ``uri`` into ``folder`` that a run here wrote.

    ``folder`` must have the upload's manifest. A file counts only if its sha256 is the manifest's.
    Returns the names that were linked; empty if the disk allows no hard links.
    """
    try:
        upload = model_files.read_upload((folder / model_files.MANIFEST).read_bytes())
    except (OSError, model_files.Tampered):
        return set()
    run_id = uri.partition("#")[0].rstrip("/").rpartition("/")[2]
    if not run_id or run_id.startswith("."):
        return set()
    linked: set[str] = set()
    for model in sorted((nudge_home() / "runs" / run_id).glob(TRAINED)):
        for name in sorted((names - linked) & set(upload.files)):
            source, target = model / name, folder / name
            if source.is_symlink() or not source.is_file():
                continue
            listed = upload.files[name]
            if listed.bytes not in (None, source.stat().st_size):
                continue
            if sha256_file(source) != listed.sha256:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:  # another file system, or another user's files
                return linked
            linked.add(name)
    return linked
