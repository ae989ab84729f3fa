"""A model as an image ("modelcar"): its files in layers on top of a small base image.

KServe runs such an image beside the server and links to its /models
(https://kserve.github.io/website/docs/model-serving/storage/providers/oci); for that the base image
must have sh, ln, ls and sleep. The layers are tar archives that are built while they are sent. The
same files always give the same bytes, so a layer that the registry has is not sent again.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

from nudge.components.common.clients import image_registry, modelcar
from nudge.components.common.clients.image_reference import Reference
from nudge.components.common.core.errors import UserError
from nudge.components.upload.sending import Taken

BASE_LAYER_BYTES = 1 << 30
"""The largest layer of a base image; it is read into memory."""
SMALL_BYTES = 16 << 20
"""Files up to this size share one layer."""
MAX_LAYERS = 90
"""Overlay file systems stack about 120 layers at most, including those of the base image."""
CONCURRENCY = 4
"""Layers sent at once."""
BLOCK = 1 << 20
END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Layer:
    """Files of a model as one tar archive; ``texts`` are files whose content is in memory.

    ``sizes`` are the files' bytes, by name. `measured` fills in ``digest``, and ``sha256`` by file.
    """

    files: dict[str, Path]
    sizes: dict[str, int]
    texts: dict[str, bytes] = field(default_factory=dict)
    digest: str = ""
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Size of the archive in bytes."""
        files = {**self.sizes, **{name: len(text) for name, text in self.texts.items()}}
        heads = [_header(folder, 0, tarfile.DIRTYPE) for folder in self._folders()]
        heads += [_header(_inside(name), size) for name, size in files.items()]
        bodies = (size + -size % tarfile.BLOCKSIZE for size in files.values())
        return sum(map(len, heads)) + sum(bodies) + len(END)

    def descriptor(self) -> dict[str, Any]:
        return {
            "mediaType": image_registry.LAYER,
            "digest": self.digest,
            "size": self.size,
            "annotations": {modelcar.FILES: json.dumps(sorted({*self.files, *self.texts}))},
        }

    def content(self, hashes: dict[str, str] | None = None) -> Iterator[bytes]:
        """The archive's bytes; the sha256 of each file is added to ``hashes``."""
        for folder in self._folders():
            yield _header(folder, 0, tarfile.DIRTYPE)
        for name, path in self.files.items():
            yield from _member(name, self.sizes[name], _blocks(path), hashes)
        for name, text in self.texts.items():
            yield from _member(name, len(text), iter([text]), hashes)
        yield END

    def _folders(self) -> list[str]:
        parents = (Path(_inside(name)).parents for name in (*self.files, *self.texts))
        return sorted({each.as_posix() for of_one in parents for each in of_one} - {"."})


def layers_of(files: dict[str, Path]) -> list[Layer]:
    """Distribute the files over at most `MAX_LAYERS` layers, with the small ones in the last."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    large = [name for name in sorted(files) if sizes[name] > SMALL_BYTES]
    per_layer = -(-len(large) // MAX_LAYERS) or 1
    groups = [large[first : first + per_layer] for first in range(0, len(large), per_layer)]
    groups.append(sorted(files.keys() - set(large)))
    return [
        Layer({name: files[name] for name in group}, {name: sizes[name] for name in group})
        for group in groups
    ]


def measured(layer: Layer, advance: Callable[[float], None]) -> Layer:
    """The layer with its digest and the sha256 of each file; reads the files once."""
    archive, hashes = hashlib.sha256(), dict[str, str]()
    for block in layer.content(hashes):
        archive.update(block)
        advance(len(block))
    return replace(layer, digest=f"sha256:{archive.hexdigest()}", sha256=hashes)


def with_text(layer: Layer, name: str, text: bytes) -> Layer:
    """The layer with one more file."""
    return measured(replace(layer, texts={**layer.texts, name: text}), lambda _: None)


class Image:
    """An image of these layers for each platform of the base image."""

    def __init__(
        self, base: image_registry.Repository, layers: Sequence[Layer], version: str
    ) -> None:
        self.layers = layers
        self.base_layers: dict[str, int] = {}
        """Size by digest."""
        self.small: dict[str, tuple[bytes, str]] = {}
        """Configurations and manifests by digest, with their media types."""
        entries = []
        for platform, manifest in modelcar.image_manifests(base, base.reference):
            config = json.loads(base.blob(manifest["config"]["digest"]))
            self.base_layers |= {each["digest"]: each["size"] for each in manifest["layers"]}
            entries.append(
                {
                    **self._add(self._manifest(manifest, config), image_registry.MANIFEST),
                    "platform": platform or {key: config[key] for key in ("os", "architecture")},
                }
            )
        if not entries:
            raise UserError(f"{base.reference.uri} has no Linux image; choose another base_image")
        self.index = _json(
            {
                "schemaVersion": 2,
                "mediaType": image_registry.INDEX,
                "manifests": entries,
                "annotations": {"org.opencontainers.image.version": version},
            }
        )

    def _manifest(self, base: dict[str, Any], config: dict[str, Any]) -> bytes:
        config = {
            **config,
            "rootfs": {
                **config["rootfs"],
                "diff_ids": [
                    *config["rootfs"]["diff_ids"],
                    *(layer.digest for layer in self.layers),
                ],
            },
        }
        if config.get("history"):
            config["history"] += [{"created_by": "nudge upload"} for _ in self.layers]
        return _json(
            {
                "schemaVersion": 2,
                "mediaType": image_registry.MANIFEST,
                "config": self._add(_json(config), image_registry.CONFIG),
                "layers": [
                    *({**each, "mediaType": _plain(each["mediaType"])} for each in base["layers"]),
                    *(layer.descriptor() for layer in self.layers),
                ],
            }
        )

    def _add(self, body: bytes, media: str) -> dict[str, Any]:
        digest = image_registry.digest_of(body)
        self.small[digest] = (body, media)
        return {"mediaType": media, "digest": digest, "size": len(body)}


def send(
    image: Image,
    base: image_registry.Repository,
    target: image_registry.Repository,
    advance: Callable[[float], None],
) -> None:
    """Send everything except the index to the registry, so that the image is not visible yet.

    ``advance`` is called with the bytes of the model's layers.
    """
    counting = Lock()

    def count(size: int) -> None:
        with counting:
            advance(size)

    pool = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="upload")
    try:
        for sent in [pool.submit(_send_layer, target, each, count) for each in image.layers]:
            sent.result()
    finally:
        pool.shutdown(cancel_futures=True)
    for digest, size in image.base_layers.items():
        if not target.has_blob(digest):
            body = base.blob(digest, min(size, BASE_LAYER_BYTES))
            target.put_blob(digest, size, lambda body=body: iter([body]))  # type: ignore[misc]
    for digest, (body, media) in image.small.items():
        if media == image_registry.MANIFEST:
            target.put_manifest(digest, body, media)
        elif not target.has_blob(digest):
            target.put_blob(digest, len(body), lambda body=body: iter([body]))  # type: ignore[misc]


def publish(image: Image, target: image_registry.Repository) -> Reference:
    """Make the image visible under the tag; returns its reference by digest.

    Raises `Taken` if the tag belongs to another image. A registry has no conditional write: of two
    processes that write one tag at the same moment, both may succeed, and the last one wins. A
    reference by digest is not affected.
    """
    digest, tag = image_registry.digest_of(image.index), target.reference.tag
    if target.digest(tag) not in ("", digest):
        raise Taken(tag)
    target.put_manifest(tag, image.index, image_registry.INDEX)
    if target.digest(tag) != digest:
        raise Taken(tag)
    return replace(target.reference, tag="", digest=digest)


def _send_layer(
    target: image_registry.Repository, layer: Layer, count: Callable[[int], None]
) -> None:
    if target.has_blob(layer.digest):
        count(layer.size)
        return
    counted = 0

    def content() -> Iterator[bytes]:
        nonlocal counted
        count(-counted)  # a retry starts over
        counted = 0
        for block in layer.content():
            yield block
            counted += len(block)
            count(len(block))

    target.put_blob(layer.digest, layer.size, content)


def same_model(target: image_registry.Repository, digest: str, layers: Sequence[Layer]) -> bool:
    """Whether an image has exactly these model layers, on any base image."""
    ours = [layer.digest for layer in layers]
    reference = replace(target.reference, tag="", digest=digest)
    manifests = modelcar.image_manifests(target, reference)
    return bool(manifests) and all(
        [each["digest"] for each in manifest["layers"]][-len(ours) :] == ours
        for _, manifest in manifests
    )


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header for a world-readable entry, without owner and time."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return entry.tobuf(tarfile.PAX_FORMAT)


def _member(
    name: str, size: int, blocks: Iterator[bytes], hashes: dict[str, str] | None
) -> Iterator[bytes]:
    yield _header(_inside(name), size)
    sha256, remaining = hashlib.sha256(), size
    for block in blocks:
        sha256.update(block)
        remaining -= len(block)
        if remaining < 0:
            break
        yield block
    if remaining:
        raise UserError(f"{name} changed while it was uploaded; nothing of this version is visible")
    yield bytes(-size % tarfile.BLOCKSIZE)
    if hashes is not None:
        hashes[name] = sha256.hexdigest()


def _inside(name: str) -> str:
    return f"{modelcar.MODEL_FOLDER}/{name}"


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _plain(media: str) -> str:
    """The OCI media type of a layer; Docker's own type has the same bytes."""
    docker = "application/vnd.docker.image.rootfs.diff.tar"
    return media.replace(f"{docker}.gzip", f"{image_registry.LAYER}+gzip").replace(
        docker, image_registry.LAYER
    )
