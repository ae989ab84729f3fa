"""The driver of a RayJob: ``python -m nudge.components.train.cluster.ray_driver HANDOVER``.

Ray Train starts one worker per rank and connects them; each runs the same training as a rank of
torchrun. The first one sends back the model, the history and the report.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.recipe import step_settings
from nudge.components.common.core.step import exit_with_user_errors
from nudge.components.train.cluster.handover import Handover
from nudge.components.train.cluster.worker import OUTPUTS, TRY_AGAIN
from nudge.components.train.limits import limits_of
from nudge.components.train.ranks import BACKENDS, TIMEOUT
from nudge.components.train.settings import TrainSettings

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
# Lines of progress count even where they look like the line before.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")


def train_on_ray(handover: str, *, workers: int, cpus: float, gpu: bool) -> None:
    """Train on ``workers`` ranks, each with ``cpus`` cores and, with ``gpu``, one GPU.

    Raises `UserError` or `Transient` with a rank's own message, or `Transient` with Ray's if a rank
    died.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory() as own:  # for Ray's own files; checkpoints are ours
        trainer = TorchTrainer(
            run_rank,
            train_loop_config={"handover": handover},
            torch_config=TorchConfig(
                backend=BACKENDS["cuda" if gpu else "cpu"], timeout_s=int(TIMEOUT.total_seconds())
            ),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus}
            ),
            run_config=RunConfig(storage_path=own, name="train"),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error
        finally:
            ray.shutdown()


def run_rank(configuration: dict[str, Any]) -> None:
    """Run one rank: fetch the recipe and the tokens, and train."""
    import ray.train.torch

    from nudge.components.train.train import train_rank

    device = ray.train.torch.get_device()
    if device.type == "cuda":  # Ray decides which of the node's GPUs this rank uses
        os.environ["LOCAL_RANK"] = str(device.index)
    handover = Handover(configuration["handover"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        handover.fetch("recipe", folder / "recipe")
        recipe = (folder / "recipe").as_uri()
        settings = step_settings(TrainSettings, "train", recipe)
        outputs = {name: folder / name for name in OUTPUTS}
        paths = {"tokens": _tokens(handover, folder), **outputs}
        train_rank(settings, paths, limits_of(recipe))
        for name, path in outputs.items():
            if path.exists():  # only the first rank has outputs
                handover.send(name, path)


def _tokens(handover: Handover, folder: Path) -> Path:
    """The folder of this node's tokens, which one of its ranks fetches."""
    import ray.train
    import torch.distributed as dist

    context, path = ray.train.get_context(), folder / "tokens"
    node, fetches = context.get_node_rank(), context.get_local_rank() == 0
    if fetches:
        handover.fetch("tokens", path)
    folders: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(folders, (node, path) if fetches else None)
    found: Path = dict(filter(None, folders))[node]
    return found


def _cause(error: Any) -> UserError:
    """The error of the rank that failed first, or a `Transient` if no rank left a message."""
    failures = getattr(error, "worker_failures", {})
    for _, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", None) or failure.__cause__ or failure
        if isinstance(cause, UserError):
            return type(cause)(f"{cause}")
    return Transient(f"{error}")


@click.command()
@click.argument("uri")
def main(uri: str) -> None:
    """Train on the nodes of this Ray cluster; the inputs are in the folder URI."""
    with exit_with_user_errors(TRY_AGAIN), tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe"
        Handover(uri).fetch("recipe", recipe)
        job = step_settings(TrainSettings, "train", recipe.as_uri()).cluster
        ranks = max(1, job.gpus_per_node)
        train_on_ray(
            uri, workers=job.nodes * ranks, cpus=cores(job.cpu) // ranks or 1,
            gpu=job.gpus_per_node > 0,
        )  # fmt: skip


def cores(quantity: str) -> int:
    """The full cores of a Kubernetes quantity, such as 8 or 7500m; at least one."""
    value = float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
    return max(1, int(value))


if __name__ == "__main__":
    sys.exit(main())
