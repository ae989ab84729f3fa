"""The texts of an evaluation: guards can be read and are large enough, probes say something."""

from collections.abc import Callable
from typing import Any

from nudge.components.common.core import default_guard
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import some_settings
from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.components.common.core.settings import settings


@settings
class EvaluatedTexts:
    """The texts in a recipe's section `evaluate`, in any form."""

    guards: Any = None
    probes: Any = None
    prompts: Any = None


def guard_texts(name: str, uri: str, most: int | None = None) -> list[str]:
    """The texts of a guard.

    Raises `UserError` if there are too few, or if a file cannot be read as what its name says.
    """
    from nudge.components.common.readers.curated import curated_texts

    where = f"evaluate.guards {name}"
    texts = curated_texts(uri, where, most)
    if len(texts) < MIN_DOCUMENTS:
        raise UserError(
            f"{where}: {uri} has {len(texts)} documents with text;"
            f" fewer than {MIN_DOCUMENTS} cannot show that nothing is lost: add more, or remove "
            "the guard"
        )
    return texts


def check_texts(recipe: str, can_read: Callable[[str], bool] = lambda uri: True) -> None:
    """Check the guards, probes and prompts of a recipe; raises `UserError` with each problem.

    Their form is checked when the recipe is read. Guards at other URIs than those that this machine
    ``can_read`` are left out.
    """
    found = some_settings(EvaluatedTexts, "evaluate", recipe)
    problems = []
    default = [{"name": default_guard.NAME, "uri": default_guard.URI}]
    for guard in default if found.guards is None else found.guards:
        if not can_read(str(guard["uri"])):
            continue
        try:
            guard_texts(str(guard["name"]), str(guard["uri"]), MIN_DOCUMENTS)
        except UserError as error:
            problems.append(str(error))
    prompts = [*(found.prompts or ()), *(probe["prompt"] for probe in found.probes or ())]
    problems += [
        f"evaluate: the prompt {prompt!r} has no text; write the words that the model continues"
        for prompt in prompts
        if not str(prompt).strip()
    ]
    if problems:
        raise UserError("\n".join(problems))
