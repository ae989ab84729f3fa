"""Where a run keeps its checkpoints, and how two identical runs stay out of each other's way."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.train.checkpoints.checkpoint_store import (
    CheckpointStore,
    open_checkpoint_store,
)
from nudge.components.train.checkpoints.checkpoints import Checkpoints
from nudge.components.train.ranks import Ranks
from nudge.components.train.settings import TrainSettings

PLACE_VARIABLE = "NUDGE_CHECKPOINTS"
GIVEN_UP_AFTER_S = 14 * 24 * 3600.0
"""Checkpoints of a run that nobody asked to keep, and nobody has gone on with for so long, go."""


@contextlib.contextmanager
def open_checkpoints(
    settings: TrainSettings,
    identity: dict[str, Any],
    ranks: Ranks,
    note: Callable[[str], None] = lambda stage: None,
) -> Iterator[Checkpoints]:
    """The checkpoints of the run with this identity, where the settings say that they go.

    Without such a place the best weights, if they are asked for, are kept in a temporary folder.
    They are this run's alone while they are open, and once it ended well `run_is_done` is called.
    Of another run of this identity the end is waited for, which ``note`` is told; raises
    `UserError` where there is more than one rank, of which the others would not wait so long. (In
    S3 no other run is seen.)
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    uri = settings.checkpoints or os.environ.get(PLACE_VARIABLE, "")
    with contextlib.ExitStack() as stack:
        place = open_checkpoint_store(f"{uri.rstrip('/')}/{key}") if uri else None
        if place is None and settings.keeps_best:
            if ranks.local_world < ranks.world:
                raise UserError("keeping the best weights on many machines needs train.checkpoints")
            folder = stack.enter_context(_shared_temporary(ranks))
            place = open_checkpoint_store(str(folder))
        if place is not None:
            free = stack.enter_context(_held(place, ranks, note)) if ranks.main else True
            if ranks.sum(float(not free))[0]:
                raise UserError(
                    f"another run of the same data and settings has its checkpoints in {place.uri} "
                    "and is at work: wait for its end, or give this one train.checkpoints of its "
                    "own"
                )
        if place is not None and ranks.main and uri and not settings.checkpoints:
            place.remove_given_up(GIVEN_UP_AFTER_S)
        checkpoints = Checkpoints(place, settings, identity, ranks)
        checkpoints.wanted = bool(uri)
        try:
            yield checkpoints
        finally:
            checkpoints.close()
        checkpoints.run_is_done()


@contextlib.contextmanager
def _held(place: CheckpointStore, ranks: Ranks, note: Callable[[str], None]) -> Iterator[bool]:
    with place.held() as free:
        if free or ranks.world > 1:
            yield free
            return
    note("waiting for the end of another run of the same data and settings")
    with place.held(wait=True) as free:
        yield free


@contextlib.contextmanager
def _shared_temporary(ranks: Ranks) -> Iterator[Path]:
    token = int(ranks.sum(os.getpid() if ranks.main else 0)[0])
    folder = Path(tempfile.gettempdir()) / f"nudge-best-{token}"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        if ranks.main:
            shutil.rmtree(folder, ignore_errors=True)
