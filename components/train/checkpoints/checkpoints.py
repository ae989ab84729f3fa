"""Checkpoints to resume from: torch.distributed.checkpoint, written by another thread.

A checkpoint holds what `State` says, the trained weights with AdamW's two moments, and the history
so far. Its tensors are safetensors files, one a rank, which any number of ranks can read; DCP's own
default would be a pickle. Everything else is in the manifest, with a sha256 of each file that is
checked before one is read.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.provenance import code_version
from nudge.components.common.core.publish import sha256_file, verify_file
from nudge.components.common.core.step import disk_is_full
from nudge.components.train.checkpoints.checkpoint_store import (
    CheckpointStore,
    open_checkpoint_store,
)
from nudge.components.train.checkpoints.shard_writer import SafetensorsWriter
from nudge.components.train.checkpoints.training_state import TrainingState, differences
from nudge.components.train.network import Network
from nudge.components.train.ranks import Ranks
from nudge.components.train.record import NoTrainingLog, TrainingLog
from nudge.components.train.settings import TrainSettings

FAILURES_IN_A_ROW = 3
"""Checkpoints that may fail one after another before training stops."""


class Checkpoints:
    """The checkpoints of one run; made by `open_checkpoints`."""

    def __init__(
        self,
        place: CheckpointStore | None,
        settings: TrainSettings,
        identity: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        self.place, self.settings, self.identity, self.ranks = place, settings, identity, ranks
        self.wanted = False
        """Whether they outlive the run, so that it is worth writing one when it is stopped."""
        self._worker = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None
        self._failures = 0
        self._best: tuple[int | None, float | None] = None, None  # the last whose checkpoint stands
        # The same on all ranks of this run, and another one in the next.
        self._token = int(ranks.sum(os.getpid() if ranks.main else 0)[0])
        self._last = ""

    def resume(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        record: TrainingLog | NoTrainingLog,
    ) -> TrainingState | None:
        """Bring everything to where the newest whole checkpoint stands, or the one that `resume`
        names; None if there is none.

        Raises `UserError` if the one that is named is damaged, not there or of another run, and if
        every one that this run left is damaged.
        """
        if self.settings.resume not in ("auto", "never"):
            return self._resume_named(network, optimizer, record)
        if self.place is None:
            return None
        names = self.place.names() if self.settings.resume == "auto" else []
        damage = ""
        for name in reversed(self._agreed(names)):
            try:
                state = self._restore(self.place, name, network, optimizer, record)
            except Damaged as error:
                damage = f"{error}"
                print(f"warning: {damage}", file=sys.stderr, flush=True)
                continue
            self._go_on(state, [kept for kept in names if kept <= name])
            return state
        if damage:
            raise UserError(f"{damage}; no older one is whole: train.resume: never starts anew")
        self._clear([])
        return None

    def _resume_named(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        record: TrainingLog | NoTrainingLog,
    ) -> TrainingState:
        root, _, name = self.settings.resume.rstrip("/").rpartition("/")
        place = open_checkpoint_store(root)
        names = self._agreed(place.names())
        if name not in names:
            raise UserError(
                f"train.resume = {self.settings.resume!r}: there is no checkpoint; give auto, "
                "never or the URI of one"
            )
        state = self._restore(place, name, network, optimizer, record)
        if self.place is not None:
            own = place.uri == self.place.uri
            self._go_on(state, [kept for kept in names if own and kept <= name])
        return state

    def _go_on(self, state: TrainingState, names: list[str]) -> None:
        """From a restored state, beside the checkpoints ``names`` of this run and no others."""
        self._clear(names)
        best = state.best_step
        if self.settings.keeps_best and best is not None and _name(best) not in names:
            if self.ranks.main:
                told = f"warning: the best validation so far, of step {best}, has no checkpoint"
                print(f"{told}: the best is looked for anew", file=sys.stderr, flush=True)
            state.best_step, state.best_loss, state.worse_in_a_row = None, None, 0
        self._best = state.best_step, state.best_loss

    def restore_best(
        self, network: Network, optimizer: torch.optim.Optimizer, state: TrainingState
    ) -> None:
        """Bring the weights back to those of the best validation."""
        if state.best_step is not None and state.best_step != state.step:
            assert self.place is not None
            name = _name(state.best_step)
            self._restore(self.place, name, network, optimizer, NoTrainingLog())

    def save(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
        record: TrainingLog | NoTrainingLog,
    ) -> None:
        """Copy everything now and write it meanwhile; waits for the one before.

        One that cannot be written is told and tried again with the next; raises `UserError` when
        that was so three times in a row.
        """
        if self.place is None:
            return
        self.settle(state)
        stager = DefaultStager(StagingOptions(False, False, False, False))
        staged = stager.stage(_tensors(network, optimizer))
        body = {
            "state": dataclasses.asdict(state),
            "rows_read": state.step * self.settings.batch_sequences,
            "random": {"seed": self.settings.seed, "step": state.step},
            "identity": self.identity,
            "ranks": self.ranks.world,
            "code_version": code_version(),
        }
        lines = {name: list(kept) for name, kept in record.lines.items()}
        self._written = self._worker.submit(self._write, _name(state.step), staged, body, lines)
        self._written.add_done_callback(lambda _: stager.close())

    def settle(self, state: TrainingState) -> None:
        """Wait until the last checkpoint is written. If it could not be and the best weights are to
        be kept, then the best so far is the one before."""
        self._settle(FAILURES_IN_A_ROW, state)

    def finish(self, state: TrainingState) -> str:
        """Wait until the last checkpoint is written; returns its URI.

        Raises `UserError` if it could not be.
        """
        self._settle(1, state)
        return f"{self.place.uri}/{self._last}" if self.place else ""

    def close(self) -> None:
        self._worker.shutdown()

    def run_is_done(self) -> None:
        """Remove them all, unless `checkpoints` asked for them by name: the model is there."""
        if self.place is not None and not self.settings.checkpoints:
            self._clear([])

    def _settle(self, allowed: int, state: TrainingState) -> None:
        if self._written is None:
            return
        written, self._written = self._written, None
        try:
            written.result()
        except CheckpointFailed as error:
            self._failures += 1
            if self._failures >= allowed:
                raise Transient(f"{error}; the one before it is kept") from None
            print(f"warning: {error}; trying again later", file=sys.stderr, flush=True)
            if self.settings.keeps_best:
                state.best_step, state.best_loss = self._best
        else:
            self._failures = 0
            self._best = state.best_step, state.best_loss

    def _write(
        self, name: str, staged: Any, body: dict[str, Any], lines: dict[str, list[str]]
    ) -> None:
        """Write, ship, agree, publish; in the thread of its own."""
        assert self.place is not None
        folder, files, failure = None, {}, ""
        try:
            folder = self.place.staging(name, self._token)
            with _quietly():
                save(
                    staged,
                    storage_writer=SafetensorsWriter(folder),
                    process_group=self.ranks.saving,
                )
            mine = list(folder.glob(f"shard-{self.ranks.rank + 1:05}-*"))
            if self.ranks.main:
                for file, kept in lines.items():
                    (folder / file).write_text("".join(f"{line}\n" for line in kept))
                    mine.append(folder / file)
            files = {path.name: sha256_file(path) for path in mine}
            self.place.ship(name, mine)
        except (OSError, UserError, CheckpointException) as error:
            failure = _why(error)
        try:
            for other, why in self._everyones((files, failure)):
                files |= other
                failure = failure or why
            if not failure and self.ranks.main:
                assert folder is not None
                self.place.publish(name, folder, {**body, "files": files})
        except (OSError, UserError) as error:
            failure = _why(error)
        finally:
            if folder is not None:
                self._tidy(folder, failed=bool(failure))
        # One rank publishes, and all must hold the same for the best.
        failure = next(filter(None, self._everyones(failure)), "")
        if failure:
            raise CheckpointFailed(f"the checkpoint {self.place.uri}/{name} failed: {failure}")
        self._last = name
        if self.ranks.main:
            try:
                self._prune(name, body["state"]["best_step"])
            except (OSError, UserError) as error:
                told = f"warning: old checkpoints at {self.place.uri} stay: {_why(error)}"
                print(told, file=sys.stderr, flush=True)

    def _everyones(self, mine: Any) -> list[Any]:
        if self.ranks.world == 1:
            return [mine]
        everyones: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(everyones, mine, group=self.ranks.saving)
        return everyones

    def _tidy(self, folder: Path, failed: bool) -> None:
        # A shared folder is the main rank's to remove: others may still be writing there.
        if folder.exists() and (self.ranks.main or folder.parent == Path(tempfile.gettempdir())):
            shutil.rmtree(folder, ignore_errors=failed)

    def _prune(self, newest: str, best_step: int | None) -> None:
        assert self.place is not None
        names = [name for name in self.place.names() if name <= newest]
        best = [] if best_step is None else [_name(best_step)]
        for name in names[: -self.settings.checkpoints_kept]:
            if name not in best:
                self.place.remove(name)

    def _restore(
        self,
        place: CheckpointStore,
        name: str,
        network: Network,
        optimizer: torch.optim.Optimizer,
        record: TrainingLog | NoTrainingLog,
    ) -> TrainingState:
        with _fetched(place, name, self.ranks) as folder:
            manifest = place.manifest(name)
            other = differences(manifest["identity"], self.identity)
            if other:
                raise UserError(
                    f"the checkpoint {place.uri}/{name} is of another run: {'; '.join(other)}; "
                    "resume with what it was made with, or set train.resume: never"
                )
            self._verify(place, name, folder, manifest)
            tensors = _tensors(network, optimizer)
            reader = HuggingFaceStorageReader(str(folder))
            with _quietly():
                load(tensors, storage_reader=reader)
            state = TrainingState(**manifest["state"])
            for values in optimizer.state.values():
                values["step"].fill_(state.step)
            lines = {file: (folder / file).read_text().splitlines() for file in record.lines}
            record.replay(lines)
        self.ranks.wait()
        return state

    def _verify(
        self, place: CheckpointStore, name: str, folder: Path, manifest: dict[str, Any]
    ) -> None:
        """Check every file on one rank a machine, and tell all ranks what was found."""
        problem = ""
        if self.ranks.local_rank == 0:
            try:
                for file, sha256 in manifest["files"].items():
                    verify_file(folder / file, sha256)
            except UserError as error:
                problem = f"{error}"
        if self.ranks.sum(float(bool(problem)))[0]:
            raise Damaged(f"the checkpoint {place.uri}/{name} is damaged: {problem}")

    def _clear(self, keep: list[str]) -> None:
        assert self.place is not None
        self.ranks.wait()
        if self.ranks.main:
            self.place.clear(keep)
        self.ranks.wait()

    def _agreed(self, names: list[str]) -> list[str]:
        """What the main rank sees, on every rank."""
        if self.ranks.world == 1:
            return names
        box = [names]
        dist.broadcast_object_list(box, src=0, group=self.ranks.saving)
        return box[0]


class Damaged(UserError):
    """A checkpoint whose files are not those that its manifest names."""


class CheckpointFailed(RuntimeError):
    """A checkpoint that could not be written; nothing of it is visible."""


@contextlib.contextmanager
def _fetched(place: CheckpointStore, name: str, ranks: Ranks) -> Iterator[Path]:
    """The checkpoint's files on this machine, brought by one of its ranks."""
    if folder := place.on_disk(name):
        yield folder
        return
    token = int(ranks.sum(os.getpid() if ranks.main else 0)[0])
    into = Path(tempfile.gettempdir()) / f"nudge-fetched-{token}-{name}"
    try:
        if ranks.local_rank == 0:
            place.fetch(name, into)
        ranks.wait()
        yield into
    finally:
        if ranks.local_rank == 0:
            shutil.rmtree(into, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:09}"


def _tensors(network: Network, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The trained weights, the model's buffers and AdamW's moments; tensors, not copies."""
    named = {n: p for n, p in network.model.named_parameters() if p.requires_grad}
    frozen = {n for n, _ in network.model.named_parameters(remove_duplicate=False)}
    buffers = {n: t for n, t in network.model.state_dict().items() if n not in frozen}
    tensors = {f"model.{name}": tensor.detach() for name, tensor in {**named, **buffers}.items()}
    for name, parameter in named.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"optimizer.{moment}.{name}"] = optimizer.state[parameter][moment]
    return tensors


def _why(error: BaseException) -> str:
    """One sentence about an error, or about those that ranks had in `torch.distributed`."""
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [failure[0] for failure in error.failures.values()]
    if any(disk_is_full(cause) for cause in causes):
        return "no space is left there"
    return "; ".join(f"{cause}" for cause in causes)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without DCP's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
