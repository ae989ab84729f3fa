"""Steps in containers on this machine, as on OpenShift: images, foreign user id, read-only root.

`kfp.local.DockerRunner` runs them. They share this machine's network, through which they reach the
embedded services, and write only below the run's folder and ``<home>/containers``.
"""

import glob
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from nudge.components.common.core.environment import (
    CHECKPOINTS,
    CONTAINER_LABEL,
    EVENTS,
    HOME,
    RECIPE,
    REGISTRY_TOKEN_PATH,
    REUSE,
    RUN_ID,
)
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import read_recipe
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.common.local.private_home import CONTAINER_UIDS
from nudge.components.deploy.local.host_serving import TOKEN, URL
from nudge.components.ingest.listing import local_name, named_uris
from nudge.pipelines.placement import OPTIONAL_KEYS, REQUIRED_KEYS, SETTINGS_KEYS

COMPILED = Path(__file__).resolve().parents[1] / "compiled" / "train_and_serve.yaml"
SHARED_MEMORY = "1g"
PASSED = (*REQUIRED_KEYS, *OPTIONAL_KEYS, *SETTINGS_KEYS, URL, TOKEN)
"""The variables that a pod would get from the data connection and the settings, and the two that
lead to local serving."""
RUN = (RUN_ID, RECIPE, EVENTS)


def check(compiled: Path) -> None:
    """Raise `UserError` unless a Docker daemon answers and has every image of the pipeline."""
    import docker

    spec = next(yaml.safe_load_all(compiled.read_text(encoding="utf-8")))
    images = {
        parameter["defaultValue"]
        for name, parameter in spec["root"]["inputDefinitions"]["parameters"].items()
        if name.endswith("_image")
    }
    try:
        client = docker.from_env()
        known = {tag for image in client.images.list() for tag in image.tags}
        known |= {name for image in client.images.list() for name in image.attrs["RepoDigests"]}
    except docker.errors.DockerException as error:
        raise UserError(
            f"--engine docker needs a Docker daemon, and none answers ({error}); start it, or omit "
            "the option to run the steps as processes"
        ) from None
    if missing := sorted(images - known):
        raise UserError(
            f"Docker has no image {' and no image '.join(missing)} here; build them with "
            "`make images TORCH=cpu`, or pull them"
        )


def check_paths(recipe: str, home: Path) -> None:
    """Raise `UserError` if a local file that the recipe names cannot be read by the containers."""
    user = user_of(home)
    for path in named_paths(recipe):
        if closed := [each for each in (path, *path.rglob("*")) if not _can_read(each, user)]:
            raise UserError(
                f"the user {user} that the containers run as cannot read {closed[0]}; "
                f"allow it: chmod -R go+rX {path}"
            )


def runner(recipe: str, artifacts: Path, file: Path) -> Any:
    """The DockerRunner of a run, whose variables this process has; makes the folders it writes to.

    ``file`` is the recipe, which the steps read there.
    """
    from docker.types import Mount
    from kfp import local

    home, events = Path(os.environ[HOME]), Path(os.environ[EVENTS])
    user, state = user_of(home), home / "containers"
    readable = sorted({*named_paths(recipe), file})
    file.chmod(0o644)
    for folder in (artifacts, state):
        folder.mkdir(parents=True, exist_ok=True)
    token = _token(state)
    for path in (artifacts, state, events, *token):
        if os.getuid() == 0:
            os.chown(path, user, 0)
    return local.DockerRunner(
        user=f"{user}:0",
        network_mode="host",
        read_only=True,
        tmpfs={"/tmp": "exec,mode=1777"},
        cap_drop=["ALL"],
        # With SELinux, the files of this machine keep their labels.
        security_opt=["no-new-privileges", "label=disable"],
        shm_size=SHARED_MEMORY,
        labels={CONTAINER_LABEL: os.environ[RUN_ID]},
        working_dir=os.getcwd(),
        environment=_environment(state),
        mounts=[
            *(Mount(str(path), str(path), type="bind") for path in (state, events)),
            *(Mount(str(path), str(path), type="bind", read_only=True) for path in readable),
        ],
    )


def user_of(home: Path) -> int:
    """The user id of the containers: this user's; for root an unused id, the same for all runs of a
    home, as OpenShift gives each project its own range."""
    if os.getuid():
        return os.getuid()
    digest = hashlib.sha256(str(home).encode()).digest()
    return CONTAINER_UIDS + int.from_bytes(digest[:2]) * 10_000


def named_paths(recipe: str) -> list[Path]:
    """The local files and folders that a recipe names, absolute; globs are resolved."""
    values = read_recipe(recipe)
    ingest = values.get("ingest") or {}
    parts = [ingest, *(ingest.get("mix") or [])]
    data = [uri for part in parts for uri in named_uris(part.get("data_uri", ""))]
    uris = [local_name(uri) if is_local(uri) and "package:" not in uri else uri for uri in data]
    for section in (values, values.get("train") or {}):
        uris.append(str(section.get("base_model", "")).rpartition("?else=")[2])
    paths = [local_path(uri) for uri in uris if uri.startswith("file:") or "://" not in uri]
    found = [
        name
        for path in paths
        for name in ([str(path)] if path.exists() else glob.glob(str(path)))
        if path != Path()
    ]
    return sorted({Path(name).absolute() for name in found})


def end(run_id: str) -> None:
    """Remove the running containers of a run."""
    import docker

    client = docker.from_env()
    for container in client.containers.list(filters={"label": f"{CONTAINER_LABEL}={run_id}"}):
        container.remove(force=True)


def _token(state: Path) -> list[Path]:
    """The copy of the registry's token for steps in containers; none if there is no token."""
    source = Path(os.environ.get(REGISTRY_TOKEN_PATH, ""))
    if not source.is_file():
        return []
    copy = state / "model-registry.token"
    copy.unlink(missing_ok=True)
    with os.fdopen(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(source.read_text(encoding="utf-8"))
    return [copy]


def _environment(state: Path) -> dict[str, str]:
    passed = {name: os.environ[name] for name in (*PASSED, *RUN) if os.environ.get(name)}
    own: dict[str, Path | str] = {HOME: state, "HF_HOME": state / "huggingface"}
    checkpoints = os.environ[CHECKPOINTS]
    own[CHECKPOINTS] = checkpoints if "://" in checkpoints else state / "checkpoints"
    if (copy := state / "model-registry.token").is_file():
        own[REGISTRY_TOKEN_PATH] = copy
    if REUSE in os.environ:
        own[REUSE] = state / "reuse"
    return passed | {name: str(value) for name, value in own.items()}


def _can_read(path: Path, user: int) -> bool:
    """Whether ``user`` in group 0 can read a file or list a folder, by its mode alone."""
    found = path.stat()
    if found.st_uid == user:
        return True
    readable, entered = (
        (stat.S_IRGRP, stat.S_IXGRP) if found.st_gid == 0 else (stat.S_IROTH, stat.S_IXOTH)
    )
    needed = readable | entered if path.is_dir() else readable
    return found.st_mode & needed == needed
