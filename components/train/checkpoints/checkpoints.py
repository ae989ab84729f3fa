"""Checkpoints to resume from: torch.distributed.checkpoint (DCP), written in a background thread.

A checkpoint contains the `TrainingState`, the trained weights with AdamW's two moments, and the
history so far. Its tensors are safetensors files, one per rank, which any number of ranks can read;
DCP's default would be a pickle. Everything else is in the manifest, including a sha256 of each
file, which is verified before the file is read.
"""

import contextlib
import dataclasses
import os
import secrets
import shutil
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
from nudge.components.common.core.say import say
from nudge.components.common.core.step import disk_is_full
from nudge.components.train.checkpoints.checkpoint_store import CheckpointStore
from nudge.components.train.checkpoints.shard_writer import SafetensorsWriter
from nudge.components.train.checkpoints.training_state import TrainingState, differences
from nudge.components.train.models.network import Network
from nudge.components.train.ranks import Ranks
from nudge.components.train.record import NoTrainingLog, TrainingLog
from nudge.components.train.settings import TrainSettings

FAILURES_IN_A_ROW = 3
"""Training stops when this many checkpoints in a row fail."""


class Checkpoints:
    """The checkpoints of one run; created by `open_checkpoints`."""

    def __init__(
        self,
        store: CheckpointStore | None,
        settings: TrainSettings,
        identity: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        self.store, self.settings, self.identity, self.ranks = store, settings, identity, ranks
        self.persistent = False
        """Whether they outlive the process, so that SIGTERM should write one."""
        self._worker = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._failures = 0
        self._best: tuple[int | None, float | None] = None, None  # the last with a checkpoint
        # The same on all ranks of this run; different in the next run.
        self._token = int(ranks.sum(os.getpid() if ranks.main else 0)[0])
        self._last = ""

    def resume(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        record: TrainingLog | NoTrainingLog,
    ) -> TrainingState | None:
        """Restore the newest intact checkpoint, or the one that the setting `resume` names.

        Returns None if there is none. Raises `UserError` if the named one is damaged, missing or
        from another run, or if all checkpoints of this run are damaged.
        """
        if self.settings.resume not in ("auto", "never"):
            return self._resume_named(network, optimizer, record)
        if self.store is None:
            return None
        names = self.store.names() if self.settings.resume == "auto" else []
        damage = ""
        for name in reversed(self._agreed(names)):
            try:
                state = self._restore(self.store, name, network, optimizer, record)
            except Damaged as error:
                damage = f"{error}"
                say(f"warning: {damage}")
                continue
            self._continue_from(state, [kept for kept in names if kept <= name])
            return state
        if damage:
            raise UserError(
                f"{damage}; no older one is intact: set train.resume: never to start over"
            )
        self._clear([])
        return None

    def _resume_named(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        record: TrainingLog | NoTrainingLog,
    ) -> TrainingState:
        root, _, name = self.settings.resume.rstrip("/").rpartition("/")
        store = CheckpointStore(root)
        names = self._agreed(store.names())
        if name not in names:
            raise UserError(
                f"train.resume = {self.settings.resume!r}: no checkpoint exists there; set it to "
                "auto, never or the URI of a checkpoint"
            )
        state = self._restore(store, name, network, optimizer, record)
        if self.store is not None:
            own = store.uri == self.store.uri
            self._continue_from(state, [kept for kept in names if own and kept <= name])
        return state

    def _continue_from(self, state: TrainingState, names: list[str]) -> None:
        """Prepare to train on from a restored state; ``names`` are the checkpoints to keep."""
        self._clear(names)
        best = state.best_step
        if self.settings.keeps_best and best is not None and _name(best) not in names:
            if self.ranks.main:
                warning = f"warning: the best validation, of step {best}, has no checkpoint"
                say(f"{warning}: the search restarts")
            state.best_step, state.best_loss, state.worse_in_a_row = None, None, 0
        self._best = state.best_step, state.best_loss

    def restore_best(
        self, network: Network, optimizer: torch.optim.Optimizer, state: TrainingState
    ) -> None:
        """Restore the weights of the best validation."""
        if state.best_step is not None and state.best_step != state.step:
            assert self.store is not None
            name = _name(state.best_step)
            self._restore(self.store, name, network, optimizer, NoTrainingLog())

    def save(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
        record: TrainingLog | NoTrainingLog,
    ) -> None:
        """Copy the state now and write it in the background, once the previous one is written.

        A failed checkpoint prints a warning, and training continues until the next one; the third
        failure in a row raises `Transient`.
        """
        if self.store is None:
            return
        self.wait_for_last(state)
        stager = DefaultStager(StagingOptions(False, False, False, False))
        staged = stager.stage(_tensors(network, optimizer))
        manifest = {
            "state": dataclasses.asdict(state),
            "rows_read": state.step * self.settings.batch_sequences,
            "random": {"seed": self.settings.seed, "step": state.step},
            "identity": self.identity,
            "ranks": self.ranks.world,
            "code_version": code_version(),
        }
        lines = {name: list(kept) for name, kept in record.lines.items()}
        self._writing = self._worker.submit(self._write, _name(state.step), staged, manifest, lines)
        self._writing.add_done_callback(lambda _: stager.close())

    def wait_for_last(self, state: TrainingState) -> None:
        """Wait until the last checkpoint is written. If it failed and the best weights are kept,
        ``state`` goes back to the best before it."""
        self._wait_for_last(FAILURES_IN_A_ROW, state)

    def finish(self, state: TrainingState) -> str:
        """Wait until the last checkpoint is written and return its URI.

        Raises `Transient` if it failed.
        """
        self._wait_for_last(1, state)
        return f"{self.store.uri}/{self._last}" if self.store else ""

    def close(self) -> None:
        self._worker.shutdown()

    def run_is_done(self) -> None:
        """Remove them, because the model is finished; keep those that `train.checkpoints` names."""
        if self.store is not None and not self.settings.checkpoints:
            self._clear([])

    def _wait_for_last(self, limit: int, state: TrainingState) -> None:
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except CheckpointFailed as error:
            self._failures += 1
            if self._failures >= limit:
                raise Transient(f"{error}; the previous checkpoint is kept") from None
            say(f"warning: {error}; retrying at the next checkpoint")
            if self.settings.keeps_best:
                state.best_step, state.best_loss = self._best
        else:
            self._failures = 0
            self._best = state.best_step, state.best_loss

    def _write(
        self, name: str, staged: Any, manifest: dict[str, Any], lines: dict[str, list[str]]
    ) -> None:
        """Write, upload, agree with the other ranks, publish; runs in the background thread."""
        assert self.store is not None
        folder, files, failure = None, {}, ""
        try:
            folder = self.store.staging(name, self._token)
            with _without_dcp_warning():
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
            self.store.upload(name, mine)
        except (OSError, UserError, CheckpointException) as error:
            failure = _reason(error)
        try:
            for others, reason in self._gathered((files, failure)):
                files |= others
                failure = failure or reason
            if not failure and self.ranks.main:
                assert folder is not None
                self.store.publish(name, folder, {**manifest, "files": files})
        except (OSError, UserError) as error:
            failure = _reason(error)
        finally:
            if folder is not None:
                self._remove_staging(folder, failed=bool(failure))
        # One rank publishes, but all must agree on which checkpoint is the best.
        failure = next(filter(None, self._gathered(failure)), "")
        if failure:
            raise CheckpointFailed(f"the checkpoint {self.store.uri}/{name} failed: {failure}")
        self._last = name
        if self.ranks.main:
            try:
                self._prune(name, manifest["state"]["best_step"])
            except (OSError, UserError) as error:
                warning = f"warning: could not remove old checkpoints at {self.store.uri}"
                say(f"{warning}: {_reason(error)}")

    def _gathered(self, value: Any) -> list[Any]:
        """The value of each rank, on every rank."""
        if self.ranks.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(gathered, value, group=self.ranks.saving)
        return gathered

    def _remove_staging(self, folder: Path, failed: bool) -> None:
        # Only the main rank removes a shared folder, because others may still write there.
        if folder.exists() and (self.ranks.main or folder.parent == Path(tempfile.gettempdir())):
            shutil.rmtree(folder, ignore_errors=failed)

    def _prune(self, newest: str, best_step: int | None) -> None:
        assert self.store is not None
        names = [name for name in self.store.names() if name <= newest]
        best = [] if best_step is None else [_name(best_step)]
        for name in names[: -self.settings.checkpoints_kept]:
            if name not in best:
                self.store.remove(name)

    def _restore(
        self,
        store: CheckpointStore,
        name: str,
        network: Network,
        optimizer: torch.optim.Optimizer,
        record: TrainingLog | NoTrainingLog,
    ) -> TrainingState:
        with _fetched(store, name, self.ranks) as folder:
            manifest = store.manifest(name)
            changes = differences(manifest["identity"], self.identity)
            if changes:
                raise UserError(
                    f"the checkpoint {store.uri}/{name} is from another run: "
                    f"{'; '.join(changes)}; resume with the data and settings of that run, or set "
                    "train.resume: never"
                )
            self._verify(store, name, folder, manifest)
            tensors = _tensors(network, optimizer)
            reader = HuggingFaceStorageReader(str(folder))
            with _without_dcp_warning():
                load(tensors, storage_reader=reader)
            state = TrainingState(**manifest["state"])
            for values in optimizer.state.values():
                values["step"].fill_(state.step)
            lines = {file: (folder / file).read_text().splitlines() for file in record.lines}
            record.replay(lines)
        self.ranks.wait()
        return state

    def _verify(
        self, store: CheckpointStore, name: str, folder: Path, manifest: dict[str, Any]
    ) -> None:
        """Verify every file on one rank per machine; raise `Damaged` on all ranks on a mismatch."""
        problem = ""
        if self.ranks.local_rank == 0:
            try:
                for file, sha256 in manifest["files"].items():
                    verify_file(folder / file, sha256)
            except UserError as error:
                problem = f"{error}"
        if self.ranks.sum(float(bool(problem)))[0]:
            raise Damaged(f"the checkpoint {store.uri}/{name} is damaged: {problem}")

    def _clear(self, keep: list[str]) -> None:
        assert self.store is not None
        self.ranks.wait()
        if self.ranks.main:
            self.store.clear(keep)
        self.ranks.wait()

    def _agreed(self, names: list[str]) -> list[str]:
        """The main rank's list of names, on every rank."""
        if self.ranks.world == 1:
            return names
        buffer = [names]
        dist.broadcast_object_list(buffer, src=0, group=self.ranks.saving)
        return buffer[0]


class Damaged(UserError):
    """A checkpoint whose files do not match its manifest."""


class CheckpointFailed(RuntimeError):
    """A checkpoint that could not be written; it stays invisible."""


@contextlib.contextmanager
def _fetched(store: CheckpointStore, name: str, ranks: Ranks) -> Iterator[Path]:
    """A local folder with the checkpoint's files, which one rank per machine fetches."""
    if on_disk := store.on_disk(name):
        yield on_disk
        return
    token = int(ranks.sum(secrets.randbelow(1 << 50) if ranks.main else 0)[0])
    # Not a name that another user of this machine could have made before.
    folder = Path(tempfile.gettempdir()) / f"nudge-fetched-{token}"
    try:
        if ranks.local_rank == 0:
            folder.mkdir(mode=0o700)
            store.fetch(name, folder / name)
        ranks.wait()
        yield folder / name
    finally:
        if ranks.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:09}"


def _tensors(network: Network, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The trained weights, the model's buffers and AdamW's moments, without copying them."""
    named = {n: p for n, p in network.model.named_parameters() if p.requires_grad}
    frozen = {n for n, _ in network.model.named_parameters(remove_duplicate=False)}
    buffers = {n: t for n, t in network.model.state_dict().items() if n not in frozen}
    tensors = {f"model.{name}": tensor.detach() for name, tensor in {**named, **buffers}.items()}
    for name, parameter in named.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"optimizer.{moment}.{name}"] = optimizer.state[parameter][moment]
    return tensors


def _reason(error: BaseException) -> str:
    """One sentence about an error, or about the errors of several ranks in DCP."""
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [failure[0] for failure in error.failures.values()]
    if any(disk_is_full(cause) for cause in causes):
        return "no space is left there"
    return "; ".join(f"{cause}" for cause in causes)


@contextlib.contextmanager
def _without_dcp_warning() -> Iterator[None]:
    """Suppress DCP's warning about running in a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
