"""Find and unpack a model in a container image, in the folder that KServe expects ("modelcar")."""

import fnmatch
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nudge.components.common.clients import image_registry
from nudge.components.common.clients.image_reference import Reference, parse_reference
from nudge.components.common.core.errors import UserError

MODEL_FOLDER = "models"
"""The folder in which KServe looks for a model in an image
(https://kserve.github.io/website/docs/model-serving/storage/providers/oci)."""
FILES = "nudge-lm/files"
"""Annotation of a layer: the model files in it, as a JSON list."""
UNPACKED_RATIO, UNPACKED_FREE = 20, 64 << 20
"""A layer may unpack to this many times its own size, plus this many bytes. Weights compress to
more than a half, text to a tenth."""


def image_manifests(
    source: image_registry.Repository, reference: Reference
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """An image's manifests for Linux, each with its platform (empty if only its config has it)."""
    index = json.loads(source.manifest(reference.name or "latest"))
    if "manifests" not in index:
        return [({}, index)]
    return [
        (entry["platform"], json.loads(source.manifest(entry["digest"])))
        for entry in index["manifests"]
        if entry.get("platform", {}).get("os") == "linux"
    ]


def exists(uri: str) -> bool:
    """Whether the registry has the image."""
    reference = parse_reference(uri)
    with image_registry.repository(reference) as source:
        return bool(source.digest(reference.name))


def download_image(uri: str, folder: Path, files: tuple[str, ...] = ("*",)) -> None:
    """Unpack the model files in an image whose names match one of the patterns ``files``.

    Raises `UserError` if there are none, if one is a link or if one would be outside ``folder``.
    """
    reference = parse_reference(uri)
    with image_registry.repository(reference) as source:
        manifests = image_manifests(source, reference)
        if not manifests:
            raise UserError(f"{uri} has no image for Linux; build one")
        # The model's layers are the same on every platform; the base image's are not needed.
        for layer in manifests[0][1]["layers"]:
            listed = layer.get("annotations", {}).get(FILES)
            if listed is None or any(_matches(name, files) for name in json.loads(listed)):
                size = int(layer["size"])
                source.read_blob(
                    layer["digest"],
                    lambda chunks, size=size: _unpack(uri, chunks, folder, files, size),  # type: ignore[misc]
                    size,
                )
    if not folder.is_dir():
        raise UserError(f"{uri}: this image has no model files in /{MODEL_FOLDER}")


def _matches(name: str, files: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in files)


def _unpack(
    uri: str, chunks: Iterator[bytes], folder: Path, files: tuple[str, ...], size: int
) -> None:
    left = size * UNPACKED_RATIO + UNPACKED_FREE
    reader = io.BufferedReader(_Chunks(chunks), image_registry.BLOCK)
    try:
        with tarfile.open(fileobj=reader, mode="r|*") as archive:
            for member in archive:
                left -= member.size
                if left < 0:
                    raise UserError(
                        f"{uri}: a layer of {size} bytes unpacks to more than {UNPACKED_RATIO} "
                        "times its size; it is refused as a decompression bomb"
                    )
                below, _, name = member.name.removeprefix("./").partition("/")
                if below != MODEL_FOLDER or not name or not _matches(name, files):
                    continue
                path = (folder / name).resolve()
                if not path.is_relative_to(folder.resolve()):
                    raise UserError(f"{uri}: {member.name} is a path outside the model folder")
                if member.issym() or member.islnk():
                    raise UserError(
                        f"{uri}: {member.name} is a link; a model may contain regular files only"
                    )
                content = archive.extractfile(member)
                if content is None:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as target:
                    while block := content.read(image_registry.BLOCK):
                        target.write(block)
    except tarfile.TarError as error:
        raise UserError(f"{uri}: a layer is not a valid tar archive: {error}") from None


class _Chunks(io.RawIOBase):
    """A file object over an iterator of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            try:
                self._left = next(self._chunks)
            except StopIteration:
                return 0
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count
