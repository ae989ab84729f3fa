"""A pairwise judge: another model says which of two answers is better, asked in both orders.

Judges prefer the answer that they read first (Zheng et al., arXiv:2306.05685), so a preference
counts only if it is the same in both orders. Otherwise the two answers tie.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

from nudge.components.common.artifacts.evaluation import Check, Judged
from nudge.components.common.clients.tls import tls_context
from nudge.components.common.core.errors import UserError
from nudge.components.evaluate.completions import Completion
from nudge.components.evaluate.settings import JudgeSettings

KEY = "NUDGE_JUDGE_KEY"
"""The variable with the endpoint's key, if it asks for one."""
TIMEOUT_S = 120.0
PROMPT = """\
Compare two answers to the same question. Judge which one is more correct and more helpful; do not
prefer an answer because it is longer or because it comes first.

Question:
{question}

Answer A:
{a}

Answer B:
{b}

Reply with one letter and nothing else: A or B for the better answer, C if they are equally good."""


def judged(
    settings: JudgeSettings, before: Sequence[Completion], after: Sequence[Completion]
) -> Judged:
    """Compare the reference's answers with the candidate's, question by question.

    Raises `UserError` if the judge does not answer, or not with a letter.
    """
    import httpx

    key = os.environ.get(KEY, "")
    wins = losses = ties = 0
    with httpx.Client(
        timeout=TIMEOUT_S,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        verify=tls_context() if settings.url.startswith("https:") else True,
    ) as client:
        for old, new in zip(before, after, strict=True):
            first = _preferred(client, settings, new.prompt, old.text, new.text)
            second = _preferred(client, settings, new.prompt, new.text, old.text)
            if (first, second) == ("B", "A"):
                wins += 1
            elif (first, second) == ("A", "B"):
                losses += 1
            else:
                ties += 1
    return Judged(
        model=settings.model, url=settings.url, prompt=PROMPT, wins=wins, losses=losses, ties=ties
    )


def judge_checks(settings: JudgeSettings, result: Judged) -> list[Check]:
    """One check, if the settings have a least share of wins; a tie counts as half of one."""
    total = result.wins + result.losses + result.ties
    if settings.min_share is None or not total:
        return []
    share = (result.wins + result.ties / 2) / total
    return [
        Check(
            "judge",
            settings.model,
            share >= settings.min_share,
            f"{settings.model} prefers the candidate in {result.wins} of {total} answers and the "
            f"other model in {result.losses} (ties: {result.ties}), a share of {share:.0%}, where "
            f"{settings.min_share:.0%} is required",
        )
    ]


def _preferred(client: Any, settings: JudgeSettings, question: str, a: str, b: str) -> str:
    """``A``, ``B`` or ``C``."""
    import httpx

    content = PROMPT.format(question=question, a=a, b=b)
    body = {
        "model": settings.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0.0,
        "max_tokens": settings.max_tokens,
    }
    try:
        answer = client.post(f"{settings.url.rstrip('/')}/chat/completions", json=body)
        answer.raise_for_status()
        text = str(answer.json()["choices"][0]["message"]["content"])
    except (httpx.HTTPError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"evaluate.judge: {settings.model} at {settings.url} does not answer ({error}); check "
            f"url and model, and the key in {KEY}"
        ) from None
    letter = letter_in(text)
    if not letter:
        raise UserError(
            f"evaluate.judge: {settings.model} answers {text[:200]!r} instead of A, B or C; use a "
            "model that follows instructions, or raise evaluate.judge.max_tokens"
        )
    return letter


ALONE = re.compile(r"[\W_]*([ABCabc])[\W_]*")
STATED = re.compile(r"(?i:.*(?::|=|\bis))[\W_]*(?i:answer\s+)?([ABC])[\W_]*")
BETTER = re.compile(
    r"[\W_]*(?i:answer\s+)?([ABC])[\W_]*\s(?i:is\s+(?:clearly\s+|much\s+|the\s+)?better"
    r"(?:\s+answer|\s+one|\s+than\s+(?:answer\s+)?[ABC])?)[\W_]*"
)
NEGATED = re.compile(r"\b(?:no|not|neither|nor|worse|weaker|less)\b|n't\b", re.IGNORECASE)


def letter_in(text: str) -> str:
    """The verdict in a judge's reply: ``A``, ``B`` or ``C``, or empty if there is none.

    The first or the last line must be a letter by itself, or state one at its end (``The better
    answer is B``); a reply of one line may also be ``A is better``. Any other letter may be an
    article or part of an explanation.
    """
    # Reasoning is not a verdict, even if the token limit cut it off.
    reply = text.rpartition("</think>")[2].partition("<think>")[0]
    lines = [line for line in reply.splitlines() if line.strip()]
    forms = (ALONE, STATED, BETTER) if len(lines) == 1 else (ALONE, STATED)
    found = {
        match[1].upper()
        for line in lines[:1] + lines[-1:]
        if not NEGATED.search(line)
        for match in (form.fullmatch(line) for form in forms)
        if match
    }
    return found.pop() if len(found) == 1 else ""
