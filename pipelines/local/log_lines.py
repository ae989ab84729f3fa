"""What the log of a run says besides the pipeline engine's own lines."""

import re
from collections.abc import Iterator

TASK = re.compile(r".*Executing task '([\w-]+)'|.*Task '([\w-]+)' finished")


def step_lines(lines: Iterator[str], step: str | None, raw: bool) -> Iterator[str]:
    """The lines of one step, or of all; without ``raw`` those of the steps' own programs alone."""
    current, in_block = "", False
    for line in lines:
        if match := TASK.match(line):
            current = match[1] or ""
            in_block = False
            if not raw and match[1] and not step:
                yield f"== {match[1]}"
        wanted = not step or current.replace("-", "_") == step
        if raw:
            if wanted:
                yield line
            continue
        if not current or not wanted or not line.startswith("    "):
            continue
        text = line[4:]
        if text.startswith("[KFP Executor"):
            in_block = text.rstrip().endswith(("executor_input:", ":"))
            continue
        if in_block:  # the JSON that the engine prints
            in_block = text != "}"
            continue
        yield text
