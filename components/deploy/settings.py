"""The settings of the step `deploy`."""

from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nudge.components.common.clients.registry.connection import RegistryUrl
from nudge.components.common.core.recipe import read_recipe, some_settings, step_settings
from nudge.components.common.core.settings import settings


@settings
class KServeSettings:
    """Where and on what a version runs on a cluster; each version has servers of its own."""

    namespace: str = ""
    """Empty means the one that this runs in, or that of the kubeconfig's context."""
    connection: str = "nudge-data-connection"
    """The data connection (a Secret's name) through which KServe reads s3:// models."""
    pull_secret: str = ""
    """The pull secret through which the cluster reads oci:// models, if their registry wants one.
    """
    runtime: str = "nudge-vllm"
    """The ServingRuntime; it must speak the OpenAI API on port 8080, as vLLM's do."""
    arguments: list[str] = field(default_factory=list)
    """More arguments for the server, such as ``--max-model-len=4096``."""
    hardware_profile: str = ""
    """A hardware profile of the dashboard, ``name`` or ``namespace/name``. It stands in the place
    of cpu, memory, gpus, gpu_type, node_selector and tolerations."""
    queue: str = ""
    """The LocalQueue of Kueue that the servers wait in. OpenShift AI 3.0 to 3.3 wants one named in
    a namespace that Kueue manages; elsewhere Kueue puts what names none into ``default``."""
    cpu: str = "4"
    memory: str = "16Gi"
    gpus: Annotated[int, Field(ge=0)] = 1
    gpu_type: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    """As in a pod, such as ``{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}``."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Of each version that has a share of the traffic."""
    stop_old_first: bool = False
    """For a cluster whose GPUs do not suffice for two versions: end the old one, then start the
    new one. Nobody is served meanwhile (503): for the end of requests under way, the new pod, the
    model's download and load, and the smoke test; a new version that fails is taken away and the
    old one started again, which takes as long once more."""
    gateway: Annotated[str, Field(pattern=r"^$|^[a-z0-9.-]+/[a-z0-9.-]+$")] = ""
    """Where there are no OpenShift Routes: the Gateway (Gateway API) through which users come in,
    ``namespace/name``. Needs ``gateway_url``, and ``authentication: false``."""
    gateway_url: Annotated[str, Field(pattern=r"^$|^https?://\{model\}\.[a-z0-9.-]+(:\d+)?$")] = ""
    """The address of a model behind the gateway, such as ``https://{model}.models.example.com``."""
    authentication: bool = True
    """Ask users for the token of an account that may ``get`` the InferenceService."""
    request_timeout_s: Annotated[int, Field(ge=1)] = 600
    """How long a request may take; also how long one under way may delay a server's end."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """For a node, the image, the model's download and its load together."""

    @model_validator(mode="after")
    def _gateway_is_whole(self) -> "KServeSettings":
        if bool(self.gateway) != bool(self.gateway_url):
            raise ValueError("gateway and gateway_url belong together; give both or neither")
        if self.gateway and self.authentication:
            raise ValueError(
                "behind a Gateway nothing asks users for a token (OpenShift AI brings what does): "
                "set authentication: false, and let the Gateway decide who comes in"
            )
        return self


@settings
class DeploySettings:
    target: Literal["auto", "local", "kserve"] = "auto"
    """This machine, or the cluster (KServe, as on OpenShift AI). "auto" is the cluster for a step
    of a pipeline that runs on one, and for a model that is served there; else this machine."""
    registry_url: RegistryUrl = ""
    """Empty means NUDGE_REGISTRY_URL."""
    registry_name: str = "model-registry"
    """The registry's name on the dashboard, which ties a deployment to its version there."""
    smoke_prompt: Annotated[str, Field(min_length=1)] = "Once upon a time"
    """In a recipe its first probe, or else its first prompt, unless it names another one."""
    smoke_tokens: Annotated[int, Field(ge=1, le=256)] = 8
    smoke_tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """How far a probe's probability may be from the evaluated one, where the server tells it;
    serving in bfloat16 moves it by one or two hundredths."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The endpoint's port on this machine; 0 keeps the one that the model has, at first a free one.
    """
    start_timeout_s: Annotated[float, Field(gt=0)] = 180.0
    """For a server on this machine."""
    uploads: Annotated[str, Field(pattern=r"^$|^(s3|oci)://[^/]+")] = ""
    """Where this model's versions were uploaded, beside ``models`` in the data connection's bucket
    (AWS_S3_BUCKET). Empty in a recipe means its upload.target. A version that the registry says is
    anywhere else is not served."""
    unverified: list[Literal["hf", "pvc"]] = field(default_factory=list)
    """Serve versions from ``hf://`` or ``pvc://``, where nothing can be compared with what was
    evaluated."""
    kserve: KServeSettings = field(default_factory=KServeSettings)


@settings
class Uploaded:
    """Where a recipe's section `upload` puts models."""

    target: str = ""


@settings
class Asked:
    """What a recipe's section `evaluate` asks the models."""

    probes: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)


def deploy_settings(recipe: str, **given: Any) -> DeploySettings:
    """The settings in a recipe's text, with a smoke prompt of its own subject; ``given`` and
    errors are those of `step_settings`."""
    chosen = step_settings(DeploySettings, "deploy", recipe, **given)
    if not chosen.uploads:
        chosen = replace(chosen, uploads=some_settings(Uploaded, "upload", recipe).target)
    if "smoke_prompt" in (read_recipe(recipe).get("deploy") or {}):
        return chosen
    asked = some_settings(Asked, "evaluate", recipe)
    prompts = [*(str(probe["prompt"]) for probe in asked.probes), *asked.prompts]
    return replace(chosen, smoke_prompt=prompts[0]) if prompts else chosen
