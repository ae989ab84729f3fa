"""What drives a RayJob: ``python -m nudge.components.train.cluster.ray_driver EXCHANGE``.

Ray Train starts a worker for each rank and joins them; each runs the training that torchrun's ranks
run. The first one hands the model, the history and the report back.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import step_settings
from nudge.components.common.core.step import exit_with_user_errors
from nudge.components.train.cluster.handover import Exchange
from nudge.components.train.cluster.worker import OUTPUTS
from nudge.components.train.ranks import BACKENDS, TIMEOUT
from nudge.components.train.settings import TrainSettings

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
# Each line of progress is of use, also one that is like the one before.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")


def train_on_ray(exchange: str, *, workers: int, cpus: float, gpu: bool) -> None:
    """Train on ``workers`` ranks, each with ``cpus`` cores and a GPU if asked for.

    Raises `UserError` with what a rank said, or with Ray's own words if one died.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory() as own:  # Ray keeps its notes here; checkpoints are ours
        trainer = TorchTrainer(
            run_rank,
            train_loop_config={"exchange": exchange},
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
            raise UserError(_cause(error)) from error
        finally:
            ray.shutdown()


def run_rank(given: dict[str, Any]) -> None:
    """One rank: the recipe and the tokens from the exchange, and the training."""
    import ray.train.torch

    from nudge.components.train.train import train_rank

    device = ray.train.torch.get_device()
    if device.type == "cuda":  # which of the node's GPUs is this rank's is Ray's to say
        os.environ["LOCAL_RANK"] = str(device.index)
    exchange = Exchange(given["exchange"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        exchange.fetch("recipe", folder / "recipe")
        settings = step_settings(TrainSettings, "train", (folder / "recipe").as_uri())
        outputs = {name: folder / name for name in OUTPUTS}
        train_rank(settings, tokens=_tokens(exchange, folder), **outputs)
        for name, path in outputs.items():
            if path.exists():  # the first rank's alone
                exchange.send(name, path)


def _tokens(exchange: Exchange, folder: Path) -> Path:
    """Where this node has the tokens, which one of its ranks brings there."""
    import ray.train
    import torch.distributed as dist

    context, path = ray.train.get_context(), folder / "tokens"
    node, brings = context.get_node_rank(), context.get_local_rank() == 0
    if brings:
        exchange.fetch("tokens", path)
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, (node, path) if brings else None)
    found: Path = dict(filter(None, places))[node]
    return found


def _cause(error: Any) -> str:
    """What the rank that failed first said, of all that failed because of it."""
    failures = getattr(error, "worker_failures", {})
    for _, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", None) or failure.__cause__ or failure
        if isinstance(cause, UserError):
            return f"{cause}"
    return f"{error}"


@click.command()
@click.argument("uri")
def main(uri: str) -> None:
    """Train on the nodes of this Ray cluster; the inputs stand at URI."""
    with exit_with_user_errors(), tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe"
        Exchange(uri).fetch("recipe", recipe)
        job = step_settings(TrainSettings, "train", recipe.as_uri()).cluster
        ranks = max(1, job.gpus_per_node)
        train_on_ray(
            uri, workers=job.nodes * ranks, cpus=cores(job.cpu) // ranks or 1,
            gpu=job.gpus_per_node > 0,
        )  # fmt: skip


def cores(quantity: str) -> int:
    """Whole cores of a Kubernetes quantity, such as 8 or 7500m; at least one."""
    value = float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
    return max(1, int(value))


if __name__ == "__main__":
    sys.exit(main())
