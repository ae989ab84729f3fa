"""Opens the checkpoints of a run, and lets a second run with the same identity wait."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.train.checkpoints.checkpoint_store import CheckpointStore
from nudge.components.train.checkpoints.checkpoints import Checkpoints
from nudge.components.train.ranks import Ranks
from nudge.components.train.settings import TrainSettings

CHECKPOINTS_VARIABLE = "NUDGE_CHECKPOINTS"
ABANDONED_AFTER_S = 14 * 24 * 3600.0
"""Checkpoints below NUDGE_CHECKPOINTS that no run has written to for this long are removed."""


@contextlib.contextmanager
def open_checkpoints(
    settings: TrainSettings,
    identity: dict[str, Any],
    ranks: Ranks,
    note: Callable[[str], None] = lambda stage: None,
) -> Iterator[Checkpoints]:
    """The checkpoints of the run with this identity, in the store that the settings name.

    If they name none and the best weights are to be kept, these go to a temporary folder. The store
    is locked while it is open, and `run_is_done` is called once the run succeeds. If another run
    with this identity is active, a single rank waits for it and reports that through ``note``; with
    more than one rank it raises `UserError`, because the other ranks would time out. (In S3 there
    is no lock, so other runs go unnoticed.)
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    uri = settings.checkpoints or os.environ.get(CHECKPOINTS_VARIABLE, "")
    with contextlib.ExitStack() as stack:
        store = CheckpointStore(f"{uri.rstrip('/')}/{key}") if uri else None
        if store is None and settings.keeps_best:
            if ranks.local_world < ranks.world:
                raise UserError(
                    "keeping the best weights on several machines needs train.checkpoints: set it "
                    "to a shared folder or an s3:// URI"
                )
            folder = stack.enter_context(_shared_temporary(ranks))
            store = CheckpointStore(str(folder))
        if store is not None:
            locked = stack.enter_context(_locked(store, ranks, note)) if ranks.main else True
            if ranks.sum(float(not locked))[0]:
                raise UserError(
                    "another run with the same data and settings is active and has its checkpoints "
                    f"in {store.uri}: wait until it ends, or set a different train.checkpoints for "
                    "this run"
                )
        if store is not None and ranks.main and uri and not settings.checkpoints:
            store.remove_abandoned(ABANDONED_AFTER_S)
        checkpoints = Checkpoints(store, settings, identity, ranks)
        checkpoints.persistent = bool(uri)
        try:
            yield checkpoints
        finally:
            checkpoints.close()
        checkpoints.run_is_done()


@contextlib.contextmanager
def _locked(store: CheckpointStore, ranks: Ranks, note: Callable[[str], None]) -> Iterator[bool]:
    with store.lock() as acquired:
        if acquired or ranks.world > 1:
            yield acquired
            return
    note("waiting for another run with the same data and settings to end")
    with store.lock(wait=True) as acquired:
        yield acquired


@contextlib.contextmanager
def _shared_temporary(ranks: Ranks) -> Iterator[Path]:
    # Not a name that another user of this machine could have made before.
    token = int(ranks.sum(secrets.randbelow(1 << 50) if ranks.main else 0)[0])
    folder = Path(tempfile.gettempdir()) / f"nudge-best-{token}"
    if ranks.main:
        folder.mkdir(mode=0o700)
    ranks.wait()
    try:
        yield folder
    finally:
        if ranks.main:
            shutil.rmtree(folder, ignore_errors=True)
