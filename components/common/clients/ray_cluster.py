"""Join a Ray cluster (KubeRay), or start Ray on this machine, for steps with `engine: ray`."""

import contextlib
import importlib.util
import logging
import os
import secrets
import tempfile
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
    address = address or os.environ.get("RAY_ADDRESS", "")
    if not address:
        _keep_to_this_user()
    import ray
    import ray.data

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Workers must not import a module from the current folder either.
    quiet["runtime_env"] = {"env_vars": {"PYTHONSAFEPATH": "1"}}
    with contextlib.ExitStack() as stack:
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                # Ray opens its own folder to everybody, so a private one contains it.
                quiet["_temp_dir"] = f"{stack.enter_context(_private_folder())}/ray"
                ray.init(num_cpus=cores, include_dashboard=False, **quiet)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            where = f"cannot join the Ray cluster at {address}" if address else "cannot start Ray"
            raise UserError(f"{step}.ray_address = {address!r}: {where}: {error}") from None
        stack.callback(ray.shutdown)
        # The step reports its own progress.
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield ray


def _private_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for the sockets and logs of Ray on this machine; its own, /tmp/ray, may belong to
    another user. In /tmp, because the path of a socket must be short."""
    return tempfile.TemporaryDirectory(prefix="nudge-ray-", dir="/tmp", ignore_cleanup_errors=True)


def _keep_to_this_user() -> None:
    """Let the Ray that starts here listen on the loopback interface only, and refuse requests
    without a token of this process.

    Whoever reaches Ray's ports can run code as this user. Ray reads these variables when it is
    imported; by itself it would keep a token in ~/.ray, in a file that other users may read.
    """
    # Where clusters are off, as on macOS, Ray uses the loopback address; `_node_ip_address` cannot
    # ask for it (`get_node_ip_address` and `resolve_ip_for_localhost` in ray/_private/services.py).
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
