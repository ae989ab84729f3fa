"""Greedy completions of a few prompts, and whether a working model could have written them."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from nudge.components.common.artifacts.evaluation import Check

MIN_TOKENS = 8
"""A shorter completion, such as " Paris." and the end, is not checked for repetition."""
MAX_SHARE = 0.8
"""The largest share of a completion that a single token may make up. A table or an indented program
is below it; the output of a collapsed model ("the the the") is all one token."""
LONGEST_LOOP = 4
"""Tokens of the longest phrase whose repetition counts as a loop. Small models that work repeat
longer phrases when they decode greedily."""


@dataclass(frozen=True)
class Completion:
    """A prompt's likeliest continuation: its text, the ids of its tokens, and two properties.

    ``finite``: every logit was finite; ``repeatable``: a second generation gave the same tokens.
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

    ``twice`` makes each one a second time, for ``repeatable``. The model's own generation
    configuration counts only for its end tokens.
    """
    own = model.generation_config
    # transformers fills every value that a call leaves open from the model's own configuration,
    # and a value of None is one left open: only another configuration turns its stop strings off.
    model.generation_config = _greedy(own, tokenizer)
    try:
        made = []
        for prompt in prompts:
            ids, finite = _generate(model, tokenizer, prompt, tokens)
            second = _generate(model, tokenizer, prompt, tokens)[0] if twice else ids
            text = tokenizer.decode(ids, skip_special_tokens=True)
            made.append(Completion(prompt, text, ids, finite, second == ids))
        return made
    finally:
        model.generation_config = own


def completion_checks(
    completions: Sequence[Completion], reference: Sequence[Completion] = ()
) -> list[Check]:
    """One check per completion: not empty, not collapsed, in no new loop, finite, repeatable.

    ``reference`` are those of the model to compare with, for the same prompts. If it loops as well,
    as in the middle of a table, the loop is not the candidate's fault.
    """
    fluent = {other.prompt for other in reference if not _loop(other.tokens)}
    checks = []
    for one in completions:
        fault = _fault(one) or (_loop_fault(one) if one.prompt in fluent else "")
        checks.append(
            Check("completion", one.prompt, not fault, fault or f"completed {one.prompt!r}")
        )
    return checks


def _fault(one: Completion) -> str:
    """What is wrong with a completion by itself; empty if nothing is."""
    if not one.finite:
        return f"completing {one.prompt!r} gave logits that are not finite"
    if not one.repeatable:
        return f"completing {one.prompt!r} greedily twice gave different texts"
    if not one.text.strip():
        return f"the completion of {one.prompt!r} is empty"
    if len(one.tokens) < MIN_TOKENS:
        return ""
    if (count := _most(one.tokens)) > MAX_SHARE * len(one.tokens):
        return (
            f"the completion of {one.prompt!r} repeats one token in {count} of "
            f"{len(one.tokens)} positions: {one.text[:60]!r}"
        )
    characters = "".join(one.text.split())
    # Tokens such as "ee" and "eee" differ, and are the same collapse.
    if characters and (count := _most(characters)) > MAX_SHARE * len(characters):
        return (
            f"the completion of {one.prompt!r} repeats one character in {count} of "
            f"{len(characters)} positions: {one.text[:60]!r}"
        )
    return ""


def _loop_fault(one: Completion) -> str:
    length = _loop(one.tokens)
    if not length:
        return ""
    return f"the completion of {one.prompt!r} repeats {length} tokens to its end: {one.text[:60]!r}"


def _most(items: Sequence[int] | str) -> int:
    return max(collections.Counter(items).values())


def _loop(tokens: Sequence[int]) -> int:
    """The length of the phrase that most of a completion repeats, at most `LONGEST_LOOP`, or 0."""
    if len(tokens) < 2 * MIN_TOKENS:
        return 0
    for period in range(1, LONGEST_LOOP + 1):
        same = sum(a == b for a, b in zip(tokens, tokens[period:], strict=False))
        if same > MAX_SHARE * (len(tokens) - period):
            return period
    return 0


def _greedy(own: Any, tokenizer: Any) -> GenerationConfig:
    """Greedy decoding of one sequence, with no penalty and no stop string."""
    end = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False, bos_token_id=own.bos_token_id, eos_token_id=end, pad_token_id=pad
    )


def _generate(model: Any, tokenizer: Any, prompt: str, tokens: int) -> tuple[list[int], bool]:
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    made = model.generate(
        **encoded,
        max_new_tokens=tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    finite = all(bool(torch.isfinite(logits).all()) for logits in made.logits)
    return made.sequences[0, encoded["input_ids"].shape[1] :].tolist(), finite
