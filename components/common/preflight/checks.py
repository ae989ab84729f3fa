"""One preflight for every way of running: which checks each makes, and why it leaves out others.

| check | run | ingest | submit | first step |
|---|---|---|---|---|
| texts: guards, probes, prompts | yes (1) | yes | those in a package | yes |
| packages: Ray, lm-eval | yes (2) | Ray | no: images have their own | Ray |
| names: what the registry must store | yes | no: it registers nothing | yes (3) | yes |
| paths: no file of this machine | it has them | it has them | yes | it would not find them |
| base: model, tokenizer, LoRA | yes | no: it loads none | if it is here (4) | its config (4) |
| machine: disk and memory | yes | no | the pod's memory (5) | the pod's memory (5) |
| cluster: it is known | for jobs and KServe | no | to start the run | it runs there |
| store: conditional writes | if variables name it | no | no: pods have the key | yes |
| serving: KServe and permissions | yes | no | no: the pipeline's account counts | yes |

(1) Those in an object store later, because the embedded one may not run yet. (2) Not with
`--engine docker`, whose images have their own. (3) By `pipelines.cluster.runs.submit`, which knows
whether the pipeline registers. (4) Of a model in a bucket or on the hub, that it is there and what
its config says; `train` checks the rest. (5) The limit of the pod that trains; `train` checks its
own disk and memory before it downloads the model.

That enough documents are held out is known after ingest, in every way (`check_held_out`).
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import field
from enum import Enum
from functools import partial
from typing import Any, Literal

from nudge.components.common.clients.kube import connect
from nudge.components.common.clients.ray_cluster import check_ray
from nudge.components.common.clients.registry.preflight import check_registration
from nudge.components.common.core.environment import S3_ENDPOINT, in_pipeline_step, nudge_home
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import some_settings
from nudge.components.common.core.settings import settings
from nudge.components.common.core.uris import is_local
from nudge.components.common.preflight.base import check_base
from nudge.components.common.preflight.elsewhere import check_elsewhere
from nudge.components.common.preflight.machine import check_machine
from nudge.components.common.preflight.packages import check_packages
from nudge.components.common.preflight.pod import TrainingPod, check_pod
from nudge.components.common.preflight.remote_base import check_remote_base
from nudge.components.common.preflight.serving import check_serving
from nudge.components.common.preflight.texts import check_texts


class Way(Enum):
    """How a recipe is run, which decides what can be checked at once."""

    RUN = "nudge run"
    INGEST = "nudge ingest"
    SUBMIT = "nudge submit"
    STEP = "the first step on a cluster"


Check = Callable[[], object]


@settings
class Trained:
    """What a recipe's section `train` says about where and how it trains."""

    mode: Literal["full", "lora", "scratch"] = "full"
    base_model: str = ""
    lora_targets: Any = None
    launcher: str = "local"
    cluster: dict[str, Any] = field(default_factory=dict)


@settings
class Deployed:
    """Where a recipe's section `deploy` serves."""

    target: str = "auto"
    kserve: dict[str, Any] = field(default_factory=dict)


@settings
class Uploaded:
    """Where a recipe's section `upload` writes."""

    target: str = ""


@settings
class Engine:
    """What a step reads and encodes with."""

    engine: str = "local"


def preflight(
    recipe: str,
    way: Way,
    *,
    more: Sequence[Check] = (),
    lora_targets: Sequence[str] = (),
    version: str = "",
    model_name: str = "",
    base_model: str = "",
    pod: TrainingPod | None = None,
    publishes: bool = True,
    has_own_packages: bool = True,
    uses_env_store: bool = False,
) -> None:
    """Raise `UserError` with one line for each problem that this way of running can know.

    ``lora_targets`` are those of `train`, with their default. ``version``, ``model_name`` and
    ``base_model`` are parameters of a pipeline, ``pod`` is where it trains, and ``publishes`` is
    whether it uploads, registers and deploys. ``has_own_packages``: the steps run with the packages
    that are installed here. ``uses_env_store``: the variables of a data connection name the store.
    ``more`` are checks of the caller's own.
    """
    publishes = publishes and way is not Way.INGEST
    checks: list[Check] = [partial(check_texts, recipe, CAN_READ[way])]
    if has_own_packages and way is not Way.SUBMIT:
        checks.append(partial(_check_packages, recipe, way))
    if publishes:
        checks.append(partial(check_registration, recipe, version, model_name=model_name))
    if way is Way.SUBMIT:
        checks.append(partial(check_elsewhere, recipe))
    if way in (Way.RUN, Way.SUBMIT):
        checks.append(partial(_check_model, recipe, lora_targets, way, base_model, pod))
    if way is Way.STEP and in_pipeline_step():
        checks.append(partial(_check_training, recipe, base_model, pod))
    if way is Way.RUN:
        checks.append(partial(_check_jobs, recipe))
    if publishes and (uses_env_store or (way is Way.STEP and in_pipeline_step())):
        checks.append(partial(_check_store, recipe))
    if publishes and (way is Way.RUN or (way is Way.STEP and in_pipeline_step())):
        checks.append(partial(_check_serving, recipe, way))
    problems: dict[str, None] = {}  # an ordered set
    for each in (*checks, *more):
        try:
            each()
        except UserError as error:
            problems[str(error)] = None
    if problems:
        raise UserError("\n".join(problems))


CAN_READ: dict[Way, Callable[[str], bool]] = {
    Way.RUN: is_local,
    Way.INGEST: lambda uri: True,
    Way.SUBMIT: lambda uri: uri.startswith("package://"),
    Way.STEP: lambda uri: True,
}
"""Which texts of an evaluation can be read before the run starts."""


def _check_packages(recipe: str, way: Way) -> None:
    steps = ("ingest", "tokenize") if way is Way.RUN else ("ingest",)
    for step in steps:
        if some_settings(Engine, step, recipe).engine == "ray":
            check_ray(step)
    if way is Way.RUN:
        check_packages(recipe)


def _check_model(
    recipe: str, lora_targets: Sequence[str], way: Way, base_model: str, pod: TrainingPod | None
) -> None:
    train = some_settings(Trained, "train", recipe)
    base = base_model or train.base_model
    if train.mode == "scratch":
        return
    if way is Way.SUBMIT and is_local(base) and "package://" not in base:
        return  # `check_elsewhere` refuses one that is here; another may be in the image
    try:
        targets = list(lora_targets) if train.mode == "lora" else []
        parameters = check_base(base, targets) or check_remote_base(base)
    except ImportError:
        if way is Way.SUBMIT:  # whoever only submits needs no tokenizers
            return
        raise
    if way is Way.RUN and train.launcher == "local":
        check_machine(parameters, train.mode, nudge_home(), shutil.which("nvidia-smi") is None)
    elif way is Way.SUBMIT:
        check_pod(parameters, train.mode, pod or TrainingPod())


def _check_training(recipe: str, base_model: str, pod: TrainingPod | None) -> None:
    train = some_settings(Trained, "train", recipe)
    if train.mode != "scratch":
        parameters = check_remote_base(base_model or train.base_model)
        check_pod(parameters, train.mode, pod or TrainingPod())


def _check_jobs(recipe: str) -> None:
    train = some_settings(Trained, "train", recipe)
    if train.launcher != "local":
        connect(train.cluster.get("namespace", ""))


def _check_serving(recipe: str, way: Way) -> None:
    deploy = some_settings(Deployed, "deploy", recipe)
    if deploy.target == "kserve" or (deploy.target == "auto" and way is Way.STEP):
        check_serving(deploy.kserve.get("namespace", ""))


def _check_store(recipe: str) -> None:
    from nudge.components.common.clients.storage import (
        bucket_name,
        check_writes,
        s3_client,
        split_s3_uri,
    )

    target = some_settings(Uploaded, "upload", recipe).target
    if target.startswith("oci:") or not os.environ.get(S3_ENDPOINT):
        return
    bucket = split_s3_uri(target)[0] if target else bucket_name()
    if bucket:
        check_writes(s3_client(), bucket)
