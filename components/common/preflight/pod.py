"""The pod that will train on a cluster, compared with what the base model alone needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.quantities import quantity
from nudge.components.common.preflight.machine import BYTES

NODE_MEMORY, NODES, NODE_GPUS = "64Gi", 2, 1
"""The defaults of `train.cluster`."""


@dataclass(frozen=True)
class TrainingPod:
    """The pods that train: how many, the memory limit and the GPUs of each, and the setting that
    changes the memory. An empty ``memory`` is unknown."""

    memory: str = ""
    gpus: str = ""
    setting: str = "the pipeline's parameter size"
    count: int = 1


def sized_pod(memory: str, size: str, gpus: str) -> TrainingPod:
    """The pod of a pipeline's parameter ``size``; ``memory`` is such as "small=12Gi large=64Gi"."""
    limits = dict(pair.split("=") for pair in memory.split())
    return TrainingPod(limits.get(size, ""), gpus)


def job_pod(cluster: Mapping[str, Any]) -> TrainingPod:
    """The pods of a job of the cluster, from the values of a recipe's `train.cluster`."""
    nodes = str(cluster.get("nodes", NODES))
    return TrainingPod(
        str(cluster.get("memory", NODE_MEMORY)),
        str(cluster.get("gpus_per_node", NODE_GPUS)),
        "train.cluster.memory",
        int(nodes) if nodes.isdecimal() else 1,
    )


def check_pod(parameters: int, mode: str, pod: TrainingPod) -> None:
    """Raise `UserError` if the base model cannot be trained in the memory of its pods.

    Only a model that cannot fit is refused, and only without GPUs: with them, the weights are in
    the GPUs' memory, which nothing states before the pod runs.
    """
    limit, needed = int(quantity(pod.memory)), BYTES[mode] * parameters
    if pod.gpus != "0" or not limit or needed <= pod.count * limit:
        return
    less = "" if mode == "lora" else ", train.mode: lora"
    pods = "pod that trains has" if pod.count == 1 else f"{pod.count} pods that train have"
    each = "" if pod.count == 1 else " each"
    raise UserError(
        f"the {pods} at most {pod.memory} of memory{each} and no GPU; training {parameters:,} "
        f"parameters with train.mode: {mode} needs at least {needed / 2**30:,.0f}Gi; raise "
        f"{pod.setting}, or use GPUs, a smaller base model{less}"
    )
