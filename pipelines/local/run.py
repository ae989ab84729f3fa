"""`nudge run`: the whole pipeline here, watched through the events that the steps write."""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from nudge.components.common.processes import locked
from nudge.components.common.provenance import code_fingerprint
from nudge.components.common.publish import write_atomic
from nudge.pipelines.recipes import Recipe

STEPS = ("ingest", "tokenize", "train", "evaluate", "upload", "register", "deploy", "summary")
POLL_S = 0.1
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

    def apply(self, event: dict[str, Any]) -> None:
        """Take in one event of `nudge.components.common.progress`."""
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
    lock: Any = None
    """Held for as long as the command runs that the run is of."""

    @property
    def log(self) -> Path:
        return self.folder / "run.log"

    @property
    def failed(self) -> StepState | None:
        """The step that failed; None if none did."""
        return next((step for step in self.steps.values() if step.status == "failed"), None)


def begin(recipe: Recipe, home: Path, *, fresh: bool = False) -> Run:
    """A run with a folder of its own, named by time and a few random digits.

    If the last run of this recipe, by this code, was cut off after it had begun to publish its
    model, or failed there, this is that run again: what it left half done is finished under its
    name, where a new run would leave it lying. ``fresh`` always begins a new one.
    """
    with locked(home, "runs"):
        cut_off = None if fresh else _cut_off(recipe, home)
        if cut_off is not None:
            return cut_off
        run_id = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        folder = home / "runs" / run_id
        folder.mkdir(parents=True)
        write_atomic(folder / "recipe.yaml", recipe.text)
        write_atomic(folder / "code", code_fingerprint())
        return _run(recipe, folder)


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
        code, events = folder / "code", folder / "events.jsonl"
        same = code.is_file() and code.read_text() == code_fingerprint()
        if not same or not events.is_file() or not _half_published(folder, events):
            return None
        try:
            run = _run(recipe, folder)
        except BlockingIOError:
            return None
        events.replace(folder / "events-before.jsonl")
        run.continued = True
        return run
    return None


def _half_published(folder: Path, events: Path) -> bool:
    begun = {json.loads(line)["step"] for line in events.read_text().splitlines()}
    if not begun & set(PUBLISHING[:-1]):
        return False
    path = folder / "result.json"
    if not path.is_file():
        return True
    ended = {step["name"]: step["status"] for step in json.loads(path.read_text())["steps"]}
    # One that the upload refused may hold another model by now: it is not tried again.
    return any(ended[name] == "failed" for name in PUBLISHING[1:])


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
    """
    events = run.folder / "events.jsonl"
    events.touch()
    environment = {
        **os.environ,
        **services,
        "NUDGE_RUN_ID": run.run_id,
        "NUDGE_RECIPE": run.recipe.name,
        "NUDGE_EVENTS": str(events),
        "NUDGE_HOME": str(home),
        "NUDGE_CHECKPOINTS": os.environ.get("NUDGE_CHECKPOINTS") or str(home / "checkpoints"),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("NUDGE_REUSE", None)
    if reuse:
        environment["NUDGE_REUSE"] = str(home / "reuse")
    command = [sys.executable, "-m", "nudge.pipelines.local.runner"]
    command += ["--recipe", str(run.folder / "recipe.yaml")]
    command += ["--artifacts", str(run.folder / "artifacts"), "--engine", engine]
    command += ["--compiled", str(compiled)] if compiled else []
    started = time.monotonic()
    with run.log.open("ab") as log, events.open(encoding="utf-8") as lines:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
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
    promoted: whether the candidate is served now; reason: the evaluation's verdict in words.
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
    values = {
        "recipe": run.recipe.name,
        "run_id": run.run_id,
        "steps": [
            {"name": step.name, "seconds": round(step.seconds, 3), "status": step.status}
            for step in run.steps.values()
        ],
        "metrics": {
            which: {key: metrics[key] for key in (*names, *counts)}
            for which, metrics in evaluation.get("metrics", {}).items()
        },
        "probes": [
            {key: probe[key] for key in ("prompt", "target", "p_before", "p_after", "expect", "ok")}
            for probe in evaluation.get("probes", [])
        ],
        "promoted": run.steps["deploy"].status == "done",
        "reason": NOTHING_NEW if nothing_new else evaluation.get("verdict", {}).get("reason"),
        "model_path": run.steps["train"].outputs.get("model"),
        "model_uri": results["upload"].get("uri"),
        "registered_model": results["register"].get("registered_model"),
        "version": results["register"].get("version"),
        "endpoint": results["deploy"].get("endpoint"),
        "served_model": results["deploy"].get("served_model"),
        "report": str(run.folder / "report.html") if report else None,
        "seconds": round(run.seconds, 3),
        "overhead_seconds": round(run.seconds - sum(s.seconds for s in run.steps.values()), 3),
        "error": failed.error if failed else None,
    }
    due = ["ingest", "summary"]
    due += ["tokenize", "train", "evaluate"] if results["ingest"].get("new") else []
    due += ["upload", "register", "deploy"] if evaluation.get("verdict", {}).get("promote") else []
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


def _evaluation(run: Run) -> dict[str, Any]:
    path = run.steps["evaluate"].outputs.get("evaluation")
    return dict(json.loads(Path(path).read_text(encoding="utf-8"))) if path else {}


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End a child and all that it started; a group that has ended already is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
