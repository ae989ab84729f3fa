"""What users of a version experience, measured: errors, time to first token, speed, answers.

The canary asks the candidate and the incumbent the same prompts at the same time, each from its own
server and in its own form (a chat or a text to continue), and streams the answers. The gateway or
the server counts what users send. vLLM's counters include the requests of the canary, so on a
cluster those count twice.
"""

import itertools
import json
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nudge.components.common.clients.registry.releases import Version
from nudge.components.deploy.smoke import (
    NEUTRAL,
    PART,
    SURE,
    Asked,
    ModelServer,
    expected_next,
    in_form_of,
    request,
)

PAUSE_S = 1.0
"""Between two requests to one version: the canary must not be a load of its own."""
TIMEOUT_S = 60.0
MALFORMED = (ValueError, LookupError, TypeError, AttributeError)
"""What reading an answer raises if it is not a completion."""


@dataclass(frozen=True)
class Counts:
    """Requests to a version, and how many of them its server failed to answer (status 5xx)."""

    requests: int = 0
    errors: int = 0


@dataclass(frozen=True)
class Measured:
    """One version over one period; a figure is None if nothing was measured."""

    requests: int = 0
    """The canary's and the users' together."""
    errors: int = 0
    first_token_s: float | None = None
    """The median."""
    tokens_per_s: float | None = None
    """The median, after the first token."""
    answers: int = 0
    """Answers to prompts whose next token the evaluation was sure of."""
    right: int = 0
    """How many of those begin with that token."""

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0


def prompts_of(smoke_prompt: str, versions: Sequence[Version]) -> dict[str, Asked]:
    """The smoke prompt and the evaluated prompts of all versions; each as a text, or as the turns
    of the chat in which a version was evaluated."""
    found: dict[str, Asked] = {smoke_prompt: smoke_prompt}
    for version in versions:
        for each in expected_next(version):
            if not isinstance(found.get(each["prompt"]), list):
                found[each["prompt"]] = each.get("messages") or each["prompt"]
    return found


@dataclass
class Probe:
    """Asks one version until it is stopped; `measured` can be read at any time.

    ``prompts`` come from `prompts_of`. The version gets each in the form in which it was evaluated,
    and any other prompt as a chat if it was trained on conversations, else as a text.
    """

    server: ModelServer
    version: Version
    prompts: Mapping[str, Asked]
    tokens: int
    _first: list[float] = field(default_factory=list)
    _speeds: list[float] = field(default_factory=list)
    _asked: int = 0
    _errors: int = 0
    _answers: int = 0
    _right: int = 0

    def __post_init__(self) -> None:
        listed = expected_next(self.version)
        self._expected = {
            each["prompt"]: each["token"]
            for each in listed
            if each["p"] > SURE and not each["token"].endswith(PART)
        }
        own: dict[str, Asked] = {
            each["prompt"]: each.get("messages") or each["prompt"] for each in listed
        }
        self._asked_as = {prompt: own.get(prompt) or self._form(prompt) for prompt in self.prompts}
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._ask_all, daemon=True)

    def _form(self, prompt: str) -> Asked:
        form, turns = in_form_of(self.version, prompt), self.prompts[prompt]
        return form if isinstance(form, str) or isinstance(turns, str) else turns

    def __enter__(self) -> "Probe":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(2 * TIMEOUT_S)

    @property
    def finished(self) -> int:
        """The requests that were answered or failed so far."""
        return self._asked

    def measured(self, users: Counts | None = None) -> Measured:
        """The figures so far, with those of users if they are known."""
        users = users or Counts()
        with self._lock:
            return Measured(
                requests=self._asked + users.requests,
                errors=self._errors + users.errors,
                first_token_s=statistics.median(self._first) if self._first else None,
                tokens_per_s=statistics.median(self._speeds) if self._speeds else None,
                answers=self._answers,
                right=self._right,
            )

    def _ask_all(self) -> None:
        with self.server.client(timeout_s=TIMEOUT_S) as client:
            for prompt in itertools.cycle(self.prompts):
                self._ask(client, prompt)
                if self._stop.wait(PAUSE_S):
                    return

    def _ask(self, client: Any, prompt: str) -> None:
        import httpx

        try:
            asked = self._asked_as[prompt]
            text, first_s, speed = stream(client, self.version.model, asked, self.tokens)
        except (httpx.HTTPError, *MALFORMED):
            with self._lock:
                self._asked, self._errors = self._asked + 1, self._errors + 1
            return
        with self._lock:
            self._asked += 1
            self._first.append(first_s)
            if speed is not None:
                self._speeds.append(speed)
            if prompt in self._expected:
                self._answers += 1
                self._right += text.lstrip().startswith(self._expected[prompt].strip())


def stream(client: Any, model: str, asked: Asked, tokens: int) -> tuple[str, float, float | None]:
    """A greedy answer: its text, the seconds until its first token, and tokens per second.

    The speed is None if the server does not stream, or for fewer than two tokens. Raises
    `httpx.HTTPError`, or one of `MALFORMED` if the answer is not a completion.
    """
    path, body = request(model, asked, tokens)
    for fields in NEUTRAL:
        started = time.monotonic()
        with client.stream("POST", path, json={**body, **fields, "stream": True}) as answer:
            if answer.status_code in (400, 422):  # these refuse an unknown field
                continue
            answer.raise_for_status()
            return _read(answer, started)
    raise ValueError(f"the server refuses every form of a completion ({answer.status_code})")


def _read(answer: Any, started: float) -> tuple[str, float, float | None]:
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        text = _text(json.loads(answer.read())["choices"][0])
        return text, time.monotonic() - started, None
    parts, times = [], []
    for line in answer.iter_lines():
        if not line.startswith("data:") or line.removeprefix("data:").strip() == "[DONE]":
            continue
        choices = json.loads(line.removeprefix("data:"))["choices"]
        if choices and (text := _text(choices[0])):
            parts.append(text)
            times.append(time.monotonic())
    if not parts:
        raise ValueError("an empty answer")
    took = times[-1] - times[0]
    return "".join(parts), times[0] - started, (len(times) - 1) / took if took else None


def _text(choice: Any) -> str:
    """The text of a completion, of a chat's answer, or of a part of one; empty if it has none.

    Reasoning counts too, which servers report separately: vLLM as ``reasoning`` (before 0.12 as
    ``reasoning_content``), transformers as ``reasoning_content``.
    """
    if "text" in choice:
        return str(choice["text"] or "")
    part = choice["delta" if "delta" in choice else "message"]
    names = ("content", "reasoning_content", "reasoning")
    return next((str(part[name]) for name in names if part.get(name)), "")
