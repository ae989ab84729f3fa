"""The logs of a run's steps as they arrive, and the progress and results in their lines.

The pipelines server returns the complete log of a pod at the address below, as plain text. The
address is in the server's source (backend/src/apiserver/main.go) and not in the API's description.
If there is no log, it answers 200 with an error in the body.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.progress import RESULTS, SHOWN
from nudge.pipelines.cluster.connect import PipelinesServer
from nudge.pipelines.step_state import StepState

ADDRESS = "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log"
INTERVAL_S = 5.0
BYTES_PER_S = 100_000
"""A log is read less often as it grows, so that no more than this is transferred."""

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class _Seen:
    """How much of a pod's log was returned already."""

    characters: int = 0
    next: float = 0.0
    ended: bool = False
    name: str = ""
    """The pod's name, once one of the possible names was found to be right."""


@dataclass
class Logs:
    """The logs of the pods of one run; ``problem`` says why there are none, once that is known."""

    server: PipelinesServer
    run_id: str
    problem: str = ""
    _seen: dict[tuple[str, ...], _Seen] = field(default_factory=dict)

    def lines(
        self, steps: dict[str, StepState], pods: dict[str, tuple[str, ...]]
    ) -> Iterator[tuple[str, str]]:
        """Each new line with the name of its step; ``pods`` has the names that the newest pod of
        each step may have, the likeliest first."""
        for name, step in steps.items():
            pod = pods.get(name, ())
            if not pod or self.problem or step.status in ("waiting", "skipped", "reused"):
                continue
            seen = self._seen.setdefault(pod, _Seen())
            over = step.status != "running"
            if seen.ended or (not over and time.monotonic() < seen.next):
                continue
            text = self._first_text(seen, pod)
            seen.next = time.monotonic() + INTERVAL_S + len(text) / BYTES_PER_S
            seen.ended = over
            for line in _fresh(seen, text, over):
                _take_in(step, line)
                yield name, line

    def _first_text(self, seen: _Seen, names: tuple[str, ...]) -> str:
        """The log of the pod that has one of these names; empty if it cannot be had now."""
        for name in (seen.name,) if seen.name else names:
            text = self._text(name)
            if text is None:
                break
            if text:
                seen.name = name
                return text
        return ""

    def _text(self, pod: str) -> str | None:
        """A pod's log; empty if there is no such pod, None if the server does not hand it out."""
        api = self.server.api("RunServiceApi").api_client
        place = {"run_id": self.run_id, "node_id": pod}
        try:
            answer = self.server.change(
                f"read the log of {pod}", api.call_api, ADDRESS, "GET", place,
                auth_settings=["Bearer"], _return_http_data_only=True, _preload_content=False,
            )  # fmt: skip
        except UserError as error:
            # A server that is busy may answer the next time; these answers stay as they are.
            if re.search(r"answered (401|403|404|405|501)", str(error)):
                self.problem = str(error)
            return None
        text = str(answer.data.decode("utf-8", errors="replace"))
        return "" if text.startswith('{"error_message"') else text


def _fresh(seen: _Seen, text: str, over: bool) -> list[str]:
    """The whole lines that come after what was given; all where the log was begun anew."""
    if len(text) < seen.characters:
        if not text:
            return []
        seen.characters = 0
    end = len(text) if over else text.rfind("\n") + 1
    part, seen.characters = text[seen.characters : end], max(end, seen.characters)
    # What a document or a library brought into a log must not steer somebody's terminal.
    return [CONTROL.sub("", line) for line in part.splitlines()]


def _take_in(step: StepState, line: str) -> None:
    if match := SHOWN.fullmatch(line.strip()):
        step.done, step.unit = float(match[2]), match[4]
        step.total = float(match[3]) if match[3] else None
        step.fields = {"": match[5]} if match[5] else {}
    elif RESULTS in line:
        values = _json(line.partition(RESULTS)[2])
        step.results = values if isinstance(values, dict) else {}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
