"""The nodes of a run's Workflow: which pods ran a step, and how many attempts there were.

The pipelines server reports a task's name, times, state and the ids of its children, but neither
the task's own id nor its pod. Both follow from names: Argo builds a node's id from the Workflow's
name and the 32-bit FNV-1a hash of the node's name, and a pod's name from the Workflow, the template
and the same hash. A node's name is its path through the pipeline's groups.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

TEMPLATES = ("retry-system-container-impl", "system-container-impl")
"""The templates in which Kubeflow Pipelines runs a step's container, with and without retries."""

ROOT = ".root"
ON_EXIT = ".onExit"
NODE = re.compile(r"(?P<step>[^.]+)\.executor(?:\(\d+\))?|(?P<driver>[^.]+)-driver")


@dataclass(frozen=True)
class Ran:
    """What is known of a step's pods."""

    attempts: int = 0
    """The number of attempts of a step with a retry strategy; 0 for a cached step."""
    pods: tuple[str, ...] = field(default=())
    """Possible names of the newest attempt's pod, the likeliest first."""


def paths(spec: dict[str, Any]) -> dict[str, list[str]]:
    """The steps of a pipeline's spec, each after those that it depends on, with the names that its
    node may have, without the Workflow's."""
    components, found = spec.get("components", {}), {}

    def visit(dag: dict[str, Any], above: str) -> None:
        tasks, seen = dag.get("tasks", {}), set()
        groups = [name for name, task in tasks.items() if "dag" in component(task)]

        def add(name: str) -> None:
            if name in seen:
                return
            seen.add(name)
            for before in tasks[name].get("dependentTasks", []):
                add(before)
            if "dag" in (inner := component(tasks[name])):
                visit(inner["dag"], f"{above}.{name}")
            else:
                # The task of an exit handler hangs below the group that it waits for.
                ends = [f"{above}.{group}{ON_EXIT}.{name}" for group in groups]
                found[name] = [f"{above}.{name}", *ends]

        for name in tasks:
            add(name)

    def component(task: dict[str, Any]) -> dict[str, Any]:
        return dict(components.get(task["componentRef"]["name"], {}))

    visit(spec.get("root", {}).get("dag", {}), ROOT)
    return found


def ran(task: Any, tasks: list[Any], names: list[str]) -> Ran:
    """What ran a step: ``task`` among all ``tasks`` of the run, ``names`` as `paths` has them."""
    children = _children(task)
    if not children:
        return Ran()
    workflow = children[0].rpartition("-")[0]
    known = {child for each in tasks for child in _children(each)}
    for name in names:
        executor = f"{workflow}{name}.executor"
        if node_id(workflow, executor) not in children:
            continue
        attempts = 0
        while node_id(workflow, f"{executor}({attempts})") in known:
            attempts += 1
        # Without a retry strategy the executor is the pod.
        newest = f"{executor}({attempts - 1})" if attempts else executor
        return Ran(attempts, tuple(pod_names(workflow, newest)))
    return Ran(0, (children[-1],))


def cached(task: Any, tasks: list[Any]) -> bool:
    """Whether a step that is done was taken from the engine's cache: its executor was skipped."""
    return any(
        each.display_name == "executor"
        and str(each.state) == "SKIPPED"
        and task.start_time
        and task.start_time <= each.start_time
        and (not task.end_time or each.start_time <= task.end_time)
        for each in tasks
        if each.start_time
    )


def node_id(workflow: str, name: str) -> str:
    """A node's id (argo-workflows, workflow/util: ``NodeID``)."""
    return f"{workflow}-{_fnv1a(name)}"


def pod_names(workflow: str, name: str) -> Iterator[str]:
    """The names that a node's pod may have (argo-workflows, workflow/util: ``GeneratePodName``)."""
    for template in TEMPLATES:
        yield f"{workflow}-{template}-{_fnv1a(name)}"
    yield node_id(workflow, name)


def step_of(node: str) -> str:
    """The step that a node is the driver or an attempt of; empty if of none."""
    match = NODE.search(node)
    return (match["step"] or match["driver"].rpartition(".")[2]) if match else ""


def _children(task: Any) -> list[str]:
    return [child.pod_name for child in task.child_tasks or [] if child.pod_name]


def _fnv1a(text: str) -> int:
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value
