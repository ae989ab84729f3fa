"""What each step gets on a cluster: image, CPU, memory, GPU, time, retries, Secret, ConfigMap.

`kfp.local` ignores all of this except the image; on a laptop steps inherit the variables of the
services.
"""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl.pipeline_channel import PipelineChannel

from nudge.components.common.core.environment import PIPELINE_RUN_LABEL, RUN_ID
from nudge.components.common.core.images import DATA_IMAGE, POD_CREDENTIALS, TAG, TRAIN_IMAGE
from nudge.pipelines.steps import BACKOFF_FACTOR, BACKOFF_S, STEPS

CONNECTION = "nudge-data-connection"
SETTINGS = "nudge-settings"
REGISTRY = "nudge-image-registry"
"""A pull secret (kubernetes.io/dockerconfigjson) for models that are images; it may be missing."""

NOTIFICATIONS = "nudge-notifications"
"""A Secret with the addresses that a run notifies; it may be missing."""

SIZE = "pipelinechannel--size"
"""The parameter ``size`` as KFP's compiler names it among the inputs of a task."""

REQUIRED_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT")
# The dashboard omits these from a connection's Secret if nobody filled them in; a key that is
# required and missing would keep the pod from starting.
OPTIONAL_KEYS = ("AWS_S3_BUCKET", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "HF_TOKEN")
NOTIFY_KEYS = (
    *("NUDGE_NOTIFY_WEBHOOK", "NUDGE_NOTIFY_SLACK"),
    *("NUDGE_NOTIFY_TEAMS", "NUDGE_NOTIFY_SMTP"),
)
SETTINGS_KEYS = ("NUDGE_REGISTRY_URL", "NUDGE_REGISTRY_CA", "HF_ENDPOINT", "HF_HUB_OFFLINE")


SIZES = ("small", "medium", "large")
"""The values of the pipelines' parameter ``size``: a one-machine cluster with 4 cores and 16 GiB, a
node with 8 cores and 32 GiB, and a node with 16 cores and 128 GiB."""


@dataclass(frozen=True)
class PodResources:
    """The parameters of a pipeline that say where its steps run; the defaults are constants."""

    image: Any
    connection: Any = CONNECTION
    settings: Any = SETTINGS
    size: Any = ""
    gpu_type: Any = ""
    gpu_count: Any = ""
    tolerations: Any = None
    node_selector: Any = None

    def put(self, name: str, task: Any) -> Any:
        """Set the resources of the task of the step ``name``; returns the task."""
        need = STEPS[name].resources
        task.set_container_image(self.image)
        values = need.quantities()
        sized = any(" " in value for value in values.values())
        request, limit = (self.size, self.size) if sized else (need.cpu, need.cpu_limit)
        task.set_cpu_request(request).set_cpu_limit(limit)
        request, limit = (self.size, self.size) if sized else (need.memory, need.memory_limit)
        task.set_memory_request(request).set_memory_limit(limit)
        # Unlike the setter of the image, the setters of resources do not make the compiler pass a
        # parameter into the exit handler's group, so the backend would not find it there.
        used = [self.size] if sized else []
        used += [self.gpu_type, self.gpu_count] if need.gpu else []
        task.register_pipeline_channels([one for one in used if isinstance(one, PipelineChannel)])
        task.set_retry(
            need.retries,
            backoff_duration=f"{BACKOFF_S}s",
            backoff_factor=BACKOFF_FACTOR,
            backoff_max_duration=f"{need.deadline_s()}s",
        )
        kubernetes.set_timeout(task, int(need.hours * 3600))
        # The pipelines server sets everything else that the level `restricted` requires of a pod.
        kubernetes.set_security_context(task, run_as_non_root=True)
        keys = dict(zip(SETTINGS_KEYS, SETTINGS_KEYS, strict=True))
        kubernetes.use_config_map_as_env(task, self.settings, keys, optional=True)
        # The API server labels every pod of a run with its id (a parameter would defeat the cache).
        kubernetes.use_field_path_as_env(task, RUN_ID, f"metadata.labels['{PIPELINE_RUN_LABEL}']")
        if need.connection:
            # The summary must also report a run that had no Secret.
            for names, optional in ((REQUIRED_KEYS, name == "summary"), (OPTIONAL_KEYS, True)):
                keys = dict(zip(names, names, strict=True))
                kubernetes.use_secret_as_env(task, self.connection, keys, optional=optional)
        if name == "summary":
            keys = dict(zip(NOTIFY_KEYS, NOTIFY_KEYS, strict=True))
            kubernetes.use_secret_as_env(task, NOTIFICATIONS, keys, optional=True)
        if need.images:
            folder = str(POD_CREDENTIALS.parent)
            kubernetes.use_secret_as_volume(task, REGISTRY, folder, optional=True)
        if need.shm:
            # With a container's default of 64 MB, PyTorch's workers end with a bus error.
            size = {"medium": "Memory", "size_limit": need.shm}
            kubernetes.empty_dir_mount(task, "shm", "/dev/shm", **size)
        if need.gpu:
            task.set_accelerator_type(self.gpu_type).set_accelerator_limit(self.gpu_count)
            kubernetes.add_toleration_json(task, self.tolerations)
            kubernetes.add_node_selector_json(task, self.node_selector)
        return task


PARAMETERS: dict[str, tuple[type, Any, str]] = {
    "connection": (str, CONNECTION, "The Secret of the S3 data connection."),
    "settings": (
        str,
        SETTINGS,
        "A ConfigMap that may set NUDGE_REGISTRY_URL, NUDGE_REGISTRY_CA, HF_ENDPOINT.",
    ),
    "data_image": (str, DATA_IMAGE, "The image of the steps that need no PyTorch."),
    "train_image": (str, TRAIN_IMAGE, "The image of {trains}."),
    "size": (
        str,
        "medium",
        "The CPU and memory of {sized}: small (fits 4 cores and 16 GiB), medium or large.",
    ),
    "gpu_type": (
        str,
        "nvidia.com/gpu",
        "The resource name of the GPUs, such as nvidia.com/gpu or amd.com/gpu.",
    ),
    "gpu_count": (str, "1", "GPUs of {large}; 0 for none."),
    "tolerations": (list, [], "Tolerations of {placed}, a JSON list as in a pod."),
    "node_selector": (dict, {}, "Node selector of {placed}, a JSON object of labels."),
}
"""The parameters that say where steps run: type, default, and the dashboard's text for each."""

SMALL = ("connection", "settings", "data_image")
"""The parameters of a pipeline whose steps need no PyTorch."""


class StepResources:
    """The pod resources that a pipeline's parameters (``values``, by name) stand for."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        shared = {name: values.get(name, "") for name in ("connection", "settings", "size")}
        self.small = PodResources(values["data_image"], **shared)
        self.with_torch = PodResources(values.get("train_image"), **shared)
        used = (*shared, "data_image", "train_image")
        more = {name: value for name, value in values.items() if name not in used}
        self.large = PodResources(values.get("train_image"), **shared, **more)

    def training_pod(self) -> dict[str, Any]:
        """What ingest must know about the pod of `train` to refuse a model that cannot fit."""
        sized = {name: self.values[name] for name in ("size", "gpu_count")}
        return {"training_memory": training_memory(), **sized}


def training_memory() -> str:
    """The memory limit of the pod of `train` by size, such as "small=12Gi large=64Gi"."""
    limits = STEPS["train"].resources.memory_limit.split()
    return " ".join(f"{size}={limit}" for size, limit in zip(SIZES, limits, strict=True))


def pipeline(
    name: str,
    description: str,
    *,
    trains: str = "",
    large: str = "",
    placed: str = "",
    sized: str = "",
) -> Callable[[Callable[..., None]], Any]:
    """A pipeline that takes the parameters in `PARAMETERS` besides those of its function.

    The function gets a `StepResources` first. ``trains``, ``large``, ``placed`` and ``sized`` name
    the steps that use the train image, the GPUs, the tolerations and node selector (default:
    ``large``), and the size; a pipeline without them takes only the parameters in `SMALL`.
    """
    words = {"trains": trains, "large": large, "placed": placed or large, "sized": sized}
    names = tuple(PARAMETERS) if large else SMALL

    def decorate(function: Callable[..., None]) -> Any:
        own = list(inspect.signature(function).parameters.values())[1:]
        more = [
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
            for name, (kind, default, _) in PARAMETERS.items()
            if name in names
        ]
        signature = inspect.Signature([*own, *more])

        def build(*positional: Any, **named: Any) -> None:
            arguments = signature.bind(*positional, **named).arguments
            values = {name: arguments.pop(name) for name in names}
            function(StepResources(values), **arguments)

        lines = [f"    {name}: {PARAMETERS[name][2].format(**words)}" for name in names]
        build.__name__ = function.__name__
        build.__doc__ = "\n".join([inspect.getdoc(function) or "", *lines])
        build.__signature__ = signature  # type: ignore[attr-defined]
        # `nudge doctor` reads the release from there (see `nudge.pipelines.cluster.versions`).
        made_by = f"{description} (nudge {TAG})"
        compiled = dsl.pipeline(name=name, description=made_by)(build)
        compiled.pipeline_spec.CopyFrom(_with_sizes(compiled.pipeline_spec))
        return compiled

    return decorate


def _with_sizes(pipeline_spec: Any) -> Any:
    """The spec with one input per resource for the tasks whose resources depend on the size.

    The backend takes a quantity from an input of the task, unchanged. An input's expression
    selector (CEL) chooses the quantity by the size; an unknown size fails there with "no such key".
    """
    from google.protobuf import json_format

    spec = json_format.MessageToDict(pipeline_spec)
    executors = spec["deploymentSpec"]["executors"]
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel", "")
            container = executors.get(label, {}).get("container", {})
            step = STEPS.get(label.removeprefix("exec-").replace("-", "_"))
            if step is None or SIZE not in str(container.get("resources")):
                continue
            inputs = task["inputs"]["parameters"]
            size = inputs.pop(SIZE)
            for field, quantities in step.resources.quantities().items():
                each = quantities.split() * (len(SIZES) if " " not in quantities else 1)
                chosen = json.dumps(dict(zip(SIZES, each, strict=True)))
                name = f"size--{field}"
                inputs[name] = {**size, "parameterExpressionSelector": f"{chosen}[string_value]"}
                placeholder = f"{{{{$.inputs.parameters['{name}']}}}}"
                container["resources"][f"resource{field}"] = placeholder
                # KFP's compiler repeats each resource as a constant among the inputs.
                repeated = re.sub("([a-z])([A-Z])", r"\1_\2", field).lower()
                inputs[repeated] = {"runtimeValue": {"constant": placeholder}}
    return json_format.ParseDict(spec, type(pipeline_spec)())
