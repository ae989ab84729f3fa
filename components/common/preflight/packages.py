"""Optional packages that a recipe needs."""

import importlib.util
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import some_settings
from nudge.components.common.core.settings import settings


@settings
class EvaluatedTasks:
    """The tasks in a recipe's section `evaluate`, in any form."""

    tasks: Any = None


def check_harness(tasks: object) -> None:
    """Raise `UserError` if there are tasks and the harness is missing; nothing is imported."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.tasks needs lm-evaluation-harness, which is not installed here; install the "
            "extra: pip install 'nudge-lm[tasks]'; on a cluster, nudge's own images have it"
        )


def check_packages(recipe: str) -> None:
    """`check_harness` for the tasks of a recipe."""
    check_harness(some_settings(EvaluatedTasks, "evaluate", recipe).tasks)
