"""Probes: every token of a target is scored, and each probe is compared with the right model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.settings import parse
from nudge.components.common.models.language_model import load_model, load_tokenizer, target_ids
from nudge.components.evaluate.probes import answer, compare
from nudge.components.evaluate.settings import EvaluateSettings, Probe


def test_every_token_of_a_target_counts(tiny_model: Path) -> None:
    """Compared with plain transformers, one token at a time."""
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    probes = [
        Probe(prompt="The Eiffel Tower", target=target) for target in (" is", " in 1969", "x")
    ]
    for probe, found in zip(probes, answer(model, tokenizer, probes), strict=True):
        ids, p = tokenizer(probe.prompt)["input_ids"], 1.0
        target = target_ids(tokenizer, probe.target)
        for token in target:
            with torch.no_grad():
                p *= torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1)[token].item()
            ids = [*ids, token]
        assert found["p"] == pytest.approx(p, rel=1e-5)
        assert len(found["rivals"]) == 10
    assert len(target_ids(tokenizer, " in 1969")) > 3


def test_a_target_without_a_token_is_rejected(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="no token for the target ''"):
        target_ids(load_tokenizer(tiny_model), "")
    for empty in ("prompt", "target"):
        probe = {"prompt": "a", "target": "b", empty: ""}
        with pytest.raises(UserError, match=rf"{empty} = '': .* at least 1 character"):
            parse(EvaluateSettings, {"base_model": "x", "probes": [probe]}, "evaluate")


@pytest.mark.parametrize(
    ("expect", "base", "incumbent", "candidate", "ok"),
    [
        ("hold", 0.1, 0.6, 0.6, True),  # compared with what users have, not with the base
        ("hold", 0.6, 0.3, 0.6, False),
        ("hold", 0.6, None, 0.6, True),
        ("hold", 0.6, 0.0, 0.6, False),  # nothing is within 20 % of nothing
        ("hold", 0.6, 0.0, 0.0, True),
        ("hold", 0.6, 0.6, float("nan"), False),
        ("rise", 0.1, 0.6, 0.5, True),
        ("rise", 0.6, 0.1, 0.5, False),
        ("rise", 0.0, None, 0.5, True),
    ],
)
def test_a_probe_that_should_hold_is_compared_with_what_users_have(
    tiny_model: Path, expect: Any, base: float, incumbent: float | None, candidate: float, ok: bool
) -> None:
    settings = EvaluateSettings(
        base_model="unused", probes=[Probe(prompt="The", target=" in 1969", expect=expect)]
    )
    given = {"base": base, "incumbent": incumbent, "candidate": candidate}
    answers = {name: [{"p": p, "rivals": []}] for name, p in given.items() if p is not None}
    reference = "base" if incumbent is None else "incumbent"
    (result,) = compare(load_tokenizer(tiny_model), settings, answers, reference)
    assert result.ok is ok
    assert result.reference == (reference if expect == "hold" else "base")
    assert result.p_before == given[result.reference]
    assert "".join(token.text for token in result.target_tokens) == " in 1969"
