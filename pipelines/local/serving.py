"""The models that this machine serves: whether they are up, and how they come back after a stop."""

import functools
import hmac
import os
from collections.abc import Callable
from pathlib import Path

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.say import say
from nudge.components.common.local import processes
from nudge.components.deploy.deploy import serve
from nudge.components.deploy.local import gateway
from nudge.components.deploy.local.gateway import gateway_name, is_open
from nudge.components.deploy.local.host_serving import TOKEN, URL
from nudge.components.deploy.local.local_serving import LocalServing, service_name
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.way_back import Moved, unmoved
from nudge.pipelines.local.parts import SERVING, running, start_serving

Note = Callable[[str, str], None]
"""Gets a model and the current stage of what happens to it."""


def serves(home: Path, model: str, endpoint: str) -> bool | None:
    """Whether a model's endpoint in this home, and every version with a share there, is up.

    None if the endpoint is elsewhere, because this machine cannot know.
    """
    if gateway.addresses(home).get(gateway.gateway_name(model)) != endpoint:
        return None
    return all(_answers(home, model, version) for version in gateway.routes(home)[model].shares)


def open_to_containers(home: Path, environment: dict[str, str]) -> dict[str, str]:
    """Open this machine's serving to steps in containers; returns the variables that lead there.

    ``environment`` is the result of `services.up`. The token is derived from the object store's
    secret key, which every step has anyway.
    """
    secret = environment["AWS_SECRET_ACCESS_KEY"].encode()
    token = hmac.new(secret, SERVING.encode(), "sha256").hexdigest()
    with processes.locked(home, "up"):
        record = running(home, SERVING) or start_serving(home, {**environment, TOKEN: token})
    return {URL: record.address, TOKEN: token}


def restore(
    home: Path, environment: dict[str, str], note: Note = lambda model, stage: None
) -> list[str]:
    """Serve the models that were served here before `down` or a reboot; returns their names.

    Each model is loaded from the registry and the object store and gets its earlier address. If one
    does not start, the reason is printed on stderr and the others continue, because the services
    themselves are up. For a model that is up, the servers that a killed shift left behind are
    ended. ``note`` gets each model's stages.
    """
    os.environ.update(environment)
    back = []
    for model, route in gateway.routes(home).items():
        if all(_answers(home, model, version) for version in route.shares):
            local = LocalServing(home, DeploySettings())
            with local.exclusive(model):
                local.retire(model, set(local.live(model)))
            continue
        stages = functools.partial(note, model)
        try:
            serve(DeploySettings(), model, route.shares, stages, unmoved(route.shares))
            back.append(model)
        except Moved:  # a run or another command is starting it
            continue
        except UserError as error:
            say(f"{model} was served here and does not start: {error}")
    return back


def _answers(home: Path, model: str, version: str) -> bool:
    """Whether a served version and its model's gateway are up."""
    return not is_open(home, model) and all(
        running(home, name) for name in (gateway_name(model), service_name(model, version))
    )
