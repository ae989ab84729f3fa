"""Write a registered version for other programs: as a folder, an adapter or a GGUF file."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from nudge.components.common.artifacts import model_files
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import published
from nudge.components.common.models.registered import (
    check_download,
    download_model,
    pinned_uri,
    split_pin,
)

Kind = Literal["hf", "adapter", "gguf"]
ADAPTER = "adapter"
"""The folder of a model in which training with LoRA saves the adapter."""
OF_ADAPTER = (f"{ADAPTER}/*", f"*/{ADAPTER}/*", f"*{model_files.MANIFEST}")
"""Patterns of its files, in an image and in a bucket, and of the manifest."""
NEEDED = ("adapter_config.json", "adapter_model.safetensors")


def export_version(
    version: Version, folder: Path, kind: Kind, note: Callable[[str], None] = lambda stage: None
) -> str:
    """Write a version as ``kind`` into ``folder``, complete or not at all; returns what it wrote.

    Every file is checked against the registry. Raises `UserError` if ``folder`` exists, the files
    are not the registered ones, there is no adapter, or GGUF cannot represent the model.
    """
    if folder.exists():
        raise UserError(f"{folder} already exists; name a folder that does not")
    with published(folder) as part:
        if kind == "gguf":
            from nudge.components.common.models.gguf_file import write_gguf

            path = part / f"{version.model}-{version.name}.gguf"
            with tempfile.TemporaryDirectory(dir=part) as made:
                source = Path(made) / "model"
                source.mkdir()
                _download(version, source, ("*",), note)
                difference = write_gguf(source, path, note)
            check = f"; its next-token probabilities differ by at most {difference:.4f}"
        else:
            _download(version, part, OF_ADAPTER if kind == "adapter" else ("*",), note)
            if kind == "adapter":
                _only_adapter(version, part)
            _own_copies(part)
            check = ""
        files = [each for each in part.rglob("*") if each.is_file()]
        size = sum(each.stat().st_size for each in files) / 1e6
    names = f"{len(files)} files" if len(files) > 1 else files[0].name
    return f"{folder}: {names}, {size:,.1f} MB{check}"


def _download(
    version: Version, folder: Path, patterns: tuple[str, ...], note: Callable[[str], None]
) -> None:
    note(f"downloading {version.uri}")
    uri, digest = split_pin(pinned_uri(version))
    download_model(uri, folder, patterns)
    check_download(folder, uri, digest, partial=patterns != ("*",))


def _only_adapter(version: Version, folder: Path) -> None:
    """Move the adapter's files up, and remove all others."""
    if not all((folder / ADAPTER / name).is_file() for name in NEEDED):
        raise UserError(
            f"{version.model} {version.name} has no adapter, because it was not trained with "
            "train.mode: lora; export it with --format hf"
        )
    for each in folder.iterdir():
        if each.name != ADAPTER:
            each.unlink()
    for each in (folder / ADAPTER).iterdir():
        each.rename(folder / each.name)
    (folder / ADAPTER).rmdir()


def _own_copies(folder: Path) -> None:
    """Replace hard links to a run's files, so that a change of the export changes no run."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink > 1:
            copy = path.with_name(f".{path.name}.copy")
            shutil.copy2(path, copy)
            copy.replace(path)
