"""The pairwise judge: both orders, ties, and answers that are no verdict."""

from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from nudge.components.common.core.errors import UserError
from nudge.components.evaluate.completions import Completion
from nudge.components.evaluate.pairwise import KEY, PROMPT, judge_checks, judged, letter_in
from nudge.components.evaluate.settings import JudgeSettings
from tests.web_server import Server


def completion(prompt: str, text: str) -> Completion:
    return Completion(prompt, text, [1], True, True)


class Judge:
    """Prefers the answer with "right" in it; without one, always the first."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.reply = ""

    async def __call__(self, request: web.Request) -> web.Response:
        if request.headers.get("authorization") != "Bearer k":
            return web.json_response({"error": "no key"}, status=401)
        body = await request.json()
        self.bodies.append(body)
        text = body["messages"][0]["content"]
        letter = "B" if "right" in text.partition("Answer B:")[2] else "A"
        content = self.reply or f"{letter}."
        message = {"role": "assistant", "content": content}
        return web.json_response({"choices": [{"message": message}]})


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Judge, JudgeSettings]]:
    monkeypatch.setenv(KEY, "k")
    made = Judge()
    with Server(("POST", "/v1/chat/completions", made)) as server:
        yield made, JudgeSettings(url=f"{server.url}/v1", model="m", min_share=0.6)


OLD = [completion("q1", "false"), completion("q2", "right"), completion("q3", "same")]
NEW = [completion("q1", "right"), completion("q2", "false"), completion("q3", "same")]


def test_a_preference_counts_only_in_both_orders(judge: tuple[Judge, JudgeSettings]) -> None:
    made, settings = judge
    found = judged(settings, OLD, NEW)
    assert (found.wins, found.losses, found.ties) == (1, 1, 1)
    assert (found.model, found.prompt) == ("m", PROMPT)
    assert len(made.bodies) == 6
    assert all(body["temperature"] == 0 for body in made.bodies)
    (check,) = judge_checks(settings, found)
    assert not check.ok
    assert "a share of 50%, where 60% is required" in check.message
    for letter in "ABC":  # a judge that looks at the order only
        made.reply = letter
        found = judged(settings, OLD, NEW)
        assert (found.wins, found.losses, found.ties) == (0, 0, 3)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("**B**", "B"),
        ("It is a clear case: B", "B"),
        ("A BETTER ANSWER IS B", "B"),
        ("[[A]]", "A"),
        ("Verdict: **C**", "C"),
        ("The better answer is Answer A.", "A"),
        ("Answer B is better.", "B"),
        ("B is better than A", "B"),
        ("B\n\nA is wrong about the year.", "B"),
        ("A names a better year.\n\nFinal answer: B", "B"),
        ("A GOOD QUESTION", ""),
        ("A is better in tone, B in facts", ""),
        ("Answer B is not better", ""),
        ("The worse one is A", ""),
        ("A\n\nOn reflection: B", ""),
        ("Plan B", ""),
        ("", ""),
        ("<think>A is longer</think>B", "B"),
        ("A is longer</think>B", "B"),
        ("<think>A is longer, but", ""),
        ("I cannot say", ""),
    ],
)
def test_the_letter_is_found_in_a_reply_and_not_in_its_reasoning(reply: str, letter: str) -> None:
    assert letter_in(reply) == letter


def test_a_judge_that_gives_no_verdict_or_no_answer_is_an_error(
    judge: tuple[Judge, JudgeSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, settings = judge
    made.reply = "I cannot say"
    with pytest.raises(UserError, match="answers 'I cannot say' instead of A, B or C"):
        judged(settings, OLD, NEW)
    monkeypatch.setenv(KEY, "other")
    with pytest.raises(UserError, match="the key in NUDGE_JUDGE_KEY"):
        judged(settings, OLD, NEW)
