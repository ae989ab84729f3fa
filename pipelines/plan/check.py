"""Refuse a recipe that does not fit its hardware, before anything is spent."""

import math

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.hardware import PlanSettings
from nudge.components.common.core.recipe import read_recipe, step_settings
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.common.preflight.machine import is_large
from nudge.components.train.settings import TrainSettings
from nudge.pipelines.plan.config import ConfigNotHere, base_of

SMALLEST_WEIGHT = 0.5
"""Bytes per parameter in a file of 4 bits."""


def check_here(text: str) -> None:
    """Raise `UserError` if training on this machine would need more memory than it has.

    A small model is not checked, because the plan takes seconds.
    """
    train = step_settings(TrainSettings, "train", text)
    if train.launcher == "local" and _is_large(train):
        check_fits("", text)


def check_submitted(name: str, text: str) -> str:
    """One line about the plan of a recipe that states its hardware; empty if it does not.

    Raises `UserError` if the recipe does not fit that hardware.
    """
    values = read_recipe(text)
    train = step_settings(TrainSettings, "train", text)
    states = step_settings(PlanSettings, "plan", text).gpus is not None
    if not states and (train.launcher == "local" or not (values.get("train") or {}).get("cluster")):
        return ""
    return check_fits(name, text)


def check_fits(name: str, text: str) -> str:
    """One line about a plan; raises `UserError` if the recipe does not fit."""
    from nudge.pipelines.plan.plan import plan_recipe

    try:
        plan = plan_recipe(name, text)
    except ConfigNotHere as error:
        return f"not planned: {error}"
    except ImportError as error:  # whoever only submits needs no torch
        return f"not planned: the Python package {error.name} is not installed"
    peak, limit = plan.device_peak_bytes / 1e9, (plan.device_memory_bytes or 0) / 1e9
    device = "GPU" if plan.device == "cuda" else "rank"
    if plan.fits:
        return f"plan: {peak:,.1f} of {limit:,.1f} GB per {device} on {plan.ranks} ranks"
    changes = "; ".join(
        f"{each.setting} ({each.device_peak_bytes / 1e9:,.1f} GB)" for each in plan.change
    )
    host = f", and {plan.host_peak_bytes / 1e9:,.1f} GB on the host"
    raise UserError(
        f"training needs {peak:,.1f} GB per {device}{host}, but there are {limit:,.1f} GB. Change "
        f"in this order: {changes or 'use a machine with more memory'}. `nudge plan` shows the "
        "parts; the recipe's section `plan` says what the hardware has"
    )


def _is_large(train: TrainSettings) -> bool:
    """Whether a plan is worth its seconds; the size of a file only gives a bound."""
    if train.mode == "scratch":
        return is_large(_scratch_parameters(train))
    uri = base_of(train.base_model)
    if not is_local(uri):  # only a config that is here is planned
        return True
    path = local_path(uri)
    if path.is_file():
        return is_large(path.stat().st_size / SMALLEST_WEIGHT)
    return is_large(sum(file.stat().st_size for file in path.glob("*.safetensors")) / 2)


def _scratch_parameters(train: TrainSettings) -> float:
    """About how many parameters a fresh model has; infinity if its config has to be built."""
    number, unit = train.model_size[:-1], train.model_size[-1:]
    try:
        return float(number) * {"M": 1e6, "B": 1e9}[unit]
    except (ValueError, KeyError):
        return math.inf
