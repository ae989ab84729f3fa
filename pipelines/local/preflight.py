"""The preflight of `nudge run`, with the addresses of its notifications."""

from functools import partial

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import step_settings
from nudge.components.common.preflight.checks import Way, preflight
from nudge.components.summary.notify import missing_addresses
from nudge.components.summary.settings import NotifySettings
from nudge.components.train.settings import TrainSettings
from nudge.pipelines.plan.check import check_here


def check(recipe: str, use_env_services: bool = False, in_containers: bool = False) -> None:
    """Raise `UserError` with one line for each thing that a recipe's steps would not find here.

    ``use_env_services``: the environment names the object store, which must accept an upload's
    writes. ``in_containers``: the steps have the packages of their images.
    """
    addresses = partial(_check_addresses, step_settings(NotifySettings, "notify", recipe))
    preflight(
        recipe,
        Way.RUN,
        more=[addresses, partial(check_here, recipe)],
        lora_targets=step_settings(TrainSettings, "train", recipe).lora_targets,
        has_own_packages=not in_containers,
        uses_env_store=use_env_services,
    )


def _check_addresses(settings: NotifySettings) -> None:
    if missing := missing_addresses(settings):
        raise UserError(
            f"notify.channels = {settings.channels}: set {' and '.join(missing)} to the address, "
            "or remove the channel"
        )
