"""What each step is given on a cluster: image, CPU, memory, GPU, time, retries, Secret, ConfigMap.

`kfp.local` ignores all of this but the image; on a laptop the services' variables are inherited.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl.pipeline_channel import PipelineChannel
from nudge.components.common.images import DATA_IMAGE, POD_CREDENTIALS, TRAIN_IMAGE

CONNECTION = "nudge-data-connection"
SETTINGS = "nudge-settings"
REGISTRY = "nudge-image-registry"
"""A pull secret (kubernetes.io/dockerconfigjson) for models that are images; none is fine."""

REQUIRED_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT")
# The dashboard leaves these out of a connection's Secret where nobody filled them in; a key that
# is required and missing would keep the pod from starting.
OPTIONAL_KEYS = ("AWS_S3_BUCKET", "AWS_DEFAULT_REGION", "HF_TOKEN")
SETTINGS_KEYS = ("NUDGE_REGISTRY_URL", "NUDGE_REGISTRY_CA", "HF_ENDPOINT", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class Need:
    """What a step needs: its longest time in hours and its CPU and memory, request and limit alike.

    An empty ``cpu`` or ``memory`` means the pipeline's parameter, ``shm`` the largest shared memory
    (it counts as memory), ``connection`` that the step reaches the object store, ``images`` that it
    may read or write a model in a registry of images.
    """

    hours: float
    cpu: str = ""
    memory: str = ""
    gpu: bool = False
    shm: str = ""
    connection: bool = True
    images: bool = False


NEEDS = {
    "ingest": Need(12, cpu="4", memory="16Gi"),
    "tokenize": Need(12, cpu="4", memory="16Gi", images=True),
    "train": Need(96, gpu=True, shm="8Gi", images=True),
    # It hands over to a job of the cluster, which has the GPUs, and follows it.
    "train_on_nodes": Need(96, cpu="2", memory="8Gi"),
    "evaluate": Need(12, gpu=True, shm="8Gi", images=True),
    "fetch": Need(6, cpu="2", memory="8Gi", images=True),
    "upload": Need(6, cpu="2", memory="8Gi", images=True),
    "register": Need(0.25, cpu="500m", memory="2Gi"),
    "deploy": Need(2, cpu="500m", memory="2Gi"),
    "roll_back": Need(2, cpu="500m", memory="2Gi"),
    "summary": Need(0.25, cpu="500m", memory="2Gi", connection=False),
}


@dataclass(frozen=True)
class Place:
    """The parameters of a pipeline that say where its steps run; those not given stay constant."""

    image: Any
    connection: Any = CONNECTION
    settings: Any = SETTINGS
    cpu: Any = ""
    memory: Any = ""
    gpu_type: Any = ""
    gpu_count: Any = ""
    tolerations: Any = None
    node_selector: Any = None

    def put(self, name: str, task: Any) -> Any:
        """Give the task of the step ``name`` what it needs; returns the task."""
        need = NEEDS[name]
        task.set_container_image(self.image)
        cpu, memory = need.cpu or self.cpu, need.memory or self.memory
        task.set_cpu_request(cpu).set_cpu_limit(cpu)
        task.set_memory_request(memory).set_memory_limit(memory)
        # Unlike the setter of the image, those of the resources do not tell the compiler to hand
        # a parameter on into the exit handler's group, where the backend would then miss it.
        used = (cpu, memory, self.gpu_type, self.gpu_count) if need.gpu else (cpu, memory)
        task.register_pipeline_channels([one for one in used if isinstance(one, PipelineChannel)])
        # Two more tries, after one and two minutes: a node that is drained, a store that restarts.
        task.set_retry(2, backoff_duration="60s", backoff_factor=2, backoff_max_duration="600s")
        kubernetes.set_timeout(task, int(need.hours * 3600))
        # All else that the level `restricted` asks of a pod, the pipelines server sets itself.
        kubernetes.set_security_context(task, run_as_non_root=True)
        keys = dict(zip(SETTINGS_KEYS, SETTINGS_KEYS, strict=True))
        kubernetes.use_config_map_as_env(task, self.settings, keys, optional=True)
        # The API server labels every pod of a run with its id (a parameter would spoil the cache).
        kubernetes.use_field_path_as_env(task, "NUDGE_RUN_ID", "metadata.labels['pipeline/runid']")
        if need.connection:
            for names, optional in ((REQUIRED_KEYS, False), (OPTIONAL_KEYS, True)):
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
    "cpu": (str, "8", "CPU cores of {large}."),
    "memory": (str, "32Gi", "Memory of {large}, shared memory counted in."),
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


class Places:
    """The places that a pipeline's parameters make, in ``values`` by their names."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        around = {"connection": values["connection"], "settings": values["settings"]}
        self.small = Place(values["data_image"], **around)
        self.with_torch = Place(values.get("train_image"), **around)
        left = ("connection", "settings", "data_image", "train_image")
        more = {name: value for name, value in values.items() if name not in left}
        self.large = Place(values.get("train_image"), **around, **more)


def pipeline(
    name: str, description: str, *, trains: str = "", large: str = "", placed: str = ""
) -> Callable[[Callable[..., None]], Any]:
    """A pipeline that takes the parameters of `PARAMETERS` beside those of the function's own.

    The function gets `Places` first. ``trains``, ``large`` and ``placed`` say which steps the train
    image, the sizes, and tolerations and node selector are for (``large`` unless given); a pipeline
    without them takes the `SMALL` ones alone.
    """
    words = {"trains": trains, "large": large, "placed": placed or large}
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
            function(Places(values), **arguments)

        told = [f"    {name}: {PARAMETERS[name][2].format(**words)}" for name in names]
        build.__name__ = function.__name__
        build.__doc__ = "\n".join([inspect.getdoc(function) or "", *told])
        build.__signature__ = signature  # type: ignore[attr-defined]
        return dsl.pipeline(name=name, description=description)(build)

    return decorate
