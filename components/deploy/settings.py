"""The settings of the step `deploy`."""

from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nudge.components.common.clients.registry.url import RegistryUrl
from nudge.components.common.core.recipe import read_recipe, some_settings, step_settings
from nudge.components.common.core.settings import settings


@settings
class KServeSettings:
    """Where a version runs on a cluster, and on what; each version has its own servers."""

    namespace: str = ""
    """Empty means the namespace that this runs in, or that of the kubeconfig's context."""
    connection: str = "nudge-data-connection"
    """The data connection (a Secret's name) through which KServe reads s3:// models."""
    pull_secret: str = ""
    """The pull secret with which the cluster reads oci:// models, if their registry needs one."""
    runtime: str = "nudge-vllm"
    """The ServingRuntime; it must serve the OpenAI API on port 8080, as vLLM's do."""
    arguments: list[str] = field(default_factory=list)
    """Additional arguments for the server, such as ``--max-model-len=4096``."""
    hardware_profile: str = ""
    """A hardware profile of the dashboard, ``name`` or ``namespace/name``. It replaces cpu, memory,
    gpus, gpu_type, node_selector and tolerations."""
    queue: str = ""
    """The Kueue LocalQueue that the servers wait in. OpenShift AI 3.0 to 3.3 requires one in a
    namespace that Kueue manages; elsewhere Kueue puts servers without one into ``default``."""
    cpu: str = "4"
    """CPU cores per replica, as a Kubernetes quantity."""
    memory: str = "16Gi"
    """Memory per replica, as a Kubernetes quantity."""
    gpus: Annotated[int, Field(ge=0)] = 1
    """GPUs per replica; 0 serves on the CPU."""
    gpu_type: str = "nvidia.com/gpu"
    """The resource name of a GPU."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that replicas may run on."""
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    """As in a pod, such as ``{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}``."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """For each version that has a share of the traffic."""
    stop_old_first: bool = False
    """For a cluster that has too few GPUs for two versions: stop the old one, then start the new
    one. Users get 503 meanwhile: while requests in flight finish, the new pod starts, the model is
    downloaded and loaded, and the smoke test runs. A new version that fails is removed and the old
    one restarted, which takes as long once more."""
    gateway: Annotated[str, Field(pattern=r"^$|^[a-z0-9.-]+/[a-z0-9.-]+$")] = ""
    """On a cluster without OpenShift Routes: the Gateway (Gateway API) through which users reach
    models, ``namespace/name``. Needs ``gateway_url`` and ``authentication: false``."""
    gateway_url: Annotated[str, Field(pattern=r"^$|^https?://\{model\}\.[a-z0-9.-]+(:\d+)?$")] = ""
    """The address of a model behind the gateway, such as ``https://{model}.models.example.com``."""
    authentication: bool = True
    """Require the token of an account that may ``get`` the InferenceService."""
    request_timeout_s: Annotated[int, Field(ge=1)] = 600
    """How long a request may take, and so how long one in flight may delay stopping a server."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """For getting a node, pulling the image, and downloading and loading the model, together."""

    @model_validator(mode="after")
    def _gateway_is_complete(self) -> "KServeSettings":
        if bool(self.gateway) != bool(self.gateway_url):
            raise ValueError("gateway and gateway_url belong together; set both or neither")
        if self.gateway and self.authentication:
            raise ValueError(
                "behind a Gateway nothing asks users for a token (OpenShift AI provides that): "
                "set authentication: false, and let the Gateway control access"
            )
        return self


@settings
class CanaryLimits:
    """How much worse than the incumbent a candidate may serve over the same period."""

    error_rate: Annotated[float, Field(ge=0, le=1)] = 0.02
    """How much larger the fraction of failed requests may be."""
    first_token: Annotated[float, Field(ge=0)] = 0.5
    """How much longer the time to the first token may be (median), as a fraction."""
    tokens_per_s: Annotated[float, Field(ge=0, le=1)] = 0.3
    """How much lower the tokens per second may be (median), as a fraction."""
    answers: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How much smaller the fraction of probe answers that are as evaluated may be."""


LONGEST_CANARY_S = 5400
"""The step `deploy` may run for two hours, and it also starts the version."""


@settings
class DeploySettings:
    target: Literal["auto", "local", "kserve"] = "auto"
    """This machine, or the cluster (KServe, as on OpenShift AI). "auto" means the cluster for a
    pipeline step that runs on one and for a model that is served there; otherwise this machine."""
    registry_url: RegistryUrl = ""
    """Empty means NUDGE_REGISTRY_URL."""
    registry_name: str = "model-registry"
    """The registry's name on the dashboard, which ties a deployment to its version there."""
    smoke_prompt: str = ""
    """Empty means the recipe's first probe or prompt; without a recipe, the first probe that the
    version was evaluated with, or else "Once upon a time"."""
    smoke_tokens: Annotated[int, Field(ge=1, le=256)] = 8
    """Tokens that the smoke test generates."""
    smoke_tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """How far a probe's probability may be from the evaluated one, if the server reports it;
    serving in bfloat16 moves it by one or two hundredths."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The endpoint's port on this machine; 0 keeps the model's current one, at first a free one."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 180.0
    """For a server on this machine."""
    uploads: Annotated[str, Field(pattern=r"^$|^(s3|oci)://[^/]+")] = ""
    """Where this model's versions were uploaded, in addition to ``models`` in the data connection's
    bucket (AWS_S3_BUCKET). Empty in a recipe means its upload.target. A version that is registered
    with any other location is not served."""
    approval: Literal["none", "required"] = "none"
    """"required" ends a run whose candidate passed the gate as "registered, awaiting approval".
    `nudge approve VERSION` serves it, `nudge reject VERSION` archives it."""
    approval_days: Annotated[float, Field(ge=0)] = 14.0
    """How long a candidate may wait for approval before it is archived; 0 means any time."""
    canary: list[Annotated[int, Field(ge=1, le=100)]] = field(default_factory=list)
    """Shares of the traffic that a candidate gets one after the other, such as [5, 25, 100]. At
    each one below 100 it is compared with the incumbent. If it serves worse than ``canary_limits``,
    the incumbent gets all of the traffic again. Empty means all of the traffic at once."""
    canary_duration_s: Annotated[float, Field(gt=0)] = 600.0
    """How long the candidate is observed at each share below 100, in seconds."""
    canary_limits: CanaryLimits = field(default_factory=CanaryLimits)
    """How much worse the candidate may serve."""
    public_key: str = ""
    """A PEM public key (EC, NIST curves), or the path of one: only versions that its private key
    signed are served. Empty means no check, unless NUDGE_PUBLIC_KEY is set."""
    unverified: list[Literal["hf", "pvc"]] = field(default_factory=list)
    """Serve versions from ``hf://`` or ``pvc://``, whose files cannot be compared with the
    evaluated ones."""
    kserve: KServeSettings = field(default_factory=KServeSettings)
    """How KServe serves the model."""

    @model_validator(mode="after")
    def _canary_is_possible(self) -> "DeploySettings":
        if self.canary != sorted(set(self.canary)) or (self.canary and self.canary[-1] != 100):
            raise ValueError(
                f"canary = {self.canary}: expected rising shares that end with 100, such as "
                "[5, 25, 100]"
            )
        lasts_s = self.canary_duration_s * max(len(self.canary) - 1, 0)
        if lasts_s > LONGEST_CANARY_S:
            raise ValueError(
                f"the canary would take {lasts_s:g} s and may take {LONGEST_CANARY_S} s; give "
                "fewer shares or a shorter canary_duration_s"
            )
        if self.canary and self.kserve.stop_old_first:
            raise ValueError(
                "a canary needs both versions at once; set kserve.stop_old_first: false, or remove "
                "canary"
            )
        return self


@settings
class Uploaded:
    """Where a recipe's section `upload` puts models."""

    target: str = ""


@settings
class EvaluationPrompts:
    """The probes and prompts in a recipe's section `evaluate`."""

    probes: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)


def deploy_settings(recipe: str, **overrides: Any) -> DeploySettings:
    """The settings in a recipe's text, with a smoke prompt from its own probes or prompts.

    ``overrides`` and errors are those of `step_settings`.
    """
    chosen = step_settings(DeploySettings, "deploy", recipe, **overrides)
    if not chosen.uploads:
        chosen = replace(chosen, uploads=some_settings(Uploaded, "upload", recipe).target)
    if "smoke_prompt" in (read_recipe(recipe).get("deploy") or {}):
        return chosen
    evaluation = some_settings(EvaluationPrompts, "evaluate", recipe)
    prompts = [*(str(probe["prompt"]) for probe in evaluation.probes), *evaluation.prompts]
    return replace(chosen, smoke_prompt=prompts[0]) if prompts else chosen
