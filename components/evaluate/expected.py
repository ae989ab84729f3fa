"""What a chat model must do besides scoring well: answer as expected, and end its turn."""

import re
from collections.abc import Sequence

from nudge.components.common.artifacts.evaluation import Check
from nudge.components.evaluate.completions import Completion
from nudge.components.evaluate.settings import EvaluateSettings, ExpectedAnswer


def answer_checks(expected: Sequence[ExpectedAnswer], answers: Sequence[Completion]) -> list[Check]:
    """One check per expected answer; ``answers`` are in the same order."""
    return [
        Check(
            "answer",
            each.prompt,
            ok := matches(each, answer.text),
            f"asked {each.prompt!r}, the model answers {_short(answer.text)!r}, which "
            f"{'is' if ok else 'is not'} as expected ({each.match} {each.answer!r})",
        )
        for each, answer in zip(expected, answers, strict=True)
    ]


def matches(expected: ExpectedAnswer, text: str) -> bool:
    """Whether an answer is as expected."""
    if expected.match == "regex":
        return re.search(expected.answer, text, re.IGNORECASE) is not None
    wanted, found = expected.answer.strip().casefold(), text.strip().casefold()
    return wanted == found if expected.match == "exact" else wanted in found


def turn_checks(answers: Sequence[Completion], settings: EvaluateSettings) -> list[Check]:
    """One check: enough answers of a chat model end with its end-of-turn token."""
    if not answers:
        return []
    ended = sum(answer.ended for answer in answers)
    return [
        Check(
            "turn",
            "ends its turn",
            ended >= settings.ends_turn_share * len(answers),
            f"{ended} of {len(answers)} answers end with the end-of-turn token within "
            f"{settings.answer_tokens} tokens, where {settings.ends_turn_share:.0%} must",
        )
    ]


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"
