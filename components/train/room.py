"""The disk and memory of the pod that trains, checked before it downloads the base model."""

from pathlib import Path

import torch

from nudge.components.common.core.environment import in_pipeline_step
from nudge.components.common.preflight.machine import check_machine
from nudge.components.common.preflight.remote_base import check_remote_base
from nudge.components.train.settings import TrainSettings

DISK_BYTES = 4
"""Per parameter: the base model and the trained one, with 2 bytes each."""


def check_room(settings: TrainSettings, folder: Path) -> None:
    """Raise `UserError` if the base model cannot be trained in this pod.

    ``folder`` is where the model is written. On a laptop `preflight` checks the same earlier.
    """
    if in_pipeline_step() and settings.mode != "scratch" and settings.launcher == "local":
        parameters = check_remote_base(settings.base_model)
        remedy = "use a node with a larger disk, or a smaller base model"
        on_cpu = not torch.cuda.is_available()
        check_machine(parameters, settings.mode, folder, on_cpu, DISK_BYTES, remedy)
