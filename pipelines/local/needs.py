"""What a recipe needs of this machine besides nudge: looked for before a run has trained for hours.

Each check is the one that its step makes when it comes to it, and says the same.
"""

from collections.abc import Callable
from functools import partial

from nudge.components.common.errors import UserError
from nudge.components.common.kube import connect
from nudge.components.common.ray_cluster import check_ray
from nudge.components.common.recipe import step_settings
from nudge.components.deploy.settings import DeploySettings
from nudge.components.evaluate.settings import EvaluateSettings
from nudge.components.evaluate.tasks import check_harness
from nudge.components.ingest.settings import IngestSettings
from nudge.components.tokenize.settings import TokenizeSettings
from nudge.components.train.record import check_mlflow
from nudge.components.train.settings import TrainSettings


def check(recipe: str) -> None:
    """Raise `UserError` that names all that the steps of a recipe would not find here, a line each:
    the packages of an extra, and a cluster (which must be known, and is not asked anything)."""
    train = step_settings(TrainSettings, "train", recipe)
    deploy = step_settings(DeploySettings, "deploy", recipe)
    engines = {
        "ingest": step_settings(IngestSettings, "ingest", recipe).engine,
        "tokenize": step_settings(TokenizeSettings, "tokenize", recipe).engine,
    }
    checks: list[Callable[[], object]] = [
        partial(check_ray, step) for step, engine in engines.items() if engine == "ray"
    ]
    if train.launcher == "local":
        checks.append(check_mlflow)
    else:
        checks.append(partial(connect, train.cluster.namespace))
    checks.append(partial(check_harness, step_settings(EvaluateSettings, "evaluate", recipe)))
    if deploy.target == "kserve":
        checks.append(partial(connect, deploy.kserve.namespace))
    problems: dict[str, None] = {}  # a set in the order of the steps
    for each in checks:
        try:
            each()
        except UserError as error:
            problems[str(error)] = None
    if problems:
        raise UserError("\n".join(problems))
