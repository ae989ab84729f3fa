"""Probes: a whole target is scored, and each is held against the model that it should be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.settings import parse
from nudge.components.common.models.language_model import load_model, load_tokenizer, target_ids
from nudge.components.evaluate.probes import answer, compare
from nudge.components.evaluate.settings import EvaluateSettings, Probe


def test_a_target_of_several_tokens_counts_whole(tiny_model: Path) -> None:
    """Beside plain transformers, asked for one token after another."""
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    probes = [
        Probe(prompt="The Eiffel Tower", target=target) for target in (" is", " in 1969", "x")
    ]
    for probe, told in zip(probes, answer(model, tokenizer, probes), strict=True):
        ids, p = tokenizer(probe.prompt)["input_ids"], 1.0
        target = target_ids(tokenizer, probe.target)
        for token in target:
            with torch.no_grad():
                p *= torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1)[token].item()
            ids = [*ids, token]
        assert told["p"] == pytest.approx(p, rel=1e-5)
        assert len(told["rivals"]) == 10
    assert len(target_ids(tokenizer, " in 1969")) > 3


def test_a_target_without_a_token_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="no token for the target ''"):
        target_ids(load_tokenizer(tiny_model), "")
    for empty in ("prompt", "target"):
        probe = {"prompt": "a", "target": "b", empty: ""}
        with pytest.raises(UserError, match=rf"{empty} = '': .* at least 1 character"):
            parse(EvaluateSettings, {"base_model": "x", "probes": [probe]}, "evaluate")


@pytest.mark.parametrize(
    ("expect", "base", "incumbent", "candidate", "ok"),
    [
        ("hold", 0.1, 0.6, 0.6, True),  # what users have is kept, whatever the base said
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
def test_what_should_hold_is_held_against_what_users_have(
    tiny_model: Path, expect: Any, base: float, incumbent: float | None, candidate: float, ok: bool
) -> None:
    settings = EvaluateSettings(
        base_model="unused", probes=[Probe(prompt="The", target=" in 1969", expect=expect)]
    )
    given = {"base": base, "incumbent": incumbent, "candidate": candidate}
    answers = {name: [{"p": p, "rivals": []}] for name, p in given.items() if p is not None}
    reference = "base" if incumbent is None else "incumbent"
    (told,) = compare(load_tokenizer(tiny_model), settings, answers, reference)
    assert told["ok"] is ok
    assert told["reference"] == (reference if expect == "hold" else "base")
    assert told["p_before"] == given[told["reference"]]
    assert "".join(token["text"] for token in told["target_tokens"]) == " in 1969"
