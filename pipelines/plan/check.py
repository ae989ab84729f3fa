"""Refuse a recipe that does not fit its hardware, before anything is spent."""

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import read_recipe, step_settings
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.train.settings import TrainSettings
from nudge.pipelines.plan.settings import PlanSettings

SMALL_SHARE = 0.02
"""A base model whose file takes less of this machine's memory is not planned before a run: training
all of its weights takes 16 bytes per parameter, and a 4-bit file has half a byte."""


def check_here(text: str) -> None:
    """Raise `UserError` if training on this machine would need more memory than it has.

    A small base model is not checked, because the plan takes seconds.
    """
    train = step_settings(TrainSettings, "train", text)
    if train.launcher == "local" and _is_large(train.base_model):
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
    from nudge.pipelines.plan.config import ConfigNotHere
    from nudge.pipelines.plan.plan import plan_recipe

    try:
        plan = plan_recipe(name, text)
    except ConfigNotHere as error:
        return f"not planned: {error}"
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
        "parts"
    )


def _is_large(uri: str) -> bool:
    import psutil

    if not uri or not is_local(uri):
        return False
    path = local_path(uri)
    files = [path] if path.is_file() else [*path.glob("*.safetensors")]
    size = sum(file.stat().st_size for file in files)
    return size > SMALL_SHARE * psutil.virtual_memory().total
