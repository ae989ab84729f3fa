"""A model in an image, in a folder that KServe knows ("modelcar"): found there and unpacked."""

import fnmatch
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nudge.components.common.clients import image_registry
from nudge.components.common.core.errors import UserError

MODEL_FOLDER = "models"
"""Where KServe looks for a model in an image
(https://kserve.github.io/website/docs/model-serving/storage/providers/oci)."""
FILES = "nudge-lm/files"
"""Annotation of a layer: the files of the model that are in it, as a JSON list."""
UNPACKED_RATIO, UNPACKED_FREE = 20, 64 << 20
"""A layer may unpack to so many times its own size, and that many bytes more. Weights compress to
more than a half, text to a tenth."""


def image_manifests(
    source: image_registry.Repository, reference: image_registry.Reference
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """An image's manifests for Linux, each with its platform (empty where only its config says)."""
    read = json.loads(source.manifest(reference.name or "latest"))
    if "manifests" not in read:
        return [({}, read)]
    return [
        (entry["platform"], json.loads(source.manifest(entry["digest"])))
        for entry in read["manifests"]
        if entry.get("platform", {}).get("os") == "linux"
    ]


def exists(uri: str) -> bool:
    """Whether the registry has the image."""
    reference = image_registry.parse(uri)
    with image_registry.repository(reference) as source:
        return bool(source.digest(reference.name))


def download_image(uri: str, folder: Path, files: tuple[str, ...] = ("*",)) -> None:
    """Unpack the files of the model in an image that have a name like one of ``files``.

    Raises `UserError` if there are none, or one would lie out of ``folder``.
    """
    reference = image_registry.parse(uri)
    with image_registry.repository(reference) as source:
        manifests = image_manifests(source, reference)
        if not manifests:
            raise UserError(f"{uri} has no image for Linux")
        # The layers of the model are the same for every machine; those of the base are not needed.
        for layer in manifests[0][1]["layers"]:
            told = layer.get("annotations", {}).get(FILES)
            if told is None or any(_wanted(name, files) for name in json.loads(told)):
                size = int(layer["size"])
                source.read_blob(
                    layer["digest"],
                    lambda chunks, size=size: _unpack(uri, chunks, folder, files, size),  # type: ignore[misc]
                    size,
                )
    if not folder.is_dir():
        raise UserError(f"{uri}: no file of a model is below /{MODEL_FOLDER} in this image")


def _wanted(name: str, files: tuple[str, ...]) -> bool:
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
                if below != MODEL_FOLDER or not name or not _wanted(name, files):
                    continue
                path = (folder / name).resolve()
                if not path.is_relative_to(folder.resolve()):
                    raise UserError(f"{uri}: {member.name} leads out of the folder")
                if member.issym() or member.islnk():
                    raise UserError(f"{uri}: {member.name} is a link; a model is made of files")
                content = archive.extractfile(member)
                if content is None:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as target:
                    while block := content.read(image_registry.BLOCK):
                        target.write(block)
    except tarfile.TarError as error:
        raise UserError(f"{uri}: a layer cannot be read as a tar archive: {error}") from None


class _Chunks(io.RawIOBase):
    """A file that is read from an iterator of bytes."""

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
