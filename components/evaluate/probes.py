"""Probes: what a model expects after a prompt, beside what another one expected."""

from collections.abc import Sequence
from typing import Any

from nudge.components.common.language_model import (
    likeliest,
    next_token_probabilities,
    single_token,
)
from nudge.components.evaluate.settings import EvaluateSettings, Probe


def answer(model: Any, tokenizer: Any, probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """For each probe P(target) and the ten likeliest tokens: ``[{"p", "rivals"}]``."""
    answers = []
    for probe in probes:
        probabilities = next_token_probabilities(model, tokenizer(probe.prompt)["input_ids"])
        answers.append(
            {
                "p": float(probabilities[single_token(tokenizer, probe.target)]),
                "rivals": likeliest(probabilities, tokenizer),
            }
        )
    return answers


def compare(
    tokenizer: Any,
    settings: EvaluateSettings,
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The probes as the evaluation holds them; ``ok`` is whether each did what it should."""
    compared = []
    for probe, old, new in zip(settings.probes, before, after, strict=True):
        moved = abs(new["p"] - old["p"]) / old["p"]
        held = moved <= settings.hold_limit
        ids = tokenizer(probe.prompt)["input_ids"]
        compared.append(
            {
                "prompt": probe.prompt,
                "prompt_tokens": [{"id": i, "text": tokenizer.decode([i])} for i in ids],
                "target": probe.target,
                "target_id": single_token(tokenizer, probe.target),
                "expect": probe.expect,
                "limit": settings.hold_limit,
                "p_before": old["p"],
                "p_after": new["p"],
                "ok": held if probe.expect == "hold" else new["p"] > old["p"],
                "rivals_before": old["rivals"],
                "rivals_after": new["rivals"],
            }
        )
    return compared
