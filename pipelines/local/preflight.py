"""What a recipe needs from this machine besides nudge, checked before a run trains for hours.

Each check is the one that the step itself makes later, with the same message.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial

from nudge.components.common.clients.kube import connect
from nudge.components.common.clients.ray_cluster import check_ray
from nudge.components.common.core.environment import S3_ENDPOINT, nudge_home
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import step_settings
from nudge.components.common.preflight.base import check_base
from nudge.components.common.preflight.machine import check_machine
from nudge.components.common.preflight.packages import check_packages
from nudge.components.common.preflight.texts import check_texts
from nudge.components.deploy.settings import DeploySettings
from nudge.components.ingest.settings import IngestSettings
from nudge.components.summary.notify import missing_addresses
from nudge.components.summary.settings import NotifySettings
from nudge.components.tokenize.settings import TokenizeSettings
from nudge.components.train.settings import TrainSettings
from nudge.components.upload.settings import UploadSettings
from nudge.pipelines.plan.check import check_here


def check(recipe: str, use_env_services: bool = False) -> None:
    """Raise `UserError` with one line for each thing that a recipe's steps would not find here:
    the packages of an extra, texts of the evaluation, a base model that can be trained, disk and
    memory, a cluster (which must be known, and is not contacted), and with ``use_env_services`` an
    object store that accepts an upload's writes."""
    train = step_settings(TrainSettings, "train", recipe)
    deploy = step_settings(DeploySettings, "deploy", recipe)
    engines = {
        "ingest": step_settings(IngestSettings, "ingest", recipe).engine,
        "tokenize": step_settings(TokenizeSettings, "tokenize", recipe).engine,
    }
    checks: list[Callable[[], object]] = [
        partial(check_ray, step) for step, engine in engines.items() if engine == "ray"
    ]
    if train.launcher != "local":
        checks.append(partial(connect, train.cluster.namespace))
    checks.append(partial(check_packages, recipe))
    checks.append(partial(check_texts, recipe, only_local=True))
    checks.append(partial(_check_model, train))
    checks.append(partial(check_here, recipe))
    if deploy.target == "kserve":
        checks.append(partial(connect, deploy.kserve.namespace))
    upload = step_settings(UploadSettings, "upload", recipe)
    if use_env_services and os.environ.get(S3_ENDPOINT) and not upload.target.startswith("oci:"):
        checks.append(partial(_check_store, upload.target))
    checks.append(partial(_check_addresses, step_settings(NotifySettings, "notify", recipe)))
    problems: dict[str, None] = {}  # an ordered set
    for each in checks:
        try:
            each()
        except UserError as error:
            problems[str(error)] = None
    if problems:
        raise UserError("\n".join(problems))


def _check_addresses(settings: NotifySettings) -> None:
    if missing := missing_addresses(settings):
        raise UserError(
            f"notify.channels = {settings.channels}: set {' and '.join(missing)} to the address, "
            "or remove the channel"
        )


def _check_model(train: TrainSettings) -> None:
    if train.mode == "scratch":
        return
    targets = train.lora_targets if train.mode == "lora" else []
    parameters = check_base(train.base_model, targets)
    if train.launcher == "local":
        check_machine(parameters, train.mode, nudge_home(), shutil.which("nvidia-smi") is None)


def _check_store(target: str) -> None:
    from nudge.components.common.clients.storage import (
        bucket_name,
        check_writes,
        s3_client,
        split_s3_uri,
    )

    bucket = split_s3_uri(target)[0] if target else bucket_name()
    if bucket:
        check_writes(s3_client(), bucket)
