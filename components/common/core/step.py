"""The step decorator: reuse of finished work, events, and a clean exit on bad input.

``@step("train", outputs=("model", "history"))`` wraps a function whose outputs are the named `Path`
parameters and whose other parameters are its inputs (settings, plain values and artifact folders).
If NUDGE_REUSE names a folder, the outputs of a finished call are kept there under the sha256 of the
step's name, the code and the *contents* of its inputs, and a later call with the same key links to
them (hard links, no copy). On a cluster the pipeline engine's own cache does this.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from nudge.components.common.core.environment import (
    NODE_ANNOTATION,
    POD_NAME,
    RETRY_INDEX,
    REUSE,
    TERMINATION_BYTES,
    TERMINATION_LOG,
    WORKFLOW_LABEL,
    in_pod,
)
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.progress import emit_event, log_results
from nudge.components.common.core.provenance import code_fingerprint
from nudge.components.common.core.publish import published, sha256_file, sha256_tree
from nudge.components.common.core.say import say
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.common.local.state_file import Damaged, read_object, read_text
from nudge.components.common.spending.usage import Usage, measured, plain_usage, usage_of

P = ParamSpec("P")
R = TypeVar("R")

REFUSAL, FAILURE = "error: ", "failed: "
"""The prefix of a termination message: after bad input, and after a failure worth a retry."""

RETRY_PATIENCE_S = 5.0
DIGESTS = "digests.json"
"""The file of a kept result with the sha256 of each of its outputs."""
USAGE = "usage.json"
"""The file of a kept result with what making it used; older releases kept none."""
_status: ContextVar[str] = ContextVar("status")
"""The status of the running step: done or reused."""
_reused: ContextVar[Usage | None] = ContextVar("reused", default=None)
"""What making the reused result of the running step used, where that is known."""


def step(
    name: str,
    *,
    outputs: tuple[str, ...] = (),
    reuse: bool = True,
    no_inputs: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare a step's plain function; it returns a dict of JSON values (its small results).

    ``reuse=False`` is for steps that read or change the world outside their inputs: ingest, upload,
    register, deploy. ``no_inputs`` are parameters that do not change what the step makes.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        kept = reusable(name, outputs=outputs, no_inputs=no_inputs)
        work = kept(function) if reuse else function

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            emit_event(name, "step_start")
            _status.set("done")
            _reused.set(None)
            with measured() as meter:
                try:
                    result = work(*args, **kwargs)
                except BaseException as error:
                    paths = [bound.arguments[key] for key in outputs]
                    full = disk_is_full(error)
                    reported = _full_disk(name, paths, bound.arguments, error) if full else error
                    text = f"{reported or type(reported).__name__}"
                    emit_event(name, "step_failed", error=text, usage=plain_usage(meter.read()))
                    if reported is error:
                        raise
                    raise reported from error
                used = meter.read()
            fields = result if isinstance(result, dict) else {}
            written = {key: str(bound.arguments[key]) for key in outputs}
            values = {"status": _status.get(), "seconds": used.seconds, "outputs": written}
            usage = {"usage": plain_usage(used)}
            if made_with := _reused.get():
                usage["made_with"] = plain_usage(made_with)
            emit_event(name, "step_end", **values, results=fields, **usage)
            log_results(name, {**fields, **usage})
            return result

        return run

    return decorate


def reusable(
    name: str, *, outputs: tuple[str, ...] = (), no_inputs: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Only the reuse of `step`, for the part of a step whose inputs must be looked up first."""
    left_out = (*outputs, *no_inputs)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            store = os.environ.get(REUSE)
            if not store:
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            inputs = {key: value for key, value in bound.arguments.items() if key not in left_out}
            kept = Path(store) / name / reuse_key(name, inputs)
            found = _kept_result(kept)
            if found is None:
                with measured() as meter:
                    result = function(*args, **kwargs)
                    used = meter.read()
                made = {output: bound.arguments[output] for output in outputs}
                _keep(kept, made, result, used)
                return result
            for output in outputs:
                _link(kept / output, bound.arguments[output])
            _status.set("reused")
            _reused.set(found["usage"])
            os.utime(kept)  # for `nudge clean`
            return found["result"]

        return run

    return decorate


def kept_usage() -> Usage | None:
    """What making the reused result of the running step used; None if it was not reused."""
    return _reused.get()


def _kept_result(kept: Path) -> dict[str, Any] | None:
    """The ``result`` of a finished call; None if there is none, or if anything of it is damaged.

    A damaged entry is removed, so that the call does its work anew and is kept again.
    """
    if not kept.is_dir():
        return None
    try:
        digests = read_object(kept / DIGESTS, "") if (kept / DIGESTS).exists() else {}
        # What an older nudge kept has no digests, and its result need not be an object.
        result = json.loads(read_text(kept / "result.json", ""))
        wrong = [name for name, each in digests.items() if _fingerprint(kept / name) != each]
        made_with = read_object(kept / USAGE, "") if (kept / USAGE).exists() else None
    except (Damaged, OSError, ValueError) as error:
        wrong = [str(error)]
    if not wrong:
        return {"result": result, "usage": usage_of(made_with)}
    say(f"{kept} is damaged ({wrong[0]}); the step runs anew")
    shutil.rmtree(kept)
    return None


def disk_is_full(error: BaseException) -> bool:
    """Whether an error means that a disk or a quota is full; safetensors and Arrow report that only
    in their text."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return os.strerror(errno.ENOSPC) in str(error)


def _full_disk(
    name: str, outputs: list[Path], arguments: dict[str, Any], error: BaseException
) -> Transient:
    """The error of a step on a full disk: which file or folder, how much is free, and how much the
    step needs at least (its outputs are at least about as large as its largest input)."""
    folders = " or ".join(sorted({str(path.parent) for path in outputs})) or "this machine"
    written = getattr(error, "filename", None)
    file = f" while it wrote {written}" if written else ""
    inputs = [each for each in arguments.values() if isinstance(each, Path)]
    needed = max((_size(each) for each in inputs if each not in outputs), default=0)
    there = next((path for each in outputs for path in each.parents if path.exists()), Path.cwd())
    free = shutil.disk_usage(there).free
    return Transient(
        f"{name}: no space is left on the disk of {folders}{file}: {free / 1e6:.1f} MB are free"
        + (f" and this step needs at least {needed / 1e6:.1f} MB" if needed > free else "")
        + "; nothing half-written stays there. Free some space "
        "(`nudge clean` shows what can go) or use a larger volume, and run it again"
    )


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def reuse_key(name: str, inputs: dict[str, Any]) -> str:
    """Hex sha256 of a step's name, code and inputs; a path counts by its content."""
    plain = {key: _fingerprint(value) for key, value in sorted(inputs.items())}
    text = json.dumps([name, code_fingerprint(), plain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _keep(kept: Path, outputs: dict[str, Path], result: Any, used: Usage) -> None:
    """Put finished outputs into the store; if two runs finish the same work, the first one does."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (kept.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.is_dir():
            return
        with published(kept) as part:
            for name, path in outputs.items():
                _link(path, part / name)
            (part / "result.json").write_text(json.dumps(result))
            (part / USAGE).write_text(json.dumps(plain_usage(used)))
            digests = {name: _fingerprint(part / name) for name in outputs}
            (part / DIGESTS).write_text(json.dumps(digests))


def _link(source: Path, target: Path) -> None:
    """Make ``target`` the same files as ``source``, by hard links where the disk allows."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        with published(target) as part:
            shutil.copytree(source, part, copy_function=_link_file, dirs_exist_ok=True)
    else:
        target.unlink(missing_ok=True)
        _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _fingerprint(value: Any) -> Any:
    if isinstance(value, Path):
        return sha256_tree(value) if value.is_dir() else sha256_file(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = dataclasses.asdict(value)
        # The content of a path may have changed while the path has not.
        uri = plain.get("base_model", "")
        if uri.startswith("incumbent://"):
            from nudge.components.common.models.base_model import resolved

            plain["base_model"] = uri = resolved(uri)
        if uri and is_local(uri) and (path := local_path(uri)).exists():
            plain["base_model"] = [uri, _fingerprint(path)]
        return plain
    return value


@contextlib.contextmanager
def exit_with_user_errors(transient_status: int = 2) -> Any:
    """Exit with only the text of a `UserError`; used by the bodies of the faces.

    In a pod that text is also the termination message. A retry of the step finds it there, exits
    with the same text and does no work, unless the error was `Transient`. The exit status is the
    error's own (2 for most), or ``transient_status`` after a `Transient`.
    """
    sentence = earlier_refusal()
    try:
        if sentence:
            raise UserError(sentence)
        yield
    except UserError as error:
        sys.stdout.flush()
        if in_pod():
            message = f"{FAILURE if isinstance(error, Transient) else REFUSAL}{error}"
            with contextlib.suppress(OSError):  # not every container has this file
                TERMINATION_LOG.write_bytes(message.encode()[:TERMINATION_BYTES])
        say(f"error: {error}")
        sys.exit(transient_status if isinstance(error, Transient) else error.status)


def earlier_refusal() -> str:
    """The message with which an earlier attempt of this step refused its input; empty if none did.

    The engine retries a failed step whatever the cause: KFP cannot express which failures are worth
    a retry. So this reads the termination messages of the step's earlier pods. If they cannot be
    read, the step does its work again.
    """
    own = os.environ.get(POD_NAME, "")
    if not own or os.environ.get(RETRY_INDEX, "") == "0":
        return ""
    from nudge.components.common.clients.kube import POD, connect

    try:
        # Give up soon: the work itself retries where it needs the cluster.
        cluster = connect(patience_s=RETRY_PATIENCE_S)
        found = [pod["metadata"] for pod in cluster.list(POD, metadata__name=own)]
        workflow = found[0].get("labels", {}).get(WORKFLOW_LABEL, "") if found else ""
        node, attempt = _attempt(found[0]) if found else ("", 0)
        if not workflow or not attempt:
            return ""
        pods = cluster.list(POD, {WORKFLOW_LABEL: workflow})
    except UserError:
        return ""
    for pod in pods:
        earlier, number = _attempt(pod["metadata"])
        if earlier == node and number < attempt:
            for status in pod.get("status", {}).get("containerStatuses") or []:
                ended = status.get("state", {}).get("terminated") or {}
                if str(ended.get("message", "")).startswith(REFUSAL) and ended.get("exitCode"):
                    return str(ended["message"]).removeprefix(REFUSAL).strip()
    return ""


def _attempt(meta: dict[str, Any]) -> tuple[str, int]:
    """The name of a pod's node in the workflow, and the number of the attempt, from 0."""
    match = re.fullmatch(r"(.*)\((\d+)\)", meta.get("annotations", {}).get(NODE_ANNOTATION, ""))
    return (match[1], int(match[2])) if match else ("", 0)
