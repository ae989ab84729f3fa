"""Build the images with docker, podman or buildah, whichever is here; `make images` runs this."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

from nudge.components.common.core.errors import UserError, nearest
from nudge.components.common.core.images import DATA_IMAGE, TRAIN_IMAGE, WORKBENCH_IMAGE
from nudge.components.common.core.provenance import code_version

ROOT = Path(__file__).parents[1]
IMAGES = {
    "data": DATA_IMAGE,
    "train": TRAIN_IMAGE,
    "workbench": WORKBENCH_IMAGE,
}
CA = "/run/secrets/ca.pem"
"""Where the file given as ``--ca`` is while an image is built."""

ENGINES = ("podman", "docker", "buildah")
ENVIRONMENT = {**os.environ, "DOCKER_BUILDKIT": "1"}


@click.command()
@click.argument("names", nargs=-1, metavar="[data|train|workbench]...")
@click.option("--engine", "wanted", type=click.Choice(ENGINES), help="Default: the first found.")
@click.option("--base-image", default="", help="Default: as the Containerfile says, by digest.")
@click.option("--torch", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--offline", is_flag=True, help="Install from images/wheels, without a network.")
@click.option("--network", default="", help="The network that the build sees, such as host.")
@click.option("--pip-conf", type=click.Path(exists=True), help="Names a mirror; in no layer.")
@click.option(
    "--ca", type=click.Path(exists=True), help="A CA that pip trusts in the build; in no layer."
)
def main(names: tuple[str, ...], wanted: str | None, **options: str) -> None:
    """Build the named images (all by default) and print their sizes."""
    try:
        program = engine(wanted)
        for name in names or IMAGES:
            build(program, name, **options)
            click.echo(f"{IMAGES[name]}  {size_mb(program, IMAGES[name])} MB")
    except UserError as error:
        raise click.ClickException(str(error)) from None


def engine(wanted: str | None = None) -> str:
    """The first program here that can build, of that name if one is given; raises `UserError`."""
    for folder in os.environ["PATH"].split(os.pathsep):
        for name in [wanted] if wanted else ENGINES:
            program = shutil.which(name, path=folder)
            if program is None:
                continue
            # Without BuildKit docker knows no secrets; newer clients bring it as a plugin.
            done = subprocess.run(
                [program, "build", "--help"], env=ENVIRONMENT, capture_output=True, text=True
            )
            if done.returncode == 0 and "--secret" in done.stdout:
                return program
    raise UserError(
        f"no {wanted or 'podman, docker or buildah'} that can build was found on the PATH; install "
        "one (docker with BuildKit: the package docker-buildx)"
    )


def build(program: str, name: str, **options: str) -> None:
    """Build one image; raises `UserError` if there is none of that name or the builder fails."""
    if name not in IMAGES:
        raise UserError(f"there is no image {name!r}; {nearest(name, IMAGES)}")
    torch = "none" if name == "data" else options.get("torch") or "cuda"
    arguments = {"IMAGE": name, "TORCH": torch, "CODE_VERSION": code_version()}
    if options.get("base_image"):
        arguments["BASE_IMAGE"] = options["base_image"]
    for wheel in (ROOT / "dist").glob("nudge_kernels-*.whl"):  # `make wheel` was run
        folder = ROOT / "images" / "wheels" / "cuda"
        folder.mkdir(exist_ok=True)
        shutil.copy(wheel, folder)
    pip = ["--no-index"] if options.get("offline") else []
    pip += ["--cert", CA] if options.get("ca") else []
    if pip:
        arguments["PIP_OPTIONS"] = " ".join(pip)
    network = "none" if options.get("offline") else options.get("network")
    command = [program, "build", "--file", "images/Containerfile", "--tag", IMAGES[name]]
    command += [f"--build-arg={key}={value}" for key, value in arguments.items()]
    command += ["--network", network] if network else []
    for key, secret in (("pip_conf", "pip.conf"), ("ca", "ca.pem")):
        if options.get(key):
            command += ["--secret", f"id={secret},src={options[key]}"]
    if subprocess.run([*command, "."], cwd=ROOT, env=ENVIRONMENT, stdout=sys.stderr).returncode:
        raise UserError(f"the build of {IMAGES[name]} failed; its output stands above")


def size_mb(program: str, image: str) -> int:
    """The size of an image and its base, in units of 10^6 bytes."""
    if Path(program).name == "buildah":  # which tells it in words alone
        command = [program, "images", "--format", "{{.Size}}", image]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        number, unit = done.stdout.split()
        return round(float(number) * {"KB": 1e-3, "MB": 1, "GB": 1e3}[unit])
    command = [program, "inspect", "--type", "image", "--format", "{{.Size}}", image]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(int(done.stdout) / 1e6)


if __name__ == "__main__":
    main()
