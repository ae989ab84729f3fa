"""A process that runs checks one after another and writes how each ends, one JSON line per event.

It is a process of its own, because a fault on a GPU can leave CUDA unusable until the process ends.
Lines are ``{"event": "machine", ...}``, ``{"event": "start", "name", "title", "limit_s"}`` and
``{"event": "end", ...}`` with the fields of an `Outcome`.
"""

import dataclasses
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.pipelines.gpu_check.catalog import check_named
from nudge.pipelines.gpu_check.checks import Here, Outcome, Skipped
from nudge.pipelines.gpu_check.facts import machine

EXTRA = "pip install 'nudge-lm[train]'"
DETAIL_LINES = 40


def outcome(name: str, here: Here, write: Any) -> Outcome:
    """Run one check."""
    started, title = time.monotonic(), name
    state: Any = "passed"
    message = detail = ""
    figures: dict[str, Any] = {}
    try:
        check = check_named(name)
        title = check.title
        write({"event": "start", "name": name, "title": title, "limit_s": check.limit_s})
        figures = check.run(here)
    except Skipped as reason:
        state, message = "skipped", str(reason)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "nudge":
            raise
        state = "skipped"
        message = f"needs the Python package {package}, which is not installed; {EXTRA} has it"
    # Whatever a library raises is what this command is there to report.
    except Exception as error:  # noqa: BLE001
        state, message = "failed", sentence(error)
        detail = "\n".join(traceback.format_exc().splitlines()[-DETAIL_LINES:])
    seconds = time.monotonic() - started
    return Outcome(name, title, state, message, detail, round(seconds, 2), figures)


def sentence(error: BaseException) -> str:
    """What an exception says, on one line, with its type unless it is ours."""
    text = " ".join(str(error).split())[:600] or "no message"
    own = isinstance(error, UserError) or (isinstance(error, AssertionError) and str(error))
    return text if own else f"{type(error).__name__}: {text}"


def main(device: str, folder: str, results: str, names: list[str]) -> None:
    """Run the checks of these names, and append their lines to the file ``results``."""
    with Path(results).open("a", encoding="utf-8", buffering=1) as file:

        def write(values: dict[str, Any]) -> None:
            print(json.dumps(values), file=file, flush=True)

        write({"event": "machine", **machine(device)})
        here = Here("cuda" if device == "gpu" else "cpu", Path(folder))
        for name in names:
            write({"event": "start", "name": name, "title": name, "limit_s": 120.0})
            ended = outcome(name, here, write)
            write({"event": "end", **dataclasses.asdict(ended)})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
