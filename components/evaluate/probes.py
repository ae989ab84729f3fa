"""Probes: what a model expects after a prompt, compared with what another model expects."""

from collections.abc import Mapping, Sequence
from typing import Any

from nudge.components.common.artifacts.evaluation import ProbeResult, Rival, Token
from nudge.components.common.chat import ChatTemplate
from nudge.components.common.models.language_model import (
    likeliest,
    probabilities_along,
    target_ids,
    target_probability,
)
from nudge.components.evaluate.chats import Question, plain_turns
from nudge.components.evaluate.settings import EvaluateSettings, Probe


def answer(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Probe],
    questions: Sequence[Question] = (),
    template: ChatTemplate | None = None,
) -> list[dict[str, Any]]:
    """For each probe, P(target) and the ten likeliest next tokens: ``[{"p", "rivals"}]``.

    ``questions`` are the prompts of the probes as a chat model is asked them, through its template.
    """
    answers = []
    for number, probe in enumerate(probes):
        target = target_ids(tokenizer, probe.target)
        asked = questions[number] if questions else Question(probe.prompt)
        along = probabilities_along(model, asked.ids(tokenizer, template), target)
        p = target_probability(along, target)
        answers.append({"p": p, "rivals": likeliest(along[0], tokenizer)})
    return answers


def compare(
    tokenizer: Any,
    settings: EvaluateSettings,
    answers: Mapping[str, list[dict[str, Any]]],
    reference: str,
    questions: Sequence[Question] = (),
    template: ChatTemplate | None = None,
) -> list[ProbeResult]:
    """Each probe before and after; ``ok`` says whether it did what it should.

    ``answers`` are by model. A probe that should rise is compared with the base model, which the
    corpus is meant to teach; one that should hold is compared with ``reference``, which users have.
    ``questions`` and ``template`` are those of the candidate, whose tokenizer it is.
    """
    compared = []
    for number, probe in enumerate(settings.probes):
        before = reference if probe.expect == "hold" else "base"
        old, new = answers[before][number], answers["candidate"][number]
        asked = questions[number] if questions else Question(probe.prompt)
        unmoved = abs(new["p"] - old["p"]) <= settings.hold_limit * old["p"]
        compared.append(
            ProbeResult(
                prompt=probe.prompt,
                messages=plain_turns(asked),
                prompt_tokens=_tokens(tokenizer, asked.ids(tokenizer, template)),
                target=probe.target,
                target_tokens=_tokens(tokenizer, target_ids(tokenizer, probe.target)),
                expect=probe.expect,
                reference=before,
                limit=settings.hold_limit,
                p_before=old["p"],
                p_after=new["p"],
                ok=unmoved if probe.expect == "hold" else new["p"] > old["p"],
                rivals_before=tuple(Rival(**each) for each in old["rivals"]),
                rivals_after=tuple(Rival(**each) for each in new["rivals"]),
            )
        )
    return compared


def _tokens(tokenizer: Any, ids: list[int]) -> tuple[Token, ...]:
    return tuple(Token(id=each, text=tokenizer.decode([each])) for each in ids)
