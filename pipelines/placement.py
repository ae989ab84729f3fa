"""What each step is given on a cluster: image, CPU, memory, GPU, time, retries, Secret, ConfigMap.

`kfp.local` ignores all of this but the image; on a laptop the services' variables are inherited.
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

from nudge.components.common.core.images import DATA_IMAGE, POD_CREDENTIALS, TRAIN_IMAGE

CONNECTION = "nudge-data-connection"
SETTINGS = "nudge-settings"
REGISTRY = "nudge-image-registry"
"""A pull secret (kubernetes.io/dockerconfigjson) for models that are images; none is fine."""

SIZE = "pipelinechannel--size"
"""The parameter ``size`` as KFP's compiler names it among the inputs of a task."""

REQUIRED_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT")
# The dashboard leaves these out of a connection's Secret where nobody filled them in; a key that
# is required and missing would keep the pod from starting.
OPTIONAL_KEYS = ("AWS_S3_BUCKET", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "HF_TOKEN")
SETTINGS_KEYS = ("NUDGE_REGISTRY_URL", "NUDGE_REGISTRY_CA", "HF_ENDPOINT", "HF_HUB_OFFLINE")


SIZES = ("small", "medium", "large")
"""The values of the pipelines' parameter ``size``: a cluster on one machine of 4 cores and
16 GiB, a node of 8 cores and 32 GiB, and one of 16 cores and 128 GiB."""


@dataclass(frozen=True)
class Need:
    """What a step needs: hours for one attempt, CPU and memory, and where its files are.

    ``cpu`` and ``memory`` are requested; the step may use up to the limits. Each is one quantity,
    or one for each of `SIZES`. ``shm`` is the largest shared memory (it counts as memory),
    ``connection`` says that the step reaches the object store, ``images`` that it may read or write
    a model in a registry of images. A step that fails is tried ``retries`` more times.
    """

    hours: float
    cpu: str
    cpu_limit: str
    memory: str
    memory_limit: str
    gpu: bool = False
    shm: str = ""
    connection: bool = True
    images: bool = False
    retries: int = 2

    def resources(self) -> dict[str, str]:
        """The fields of a container's resources in a pipeline's spec, by their ends."""
        return {
            "CpuRequest": self.cpu,
            "CpuLimit": self.cpu_limit,
            "MemoryRequest": self.memory,
            "MemoryLimit": self.memory_limit,
        }

    def deadline_s(self) -> int:
        """Seconds from the start of the first attempt after which no other one may run.

        KFP writes ``backoff_max_duration`` as Argo's ``maxDuration``, which is such a deadline and
        no longest pause: past it nothing is retried, and a retry that runs is ended. So every
        attempt gets all of its time.
        """
        attempts = self.retries + 1
        waits = sum(BACKOFF_S * BACKOFF_FACTOR**n for n in range(self.retries))
        return int(attempts * self.hours * 3600 + waits) + GRACE_S * attempts


BACKOFF_S, BACKOFF_FACTOR = 60, 2
"""The pause before the first retry, and how much longer each one is than the one before."""

GRACE_S = 600
"""What scheduling and pulling an image may add to an attempt."""

# A real run of the recipe `eiffel` trained and evaluated with 800m and 8Gi. The other requests are
# estimates so far; what larger texts and models take is bounded by the limits.
NEEDS = {
    "ingest": Need(12, "250m 1 4", "2 4 8", "1Gi 4Gi 16Gi", "4Gi 16Gi 32Gi"),
    "tokenize": Need(12, "250m 1 4", "2 4 8", "1Gi 4Gi 16Gi", "4Gi 16Gi 32Gi", images=True),
    "train": Need(
        96, "500m 4 8", "4 8 16", "3Gi 16Gi 64Gi", "12Gi 32Gi 128Gi",
        gpu=True, shm="8Gi", images=True, retries=4,
    ),
    # It creates a job, which has the GPUs, and follows it.
    "train_on_nodes": Need(96, "100m", "2", "512Mi", "8Gi", retries=4),
    "evaluate": Need(
        12, "500m 4 8", "4 8 16", "3Gi 16Gi 64Gi", "12Gi 32Gi 128Gi",
        gpu=True, shm="8Gi", images=True,
    ),
    "fetch": Need(6, "100m", "2", "512Mi", "8Gi", images=True),
    "upload": Need(6, "100m", "2", "512Mi", "8Gi", images=True),
    "register": Need(0.25, "100m", "1", "256Mi", "2Gi"),
    "deploy": Need(2, "100m", "1", "256Mi", "2Gi"),
    "roll_back": Need(2, "100m", "1", "256Mi", "2Gi"),
    "summary": Need(0.25, "100m", "1", "256Mi", "2Gi"),
}  # fmt: skip


@dataclass(frozen=True)
class PodResources:
    """The parameters of a pipeline that say where its steps run; those not given stay constant."""

    image: Any
    connection: Any = CONNECTION
    settings: Any = SETTINGS
    size: Any = ""
    gpu_type: Any = ""
    gpu_count: Any = ""
    tolerations: Any = None
    node_selector: Any = None

    def put(self, name: str, task: Any) -> Any:
        """Give the task of the step ``name`` what it needs; returns the task."""
        need = NEEDS[name]
        task.set_container_image(self.image)
        values = need.resources()
        sized = any(" " in value for value in values.values())
        request, limit = (self.size, self.size) if sized else (need.cpu, need.cpu_limit)
        task.set_cpu_request(request).set_cpu_limit(limit)
        request, limit = (self.size, self.size) if sized else (need.memory, need.memory_limit)
        task.set_memory_request(request).set_memory_limit(limit)
        # Unlike the setter of the image, those of the resources do not tell the compiler to pass
        # a parameter into the exit handler's group, where the backend would then miss it.
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
        # All else that the level `restricted` asks of a pod, the pipelines server sets itself.
        kubernetes.set_security_context(task, run_as_non_root=True)
        keys = dict(zip(SETTINGS_KEYS, SETTINGS_KEYS, strict=True))
        kubernetes.use_config_map_as_env(task, self.settings, keys, optional=True)
        # The API server labels every pod of a run with its id (a parameter would spoil the cache).
        kubernetes.use_field_path_as_env(task, "NUDGE_RUN_ID", "metadata.labels['pipeline/runid']")
        if need.connection:
            # The summary says what became of a run that had no Secret, too.
            for names, optional in ((REQUIRED_KEYS, name == "summary"), (OPTIONAL_KEYS, True)):
                keys = dict(zip(names, names, strict=True))
                kubernetes.use_secret_as_env(task, self.connection, keys, optional=optional)
        if need.images:
            folder = str(POD_CREDENTIALS.parent)
            kubernetes.use_secret_as_volume(task, REGISTRY, folder, optional=True)
        if need.shm:
            # The 64 MB that a container has by default end PyTorch's workers with a bus error.
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
        "A ConfigMap that may hold NUDGE_REGISTRY_URL, NUDGE_REGISTRY_CA, HF_ENDPOINT.",
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
"""The parameters that say where steps run: type, default, and what the dashboard says of each."""

SMALL = ("connection", "settings", "data_image")
"""Those of a pipeline whose steps need no PyTorch."""


class StepResources:
    """The places that a pipeline's parameters make, in ``values`` by their names."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        around = {name: values.get(name, "") for name in ("connection", "settings", "size")}
        self.small = PodResources(values["data_image"], **around)
        self.with_torch = PodResources(values.get("train_image"), **around)
        left = (*around, "data_image", "train_image")
        more = {name: value for name, value in values.items() if name not in left}
        self.large = PodResources(values.get("train_image"), **around, **more)


def pipeline(
    name: str,
    description: str,
    *,
    trains: str = "",
    large: str = "",
    placed: str = "",
    sized: str = "",
) -> Callable[[Callable[..., None]], Any]:
    """A pipeline that takes the parameters of `PARAMETERS` beside those of the function's own.

    The function gets `Places` first. ``trains``, ``large``, ``placed`` and ``sized`` say which
    steps the train image, the GPUs, tolerations and node selector (``large`` unless given), and the
    size are for; a pipeline without them takes the `SMALL` ones alone.
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

        def build(*given: Any, **named: Any) -> None:
            arguments = signature.bind(*given, **named).arguments
            values = {name: arguments.pop(name) for name in names}
            function(StepResources(values), **arguments)

        told = [f"    {name}: {PARAMETERS[name][2].format(**words)}" for name in names]
        build.__name__ = function.__name__
        build.__doc__ = "\n".join([inspect.getdoc(function) or "", *told])
        build.__signature__ = signature  # type: ignore[attr-defined]
        made = dsl.pipeline(name=name, description=description)(build)
        made.pipeline_spec.CopyFrom(_with_sizes(made.pipeline_spec))
        return made

    return decorate


def _with_sizes(pipeline_spec: Any) -> Any:
    """The spec with an input per resource of the tasks whose resources depend on the size.

    The backend takes a quantity from an input of the task, as it is. An input's expression selector
    (CEL) chooses the quantity from the size; an unknown size fails there with "no such key".
    """
    from google.protobuf import json_format

    spec = json_format.MessageToDict(pipeline_spec)
    executors = spec["deploymentSpec"]["executors"]
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel", "")
            container = executors.get(label, {}).get("container", {})
            need = NEEDS.get(label.removeprefix("exec-").replace("-", "_"))
            if need is None or SIZE not in str(container.get("resources")):
                continue
            inputs = task["inputs"]["parameters"]
            size = inputs.pop(SIZE)
            for field, quantities in need.resources().items():
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
