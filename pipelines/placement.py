"""What each step is given on a cluster: image, CPU, memory, GPU, time, retries, Secret, ConfigMap.

`kfp.local` ignores all of this but the image; on a laptop the services' variables are inherited.
"""

from dataclasses import dataclass
from typing import Any

from kfp import kubernetes
from kfp.dsl.pipeline_channel import PipelineChannel

CONNECTION = "nudge-data-connection"
SETTINGS = "nudge-settings"

REQUIRED_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT")
# The dashboard leaves these out of a connection's Secret where nobody filled them in; a key that
# is required and missing would keep the pod from starting.
OPTIONAL_KEYS = ("AWS_S3_BUCKET", "AWS_DEFAULT_REGION", "HF_TOKEN")
SETTINGS_KEYS = ("NUDGE_REGISTRY_URL", "NUDGE_REGISTRY_CA", "HF_ENDPOINT", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class Need:
    """What a step needs: its longest time in hours and its CPU and memory, request and limit alike.

    An empty ``cpu`` or ``memory`` means the pipeline's parameter, ``shm`` the largest shared memory
    (it counts as memory), ``connection`` that the step reaches the object store.
    """

    hours: float
    cpu: str = ""
    memory: str = ""
    gpu: bool = False
    shm: str = ""
    connection: bool = True


NEEDS = {
    "ingest": Need(12, cpu="4", memory="16Gi"),
    "tokenize": Need(12, cpu="4", memory="16Gi"),
    "train": Need(96, gpu=True, shm="8Gi"),
    "evaluate": Need(12, gpu=True, shm="8Gi"),
    "fetch": Need(6, cpu="2", memory="8Gi"),
    "upload": Need(6, cpu="2", memory="8Gi"),
    "register": Need(0.25, cpu="500m", memory="2Gi", connection=False),
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
        keys = dict(zip(SETTINGS_KEYS, SETTINGS_KEYS, strict=True))
        kubernetes.use_config_map_as_env(task, self.settings, keys, optional=True)
        # The API server labels every pod of a run with its id (a parameter would spoil the cache).
        kubernetes.use_field_path_as_env(task, "NUDGE_RUN_ID", "metadata.labels['pipeline/runid']")
        if need.connection:
            for names, optional in ((REQUIRED_KEYS, False), (OPTIONAL_KEYS, True)):
                keys = dict(zip(names, names, strict=True))
                kubernetes.use_secret_as_env(task, self.connection, keys, optional=optional)
        if need.shm:
            # The 64 MB that a container has by default end PyTorch's workers with a bus error.
            size = {"medium": "Memory", "size_limit": need.shm}
            kubernetes.empty_dir_mount(task, "shm", "/dev/shm", **size)
        if need.gpu:
            task.set_accelerator_type(self.gpu_type).set_accelerator_limit(self.gpu_count)
            kubernetes.add_toleration_json(task, self.tolerations)
            kubernetes.add_node_selector_json(task, self.node_selector)
        return task
