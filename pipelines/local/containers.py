"""Steps in containers here, as on OpenShift: images, an id that nobody has, an unwritable root.

`kfp.local.DockerRunner` runs them. They share this machine's network, by which they reach the
embedded services, and write below the run's folder and ``<home>/containers`` alone.
"""

import glob
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import read_recipe
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.deploy.local.host_serving import TOKEN, URL
from nudge.components.ingest.listing import local_name, named_uris
from nudge.pipelines.placement import OPTIONAL_KEYS, REQUIRED_KEYS, SETTINGS_KEYS

COMPILED = Path(__file__).parents[1] / "compiled" / "train_and_serve.yaml"
LABEL = "nudge.run"
SHARED_MEMORY = "1g"
GIVEN = (*REQUIRED_KEYS, *OPTIONAL_KEYS, *SETTINGS_KEYS, URL, TOKEN)
"""What a pod would get from the data connection and the settings, and the way to local serving."""
TOKEN_VARIABLE = "KF_PIPELINES_SA_TOKEN_PATH"
"""The file of the registry's token; a step gets a copy below the folder that it can read."""
RUN = ("NUDGE_RUN_ID", "NUDGE_RECIPE", "NUDGE_EVENTS")


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
            f"--engine docker needs a Docker daemon, and none answers ({error}); start it, or "
            "leave the option out to run the steps as processes"
        ) from None
    if missing := sorted(images - known):
        raise UserError(
            f"Docker has no image {' and no image '.join(missing)} here; `make images TORCH=cpu` "
            "builds them (or pull them)"
        )


def check_paths(recipe: str, home: Path) -> None:
    """Raise `UserError` if a local file that the recipe names cannot be read by the containers."""
    user = user_of(home)
    for path in named_paths(recipe):
        if closed := [each for each in (path, *path.rglob("*")) if not _can_read(each, user)]:
            raise UserError(
                f"{closed[0]} cannot be read by the user {user} that the containers run as; "
                f"open it: chmod -R go+rX {path}"
            )


def runner(recipe: str, artifacts: Path, file: Path) -> Any:
    """The DockerRunner of a run, whose variables this process has; makes what it writes to.

    ``file`` holds the recipe's text, and the steps read it there.
    """
    from docker.types import Mount
    from kfp import local

    home, events = Path(os.environ["NUDGE_HOME"]), Path(os.environ["NUDGE_EVENTS"])
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
        # Where SELinux is on, this machine's files keep the labels that they have.
        security_opt=["no-new-privileges", "label=disable"],
        shm_size=SHARED_MEMORY,
        labels={LABEL: os.environ["NUDGE_RUN_ID"]},
        working_dir=os.getcwd(),
        environment=_environment(state),
        mounts=[
            *(Mount(str(path), str(path), type="bind") for path in (state, events)),
            *(Mount(str(path), str(path), type="bind", read_only=True) for path in readable),
        ],
    )


def user_of(home: Path) -> int:
    """The id that containers run as: this user's; for root one that nobody has, the same for all
    runs of a home, as OpenShift gives each project a range of its own."""
    if os.getuid():
        return os.getuid()
    digest = hashlib.sha256(str(home).encode()).digest()
    return 1_000_000_000 + int.from_bytes(digest[:2]) * 10_000


def named_paths(recipe: str) -> list[Path]:
    """The files and folders of this machine that a recipe names, absolute; globs are resolved."""
    values = read_recipe(recipe)
    data = named_uris((values.get("ingest") or {}).get("data_uri", ""))
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
    """Remove the containers of a run that run still."""
    import docker

    client = docker.from_env()
    for container in client.containers.list(filters={"label": f"{LABEL}={run_id}"}):
        container.remove(force=True)


def _token(state: Path) -> list[Path]:
    """The copy of the registry's token for steps in containers; none if there is no token."""
    source = Path(os.environ.get(TOKEN_VARIABLE, ""))
    if not source.is_file():
        return []
    copy = state / "model-registry.token"
    copy.unlink(missing_ok=True)
    with os.fdopen(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(source.read_text(encoding="utf-8"))
    return [copy]


def _environment(state: Path) -> dict[str, str]:
    given = {name: os.environ[name] for name in (*GIVEN, *RUN) if os.environ.get(name)}
    own: dict[str, Path | str] = {"NUDGE_HOME": state, "HF_HOME": state / "huggingface"}
    checkpoints = os.environ["NUDGE_CHECKPOINTS"]
    own["NUDGE_CHECKPOINTS"] = checkpoints if "://" in checkpoints else state / "checkpoints"
    if (copy := state / "model-registry.token").is_file():
        own[TOKEN_VARIABLE] = copy
    if "NUDGE_REUSE" in os.environ:
        own["NUDGE_REUSE"] = state / "reuse"
    return given | {name: str(value) for name, value in own.items()}


def _can_read(path: Path, user: int) -> bool:
    """Whether ``user`` of group 0 can read a file or list a folder, by the mode of it alone."""
    found = path.stat()
    if found.st_uid == user:
        return True
    readable, entered = (
        (stat.S_IRGRP, stat.S_IXGRP) if found.st_gid == 0 else (stat.S_IROTH, stat.S_IXOTH)
    )
    needed = readable | entered if path.is_dir() else readable
    return found.st_mode & needed == needed
