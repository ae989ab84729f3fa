"""The texts to score: the held-out split, and those of each guard."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from nudge.components.common.artifacts.corpus import (
    Document,
    read_corpus,
    read_documents,
    text_sha256,
)
from nudge.components.common.artifacts.model import read_model_facts
from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.components.common.preflight.texts import guard_texts
from nudge.components.evaluate.settings import DEFAULT_GUARD, EvaluateSettings, Guard

HELD_OUT = "held-out"
"""The name of the set that decides the verdict; the other sets have the names of guards."""
PROMPT_CHARACTERS, SHORTEST_PROMPT = 80, 12
"""The length of a prompt that is made from held-out text, in characters."""


def held_out_documents(
    corpus: Path, selected_on: Sequence[int], most: int
) -> tuple[list[Document], bool]:
    """At most ``most`` documents of the validation split, the first in its (hashed) order.

    The documents at the positions ``selected_on``, whose loss chose training's checkpoint, are left
    out, because the checkpoint is better on them by selection. Among equal models, the best of 5
    checkpoints was promoted in 12.5 % of trials by the 40 documents that chose it, and in 4.1 % by
    40 others (1,500 trials; a last checkpoint in 3.9 %). If the others are too few for a verdict,
    all are scored and the second value is True.
    """
    count = read_corpus(corpus).splits["validation"].documents
    enough = count - len(selected_on) >= MIN_DOCUMENTS
    left_out = frozenset(selected_on if enough else ())
    documents = enumerate(read_documents(corpus, "validation"))
    kept = (document for position, document in documents if position not in left_out)
    return list(itertools.islice(kept, most)), bool(selected_on) and not enough


def guards_of(settings: EvaluateSettings, model: Path) -> list[Guard]:
    """The guards of the settings, or else the default one.

    A model that was trained from scratch has none by default: it knows only its own text.
    """
    if settings.guards is not None:
        return settings.guards
    return [] if read_model_facts(model).training.mode == "scratch" else [DEFAULT_GUARD]


def guard_documents(guard: Guard) -> list[Document]:
    """The documents of a guard's files, sorted by file name.

    Raises `UserError` if there are too few, or if a file cannot be read as what its name says.
    """
    texts = guard_texts(guard.name, guard.uri, guard.max_documents)
    return [Document(text_sha256(text)[:16], text, guard.uri) for text in texts]


def beginnings(documents: Sequence[Document], count: int) -> list[str]:
    """Prompts that are the beginnings of the first ``count`` documents long enough for one.

    A prompt is at most `PROMPT_CHARACTERS` long and at most half of its document. It ends within a
    sentence, so that there is something left to say.
    """
    found: dict[str, None] = {}
    for document in documents:
        text = document.text.strip()
        start = text[: min(PROMPT_CHARACTERS, len(text) // 2) + 1]
        # Scripts without spaces have nowhere to cut, and may be cut anywhere.
        prompt = start.rsplit(maxsplit=1)[0] if len(start.split()) > 1 else start[:-1]
        while prompt and not prompt[-1].isalnum():
            prompt = prompt[:-1].rstrip()
        if len(prompt) >= SHORTEST_PROMPT:
            found[prompt] = None
        if len(found) == count:
            break
    return list(found)


def texts_sha256(texts: list[str]) -> str:
    """Hex sha256 of a list of texts, over the sha256 of each text, one per line."""
    return text_sha256("".join(f"{text_sha256(text)}\n" for text in texts))
