"""Join a Ray cluster (KubeRay), or start Ray on this machine, for steps with `engine: ray`."""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any

from nudge.components.common.core.errors import UserError


def check_ray(step: str) -> None:
    """Raise `UserError` that names the setting of ``step`` if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            f"{step}.engine: ray needs Ray, which is not installed; install nudge-lm[ray] here and "
            f"in the cluster's image, or set {step}.engine: local"
        )


@contextlib.contextmanager
def joined_ray(step: str, address: str, cores: int) -> Iterator[Any]:
    """Yield the module ``ray``, connected to a cluster and ready for Ray Data.

    ``address`` is that of a running cluster. If it is empty and RAY_ADDRESS is not set, Ray starts
    on this machine with ``cores`` cores, until the block ends. Raises `UserError` that names the
    setting of ``step`` if Ray is not installed or the cluster cannot be reached.
    """
    check_ray(step)
    import ray
    import ray.data

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Workers must not import a module from the current folder either.
    quiet["runtime_env"] = {"env_vars": {"PYTHONSAFEPATH": "1"}}
    address = address or os.environ.get("RAY_ADDRESS", "")
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(num_cpus=cores, include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        where = f"cannot join the Ray cluster at {address}" if address else "cannot start Ray here"
        raise UserError(f"{step}.ray_address = {address!r}: {where}: {error}") from None
    # The step reports its own progress.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()
