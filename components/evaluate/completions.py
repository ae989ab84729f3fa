"""Greedy completions of a few prompts, and whether they are those of a working model."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nudge.components.evaluate.checks import Check

LEAST_TOKENS = 8
"""A shorter completion, such as " Paris." and the end, is not looked at for repetition."""
ONE_TOKEN = 0.8
"""The share of a completion that one token alone may make up. A table or an indented program has
less; a collapsed model ("the the the") has all."""


@dataclass(frozen=True)
class Completion:
    """A prompt's likeliest continuation: its text, its tokens' ids, and how it came about.

    ``finite``: every logit that chose a token was a number; ``repeatable``: a second time gave the
    same tokens.
    """

    prompt: str
    text: str
    tokens: list[int]
    finite: bool
    repeatable: bool


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, *, twice: bool = False
) -> list[Completion]:
    """Greedy completions of at most ``tokens`` tokens, without their prompts.

    ``twice`` makes each one again, for ``repeatable``.
    """
    made = []
    for prompt in prompts:
        ids, finite = _generate(model, tokenizer, prompt, tokens)
        again = _generate(model, tokenizer, prompt, tokens)[0] if twice else ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        made.append(Completion(prompt, text, ids, finite, again == ids))
    return made


def completion_checks(completions: Sequence[Completion]) -> list[Check]:
    """A check for each completion: not empty, not one token over and over, finite, repeatable."""
    return [
        Check(
            "completion",
            one.prompt,
            not (wrong := _wrong(one)),
            wrong or f"completed {one.prompt!r}",
        )
        for one in completions
    ]


def _wrong(one: Completion) -> str:
    if not one.finite:
        return f"completing {one.prompt!r} gave numbers that are not finite"
    if not one.repeatable:
        return f"completing {one.prompt!r} twice, greedily, gave two texts"
    if not one.text.strip():
        return f"the completion of {one.prompt!r} is empty"
    count = max(collections.Counter(one.tokens).values())
    if len(one.tokens) >= LEAST_TOKENS and count > ONE_TOKEN * len(one.tokens):
        return (
            f"the completion of {one.prompt!r} is one token over and over, "
            f"{count} of {len(one.tokens)} times: {one.text[:60]!r}"
        )
    return ""


def _generate(model: Any, tokenizer: Any, prompt: str, tokens: int) -> tuple[list[int], bool]:
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    made = model.generate(
        **encoded,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    finite = all(bool(torch.isfinite(logits).all()) for logits in made.logits)
    return made.sequences[0, encoded["input_ids"].shape[1] :].tolist(), finite
