"""Greedy completions of a few prompts, and whether a working model could have written them."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from nudge.components.common.artifacts.evaluation import Check
from nudge.components.common.chat import ChatTemplate
from nudge.components.common.models.end_of_document import end_ids
from nudge.components.evaluate.chats import Question, plain_turns

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

    ``finite``: every logit was finite; ``repeatable``: a second generation gave the same tokens;
    ``ended``: the model itself ended the text. ``p_first`` is the probability of the first token,
    which is ``first`` as text; ``messages`` are the turns in which a chat model was asked.
    """

    prompt: str
    text: str
    tokens: list[int]
    finite: bool
    repeatable: bool
    ended: bool = False
    first: str = ""
    p_first: float | None = None
    messages: tuple[dict[str, str], ...] | None = None


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Question],
    tokens: int,
    *,
    twice: bool = False,
    template: ChatTemplate | None = None,
) -> list[Completion]:
    """Greedy completions of at most ``tokens`` tokens, without their prompts.

    With a chat ``template``, the turns of a question are rendered with it, and its end-of-turn
    token ends an answer, even if the model's configuration does not say so.

    ``twice`` makes each one a second time, for ``repeatable``. The model's own generation
    configuration counts only for its end tokens.
    """
    own = model.generation_config
    # transformers fills every value that a call leaves open from the model's own configuration,
    # and a value of None is one left open: only another configuration turns its stop strings off.
    model.generation_config = _greedy(own, tokenizer, template)
    ends = end_ids(model.generation_config.eos_token_id)
    try:
        made = []
        for prompt in prompts:
            asked = Question(prompt) if isinstance(prompt, str) else prompt
            prompt_ids = asked.ids(tokenizer, template)
            ids, finite, p_first = _generate(model, prompt_ids, tokens)
            second = _generate(model, prompt_ids, tokens)[0] if twice else ids
            text = tokenizer.decode(ids, skip_special_tokens=True)
            ended = bool(ids) and ids[-1] in ends
            first = tokenizer.decode(ids[:1])
            turns = plain_turns(asked)
            made.append(
                Completion(
                    asked.text, text, ids, finite, second == ids, ended, first, p_first, turns
                )
            )
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


def _greedy(own: Any, tokenizer: Any, template: ChatTemplate | None) -> GenerationConfig:
    """Greedy decoding of one sequence, with no penalty and no stop string."""
    end = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    if template is not None:
        end_of_turn = int(tokenizer.convert_tokens_to_ids(template.end_of_turn))
        end = list(dict.fromkeys([*end_ids(end), end_of_turn]))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False, bos_token_id=own.bos_token_id, eos_token_id=end, pad_token_id=pad
    )


def _generate(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], bool, float | None]:
    """The generated ids, whether every logit was finite, and the probability of the first id."""
    ids = torch.tensor([prompt], device=model.device)
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    finite = all(bool(torch.isfinite(logits).all()) for logits in made.logits)
    found = made.sequences[0, len(prompt) :].tolist()
    p_first = float(torch.softmax(made.logits[0][0].float(), -1)[found[0]]) if finite else None
    return found, finite, p_first
