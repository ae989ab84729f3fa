"""Tasks of lm-evaluation-harness: which ones exist, and the texts of their examples."""

from collections.abc import Iterator, Sequence
from typing import Any

from nudge.components.common.core.errors import UserError, nearest
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.common.preflight.packages import check_harness

FAULTS = (OSError, ValueError, KeyError, RuntimeError)
"""What the harness raises for data that it cannot get."""


def task_manager(names: Sequence[str], task_folder: str) -> Any:
    """The harness's index of tasks; ``task_folder`` has tasks in addition to its own.

    Raises `UserError` if the harness is not installed or lacks one of the tasks.
    """
    check_harness(names)
    from lm_eval.tasks import TaskManager

    folder = _folder(task_folder)
    if folder:
        # Reading the thousands of task files in the harness is slow and often unnecessary.
        own = TaskManager(include_path=folder, include_defaults=False)
        if all(name in own.all_tasks for name in names):
            return own
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            hint = nearest(name, manager.all_tasks)
            hint = hint if hint.startswith("did") else "`lm-eval ls tasks` lists them"
            raise UserError(
                f"evaluate.tasks: lm-evaluation-harness has no task {name!r}; {hint} "
                "(your own tasks are read from evaluate.task_folder)"
            )
    return manager


def task_texts(names: Sequence[str], task_folder: str) -> Iterator[str]:
    """The question and each right answer of every example on which the tasks are scored.

    Raises `UserError` as `task_manager` does, and if the data of a task are missing.
    """
    try:
        check_harness(names)
    except UserError as error:
        raise UserError(
            f"{error}; without it the training text cannot be compared with the tasks: add it to "
            "the image of ingest (the pipeline's parameter data_image), or set "
            "ingest.compare_with_evaluation: false"
        ) from None
    manager = task_manager(names, task_folder)
    for name in names:
        try:
            for task in manager.load([name])["tasks"].values():
                for example in task.eval_docs:
                    yield from _texts(task, example)
        except FAULTS as error:
            raise UserError(
                f"evaluate.tasks: {name} cannot be compared with the training text "
                f"({type(error).__name__}: {error}); its data come from the Hugging Face hub "
                "unless its file names another source; to train without the comparison, set "
                "ingest.compare_with_evaluation: false"
            ) from None


def _texts(task: Any, example: Any) -> Iterator[str]:
    asked, answers = task.doc_to_text(example), task.doc_to_target(example)
    choices = task.doc_to_choice(example) if task.config.doc_to_choice is not None else []
    for answer in answers if isinstance(answers, list) else [answers]:
        if isinstance(answer, int) and 0 <= answer < len(choices):
            answer = choices[answer]
        yield " ".join(part for part in (asked, answer) if isinstance(part, str))


def _folder(uri: str) -> str | None:
    if not uri:
        return None
    if not is_local(uri) or not local_path(uri).is_dir():
        raise UserError(f"evaluate.task_folder = {uri!r}: not a folder on this machine")
    return str(local_path(uri))
