"""`nudge run`: the whole pipeline here, watched through the events that the steps write."""

import contextlib
import fcntl
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from nudge.components.common.artifacts.evaluation import Evaluation, read_evaluation
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.processes import (
    OUTER_TMPDIR,
    PRIVATE_UMASK,
    STEP_CHILD,
    child_environment,
    locked,
)
from nudge.components.common.core.provenance import code_fingerprint
from nudge.components.common.core.publish import write_atomic
from nudge.pipelines.recipes import Recipe

STEPS = ("ingest", "tokenize", "train", "evaluate", "upload", "register", "deploy", "summary")
PROBE_KEYS = ("prompt", "target", "p_before", "p_after", "expect", "ok")
POLL_S = 0.1
QUIET_S, ENDING_S = 2.0, 60.0
"""How long the steps of a run that is stopped may take to end: without a word, and at most."""
EVENTS, BEFORE = "events.jsonl", "events-before.jsonl"
"""Of a run that is gone on with, what its steps told before stands in a file of its own."""
TEMPORARY, PREFIX = "tmp", "nudge-"
"""In a run's folder, while its steps are at work: a link to the folder of their temporary files,
whose name begins so."""
PUBLISHING = ("upload", "register", "deploy", "summary")
"""The steps that change what others see; a run that was cut off in one is gone on with."""
NOTHING_NEW = "there is no new text: the served version was trained on all of it"


@dataclass
class StepState:
    """What is known of a step so far."""

    name: str
    status: str = "waiting"
    seconds: float = 0.0
    started: float = 0.0
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    attempts: int = 1
    note: str = ""
    """Why it waits, where that is known."""

    def apply(self, event: dict[str, Any]) -> None:
        """Take in one event of `nudge.components.common.core.progress`."""
        kind = event["event"]
        if kind == "step_start":
            self.status, self.started = "running", event["time"]
        elif kind in ("start", "progress"):
            self.done, self.total, self.unit = event["done"], event["total"], event["unit"]
            self.fields = event["fields"]
        elif kind == "step_end":
            self.status, self.seconds = event["status"], event["seconds"]
            self.outputs, self.results = event["outputs"], event["results"]
        elif kind == "step_failed":
            self.status, self.error = "failed", event["error"]
            self.seconds = event["time"] - self.started


@dataclass
class Run:
    """A run of the pipeline on this machine, and its folder."""

    recipe: Recipe
    run_id: str
    folder: Path
    steps: dict[str, StepState]
    seconds: float = 0.0
    exit_status: int = 0
    continued: bool = False
    """Whether an earlier command began it."""
    trained: str = ""
    """The facts of the model that it trained then."""
    lock: Any = None
    """Held for as long as the command runs that the run is of."""

    @property
    def log(self) -> Path:
        return self.folder / "run.log"

    @property
    def events(self) -> Path:
        return self.folder / EVENTS

    @property
    def failed(self) -> StepState | None:
        """The step that failed; None if none did."""
        return next((step for step in self.steps.values() if step.status == "failed"), None)


def begin(recipe: Recipe, home: Path, *, fresh: bool = False) -> Run:
    """A run with a folder of its own, named by time and a few random digits.

    If the last run of this recipe, by this code, was cut off after it had begun to publish its
    model, or failed there, this is that run again: what it left half done is finished under its
    name, where a new run would leave it lying. Whether its model is the same is seen by `follow`.
    ``fresh`` always begins a new one.
    """
    with locked(home, "runs"):
        _remove_leftovers(home)
        cut_off = None if fresh else _cut_off(recipe, home)
        if cut_off is not None:
            return cut_off
        run_id = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        folder = home / "runs" / run_id
        folder.mkdir(parents=True)
        write_atomic(folder / "recipe.yaml", recipe.text)
        write_atomic(folder / "code", code_fingerprint())
        return _run(recipe, folder)


def under_way(home: Path) -> list[str]:
    """The ids of the runs whose command is at work."""
    with locked(home, "runs"):
        return [path.parent.name for path in sorted((home / "runs").glob("*/lock")) if _held(path)]


def _held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@contextlib.contextmanager
def _temporary(run: Run) -> Iterator[Path]:
    """A folder for the temporary files of a run's steps, kfp's among them, which goes with them.

    It stands where this machine has such files (on the disk, or in the memory, that they would take
    anyway) under a short name, and not in the run's folder: the sockets that multiprocessing, torch
    and Ray make in it may have paths of 107 bytes. By the link there it is found after a kill.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    except OSError as error:
        raise UserError(
            f"there is no place for temporary files: {error}; free some space, or set TMPDIR"
        ) from None
    link = run.folder / TEMPORARY
    try:
        link.unlink(missing_ok=True)  # of before a reboot
        link.symlink_to(folder)
        yield folder
    finally:
        _remove_temporary(link, folder)


def _remove_temporary(link: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    link.unlink(missing_ok=True)


def _remove_leftovers(home: Path) -> None:
    """Remove the temporary files of runs whose command was killed."""
    for link in (home / "runs").glob(f"*/{TEMPORARY}"):
        if link.is_symlink() and not _held(link.with_name("lock")):
            folder = link.readlink()
            if folder.name.startswith(PREFIX):  # nothing else is ever removed through a link
                _remove_temporary(link, folder)


def _run(recipe: Recipe, folder: Path) -> Run:
    run = Run(recipe, folder.name, folder, {name: StepState(name) for name in STEPS})
    run.lock = (folder / "lock").open("w")
    fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return run


def _cut_off(recipe: Recipe, home: Path) -> Run | None:
    """The last run of a recipe, to be gone on with; None if it is at work, or ended well."""
    for folder in sorted((home / "runs").glob("*"), reverse=True):
        asked = folder / "recipe.yaml"
        if not asked.is_file() or asked.read_text(encoding="utf-8") != recipe.text:
            continue
        code = folder / "code"
        same = code.is_file() and code.read_text() == code_fingerprint()
        told = _told(folder)
        if not same or not _half_published(folder, told):
            return None
        try:
            run = _run(recipe, folder)
        except BlockingIOError:
            return None
        if run.events.is_file():
            with (folder / BEFORE).open("ab") as before:
                before.write(run.events.read_bytes())
            run.events.unlink()
        run.continued = True
        ends = [each for each in told if each["event"] == "step_end" and each["step"] == "train"]
        run.trained = _facts(ends[0]["outputs"]) if ends else ""
        return run
    return None


def _told(folder: Path) -> list[dict[str, Any]]:
    """All that the steps of a run told, from its first beginning on."""
    paths = [path for name in (BEFORE, EVENTS) if (path := folder / name).is_file()]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def _half_published(folder: Path, told: list[dict[str, Any]]) -> bool:
    if not any(event["step"] in PUBLISHING[:-1] for event in told):
        return False
    # One that the upload refused may hold another model by now: it is not tried again.
    uploads = [event["event"] for event in told if event["step"] == "upload"]
    if "step_failed" in uploads[-1:]:
        return False
    result = folder / "result.json"
    return not result.is_file() or json.loads(result.read_text())["error"] is not None


def _facts(outputs: dict[str, str]) -> str:
    """What a model was made of, and its weights' sha256; empty if its folder is gone."""
    path = Path(outputs["model"]) / "nudge.json"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _has_another_model(run: Run) -> bool:
    """Whether a run that was cut off does not come to the model that it had trained."""
    train = run.steps["train"]
    if train.unit:  # it trains again: only a step that is reused counts nothing
        return True
    return train.status == "reused" and _facts(train.outputs) != run.trained


def _begun_anew(run: Run, home: Path) -> Run:
    """A new run in the place of one that cannot be gone on with, which is left as it was."""
    run.events.unlink()
    run.lock.close()
    return begin(run.recipe, home, fresh=True)


def follow(
    run: Run,
    home: Path,
    services: dict[str, str],
    *,
    reuse: bool,
    compiled: Path | None = None,
    engine: str = "process",
) -> Generator[Run, None, None]:
    """Run the pipeline; yields the run each time something of it is new, and when it has ended.

    ``engine`` is "process", or "docker": each step in a container. The pipeline runs in a process
    group of its own, which is ended when this generator is closed.

    A run that was cut off has trained the model that has its name. If it comes to train again, or
    to another model that is reused, then its text or base model is another one by now, or what it
    trained was not kept: a new run is begun, which is what is yielded from there on.
    """
    start = functools.partial(
        _follow, home=home, services=services, reuse=reuse, compiled=compiled, engine=engine
    )
    with contextlib.closing(start(run)) as following:
        for _ in following:
            yield run
            if run.continued and _has_another_model(run):
                break
        else:
            return
    yield from start(_begun_anew(run, home))


def _follow(
    run: Run,
    *,
    home: Path,
    services: dict[str, str],
    reuse: bool,
    compiled: Path | None,
    engine: str,
) -> Generator[Run, None, None]:
    events = run.events
    events.touch()
    environment = {
        **child_environment(STEP_CHILD),
        **services,
        "NUDGE_RUN_ID": run.run_id,
        "NUDGE_RECIPE": run.recipe.name,
        "NUDGE_EVENTS": str(events),
        "NUDGE_HOME": str(home),
        "NUDGE_CHECKPOINTS": os.environ.get("NUDGE_CHECKPOINTS") or str(home / "checkpoints"),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "PYTHONUNBUFFERED": "1",
        OUTER_TMPDIR: os.environ.get("TMPDIR", ""),
        # Among the temporary files each run would compile anew.
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        or str(home / "torchinductor"),
    }
    environment.pop("NUDGE_REUSE", None)
    if reuse:
        environment["NUDGE_REUSE"] = str(home / "reuse")
    command = [sys.executable, "-P", "-m", "nudge.pipelines.local.runner"]
    command += ["--recipe", str(run.folder / "recipe.yaml")]
    command += ["--artifacts", str(run.folder / "artifacts"), "--engine", engine]
    command += ["--compiled", str(compiled)] if compiled else []
    started = time.monotonic()
    with (
        _temporary(run) as temporary,
        run.log.open("ab") as log,
        events.open(encoding="utf-8") as lines,
    ):
        child = subprocess.Popen(
            command,
            env={**environment, "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=PRIVATE_UMASK,
        )
        try:
            ended = False
            while not ended:
                ended = child.poll() is not None
                while line := lines.readline():
                    event = json.loads(line)
                    run.steps[event["step"]].apply(event)
                run.seconds = time.monotonic() - started
                yield run
                time.sleep(0 if ended else POLL_S)
        finally:
            _end_group(child)
    run.exit_status = child.returncode
    for step in run.steps.values():
        if step.status == "waiting":
            step.status = "skipped"
        elif step.status == "running":  # its process was killed and could not say so
            step.status, step.error = "failed", f"{step.name} was killed; its log is {run.log}"
    yield run


def result(run: Run) -> dict[str, Any]:
    """What `nudge run --json` prints: one object; a value that a run did not come to is None.

    recipe, run_id: names. seconds, overhead_seconds: wall time, and what of it was no step's work.
    steps: [{name, seconds, status}], status one of done, reused, skipped, failed.
    metrics: {base, candidate, and incumbent where one is served} -> {nats_per_token,
    token_perplexity, bits_per_byte, word_perplexity, tokens, bytes, documents} of held-out text;
    empty if not evaluated.
    probes: [{prompt, target, p_before, p_after, expect, ok}].
    promoted: whether the candidate is served now; reason: the evaluation's verdict in words, and
    why a candidate that it found better was not promoted.
    model_path, report: files here; model_uri: in the object store; registered_model, version: in
    the registry; endpoint, served_model: what to ask, as OpenAI's API. error: None, or what failed.
    """
    evaluation = _evaluation(run)
    results = {name: step.results for name, step in run.steps.items()}
    report = run.steps["evaluate"].outputs.get("report")
    failed = run.failed
    names = ("nats_per_token", "token_perplexity", "bits_per_byte", "word_perplexity")
    counts = ("tokens", "bytes", "documents")
    nothing_new = results["ingest"].get("new") == 0
    promoted = run.steps["deploy"].status == "done" and results["deploy"].get("promoted", True)
    reason = NOTHING_NEW if nothing_new else evaluation.verdict and evaluation.verdict.reason
    if refused := results["deploy"].get("reason"):
        reason = f"registered, not promoted: {refused} (the evaluation: {reason})"
    values = {
        "recipe": run.recipe.name,
        "run_id": run.run_id,
        "steps": [
            {"name": step.name, "seconds": round(step.seconds, 3), "status": step.status}
            for step in run.steps.values()
        ],
        "metrics": {
            which: {key: getattr(metrics, key) for key in (*names, *counts)}
            for which, metrics in evaluation.metrics.items()
        },
        "probes": [
            {key: getattr(probe, key) for key in PROBE_KEYS} for probe in evaluation.probes or ()
        ],
        "promoted": promoted,
        "reason": reason,
        "model_path": run.steps["train"].outputs.get("model"),
        "model_uri": results["upload"].get("uri"),
        "registered_model": results["register"].get("registered_model"),
        "version": results["register"].get("version"),
        "endpoint": results["deploy"].get("endpoint") if promoted else None,
        "served_model": results["deploy"].get("served_model"),
        "report": str(run.folder / "report.html") if report else None,
        "seconds": round(run.seconds, 3),
        "overhead_seconds": round(run.seconds - sum(s.seconds for s in run.steps.values()), 3),
        "error": failed.error if failed else None,
    }
    due = ["ingest", "summary"]
    due += ["tokenize", "train", "evaluate"] if results["ingest"].get("new") else []
    due += (
        ["upload", "register", "deploy"]
        if evaluation.verdict and evaluation.verdict.promote
        else []
    )
    # The engine takes a condition that it cannot evaluate for false, and a container that is gone
    # when it asks for one that ended well.
    skipped = [name for name in run.steps if name in due and run.steps[name].status == "skipped"]
    if skipped and not failed:
        values["error"] = f"the engine skipped {', '.join(skipped)}, which were due; see {run.log}"
    if run.exit_status and not failed:
        values["error"] = f"the pipeline ended with status {run.exit_status}; see {run.log}"
    return values


def keep_result(run: Run) -> dict[str, Any]:
    """Write result.json, report.html and summary.md into the run's folder; returns the result."""
    for name, (step, output) in {
        "report.html": ("evaluate", "report"),
        "summary.md": ("summary", "page"),
    }.items():
        if path := run.steps[step].outputs.get(output):
            write_atomic(run.folder / name, Path(path).read_text(encoding="utf-8"))
    values = result(run)
    write_atomic(run.folder / "result.json", json.dumps(values, indent=2) + "\n")
    return values


def _evaluation(run: Run) -> Evaluation:
    path = run.steps["evaluate"].outputs.get("evaluation")
    return read_evaluation(Path(path)) if path else Evaluation()


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End a child and all of its process group; returns when none of them runs any more.

    A step outlives the engine that started it: training writes a checkpoint first.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    asked, told = time.monotonic(), False
    try:
        while _group(child) and time.monotonic() - asked < ENDING_S:
            if not told and time.monotonic() - asked > QUIET_S:
                told = True
                print(
                    "waiting for the step to end (training writes a checkpoint first); "
                    "Ctrl-C ends it at once",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(POLL_S)
    finally:
        for member in (members := _group(child)):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(members, timeout=ENDING_S)
        child.wait()


def _group(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of a child's group that run."""
    child.poll()  # what has ended and nobody has asked for counts as one that is there
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            ours = os.getpgid(process.pid) == child.pid
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members
