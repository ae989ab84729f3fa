"""Start the engine of a run, follow its steps through the events they write, and end all of it."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import psutil

from nudge.components.common.core import environment
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.sanitize import masked
from nudge.components.common.core.say import say
from nudge.components.common.local.child_environment import (
    OUTER_TMPDIR,
    STEP_CHILD,
    child_environment,
)
from nudge.components.common.local.private_home import PRIVATE_UMASK
from nudge.pipelines.local.run import RECIPE, Run, begin, facts
from nudge.pipelines.local.temporary import temporary_folder

POLL_S = 0.1
QUIET_S, ENDING_S = 2.0, 60.0
"""How long the steps of a stopped run may take to end: before that is reported, and at most."""


def _has_another_model(run: Run) -> bool:
    """Whether a resumed run ends up with a model other than the one that it had trained."""
    train = run.steps["train"]
    if train.unit:  # it is training: a reused step reports no progress
        return True
    return train.status == "reused" and facts(train.outputs) != run.trained


def _replacement(run: Run, home: Path) -> Run:
    """A new run instead of one that cannot be resumed, which is left unchanged."""
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
    """Run the pipeline; yields the run regularly while it runs, and once when it has ended.

    ``engine`` is "process", or "docker" for each step in a container. The pipeline runs in its own
    process group, which is ended when this generator is closed.

    The name of an interrupted run belongs to the model that it trained. If the resumed run trains
    again or reuses a different model, then its text or base model has changed, or its model was not
    kept: a new run is started, and is yielded from then on.
    """
    start = functools.partial(
        _follow_one, home=home, services=services, reuse=reuse, compiled=compiled, engine=engine
    )
    with contextlib.closing(start(run)) as following:
        for _ in following:
            yield run
            if run.continued and _has_another_model(run):
                break
        else:
            return
    yield from start(_replacement(run, home))


def _follow_one(
    run: Run,
    *,
    home: Path,
    services: dict[str, str],
    reuse: bool,
    compiled: Path | None,
    engine: str,
) -> Generator[Run, None, None]:
    run.events.touch()
    command = [sys.executable, "-P", "-m", "nudge.pipelines.local.runner"]
    command += ["--artifacts", str(run.folder / "artifacts"), "--engine", engine]
    command += ["--compiled", str(compiled)] if compiled else []
    started = time.monotonic()
    with (
        temporary_folder(run.folder) as temporary,
        run.log.open("ab") as log,
        run.events.open(encoding="utf-8") as lines,
    ):
        recipe = run.folder / RECIPE
        if masked(run.recipe.text) != run.recipe.text:
            # The steps need the credentials; this file is removed with the temporary ones.
            recipe = temporary / RECIPE
            write_atomic(recipe, run.recipe.text)
        child = subprocess.Popen(
            [*command, "--recipe", str(recipe)],
            env={**_variables(run, home, services, reuse), "TMPDIR": str(temporary)},
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
                    # A line that a full disk cut off is lost; the next ones count.
                    with contextlib.suppress(ValueError, KeyError, TypeError):
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
        elif step.status == "running":  # its process was killed and could not report it
            step.status, step.error = "failed", f"{step.name} was killed; its log is {run.log}"
    yield run


def _variables(run: Run, home: Path, services: dict[str, str], reuse: bool) -> dict[str, str]:
    """The environment variables of the engine and its steps, except TMPDIR."""
    checkpoints = os.environ.get(environment.CHECKPOINTS) or str(home / "checkpoints")
    # Among the temporary files, each run would have to compile everything once more.
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(home / "torchinductor")
    variables = {
        **child_environment(STEP_CHILD),
        **services,
        environment.RUN_ID: run.run_id,
        environment.RECIPE: run.recipe.name,
        environment.EVENTS: str(run.events),
        environment.HOME: str(home),
        environment.CHECKPOINTS: checkpoints,
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "PYTHONUNBUFFERED": "1",
        OUTER_TMPDIR: os.environ.get("TMPDIR", ""),
        "TORCHINDUCTOR_CACHE_DIR": inductor,
    }
    variables.pop(environment.REUSE, None)
    if reuse:
        variables[environment.REUSE] = str(home / "reuse")
    return variables


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End a child and its whole process group; returns when none of the processes is running.

    A step outlives the engine that started it, because training writes a checkpoint first.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    asked, reported = time.monotonic(), False
    try:
        while _group(child) and time.monotonic() - asked < ENDING_S:
            if not reported and time.monotonic() - asked > QUIET_S:
                reported = True
                say(
                    "waiting for the step to end (training writes a checkpoint first); "
                    "press Ctrl-C to end it at once"
                )
            time.sleep(POLL_S)
    finally:
        for member in (members := _group(child)):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(members, timeout=ENDING_S)
        child.wait()


def _group(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The running processes of a child's group."""
    child.poll()  # an ended child that nobody waited for would count as running
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            ours = os.getpgid(process.pid) == child.pid
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members
