"""Optional tasks of EleutherAI's lm-evaluation-harness, in addition to the perplexity."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nudge.components.common.artifacts.evaluation import TaskResult, TaskScore
from nudge.components.common.core.errors import UserError
from nudge.components.common.readers.harness import FAULTS, task_manager
from nudge.components.evaluate.settings import EvaluateSettings, Task


@dataclasses.dataclass(frozen=True)
class Measured:
    """A task's first metric for one model; ``error`` is its standard error, NaN if unknown."""

    metric: str
    value: float
    error: float
    higher_is_better: bool
    examples: int


def check_tasks(settings: EvaluateSettings) -> None:
    """Raise `UserError` unless the harness is installed and knows every task."""
    if settings.tasks:
        _manager(settings)


def run_tasks(model: Any, tokenizer: Any, settings: EvaluateSettings) -> dict[str, Measured]:
    """Each task's first metric for a model. Raises `UserError` if a task's data are missing."""
    if not settings.tasks:
        return {}
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    manager = _manager(settings)
    return {task.name: _run(harness, manager, task, settings.seed) for task in settings.tasks}


def compare_tasks(
    settings: EvaluateSettings, measured: Mapping[str, Mapping[str, Measured]], reference: str
) -> list[TaskResult]:
    """Each task's result; ``measured`` are by model, then by task."""
    return [_compared(task, measured, reference) for task in settings.tasks]


def _compared(
    task: Task, measured: Mapping[str, Mapping[str, Measured]], reference: str
) -> TaskResult:
    of_task = {name: by_task[task.name] for name, by_task in measured.items()}
    old, new = of_task[reference], of_task["candidate"]
    lost = old.value - new.value if new.higher_is_better else new.value - old.value
    return TaskResult(
        name=task.name,
        limit=task.limit,
        metric=new.metric,
        higher_is_better=new.higher_is_better,
        examples=new.examples,
        reference=old.value,
        candidate=new.value,
        models={
            name: TaskScore(value=one.value, error=one.error if math.isfinite(one.error) else None)
            for name, one in of_task.items()
        },
        # Comparing with NaN is false, so a NaN fails the check.
        ok=task.limit is None or lost <= task.limit,
    )


def _run(harness: Any, manager: Any, task: Task, seed: int) -> Measured:
    import lm_eval

    seeds = {
        f"{name}_seed": seed
        for name in ("random", "numpy_random", "torch_random", "fewshot_random")
    }
    try:
        results = lm_eval.simple_evaluate(
            model=harness,
            tasks=[task.name],
            num_fewshot=task.shots,
            limit=task.examples or None,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
            verbosity="ERROR",
            **seeds,
        )
    except FAULTS as error:
        raise UserError(
            f"evaluate.tasks: {task.name} failed ({type(error).__name__}: {error}); its data "
            "come from the Hugging Face hub unless its file names another source"
        ) from None
    return _first_metric(results, task.name)


def _first_metric(results: Any, name: str) -> Measured:
    values = results["results"][name]
    key = next(
        (k for k, v in values.items() if "," in k and "_stderr" not in k and _number(v)), None
    )
    if key is None:
        raise UserError(
            f"evaluate.tasks: {name} gave no metric; name its subtasks instead of a group"
        )
    metric, _, variant = key.partition(",")
    error = values.get(f"{metric}_stderr,{variant}")
    return Measured(
        metric=metric,
        value=float(values[key]),
        error=float(error) if _number(error) else math.nan,
        higher_is_better=bool(results["higher_is_better"][name].get(metric, True)),
        examples=int(results["n-samples"][name]["effective"]),
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _manager(settings: EvaluateSettings) -> Any:
    return task_manager([task.name for task in settings.tasks], settings.task_folder)
