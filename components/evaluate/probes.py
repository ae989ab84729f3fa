"""Probes: what a model expects after a prompt, beside what another one expected."""

from collections.abc import Mapping, Sequence
from typing import Any

from nudge.components.common.models.language_model import (
    likeliest,
    probabilities_along,
    target_ids,
    target_probability,
)
from nudge.components.evaluate.settings import EvaluateSettings, Probe


def answer(model: Any, tokenizer: Any, probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """For each probe P(target) and the ten likeliest next tokens: ``[{"p", "rivals"}]``."""
    answers = []
    for probe in probes:
        target = target_ids(tokenizer, probe.target)
        along = probabilities_along(model, tokenizer(probe.prompt)["input_ids"], target)
        p = target_probability(along, target)
        answers.append({"p": p, "rivals": likeliest(along[0], tokenizer)})
    return answers


def compare(
    tokenizer: Any,
    settings: EvaluateSettings,
    answers: Mapping[str, list[dict[str, Any]]],
    reference: str,
) -> list[dict[str, Any]]:
    """The probes as the evaluation holds them; ``ok`` is whether each did what it should.

    ``answers`` are by model. What should rise is held against the base model, which the corpus is
    to teach; what should hold against the ``reference``, which is what users have.
    """
    compared = []
    for place, probe in enumerate(settings.probes):
        held_against = reference if probe.expect == "hold" else "base"
        old, new = answers[held_against][place], answers["candidate"][place]
        held = abs(new["p"] - old["p"]) <= settings.hold_limit * old["p"]
        compared.append(
            {
                "prompt": probe.prompt,
                "prompt_tokens": _tokens(tokenizer, tokenizer(probe.prompt)["input_ids"]),
                "target": probe.target,
                "target_tokens": _tokens(tokenizer, target_ids(tokenizer, probe.target)),
                "expect": probe.expect,
                "reference": held_against,
                "limit": settings.hold_limit,
                "p_before": old["p"],
                "p_after": new["p"],
                "ok": held if probe.expect == "hold" else new["p"] > old["p"],
                "rivals_before": old["rivals"],
                "rivals_after": new["rivals"],
            }
        )
    return compared


def _tokens(tokenizer: Any, ids: list[int]) -> list[dict[str, Any]]:
    return [{"id": each, "text": tokenizer.decode([each])} for each in ids]
