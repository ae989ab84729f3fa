"""The step `upload`: a model folder to an object store or image registry, complete or invisible."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.model import FILE, read_model_facts
from nudge.components.common.artifacts.model_files import (
    MANIFEST,
    Tampered,
    Upload,
    UploadedFile,
    model_files,
    read_upload,
    weights_sha256,
)
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.step import step
from nudge.components.common.core.store import Store
from nudge.components.upload.settings import UploadSettings

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

Listing = dict[str, UploadedFile]
"""The entries of the manifest, by file name."""


@step("upload", reuse=False)
def upload(settings: UploadSettings, *, model: Path, version: str) -> dict[str, Any]:
    """Upload a model folder to ``<target>/<model_name>/<version>/``, or an image of it to
    ``<target>/<model_name>:<version>``.

    ``manifest.json`` there names the model and the version, and lists each file with its size and
    sha256. A version is complete or invisible: in an object store the manifest, in a registry the
    tag, is written last and only if it does not exist yet. Nothing is ever replaced. Repeating an
    upload is not an error: files, parts of files and layers that exist already are not sent again.
    The URI of an image ends in its digest, so it always names the same image. Raises `UserError`
    if the version exists with other content, if the weights are not those that training wrote or
    are not quantized as the settings say, if a file changes during the upload, and for pickles and
    links out of the folder.
    """
    from nudge.components.common.core.names import check_name

    check_name("the version", version)
    files = _files(model)
    trained = _trained_sha256(files)
    _check_quantized(settings, model)
    size = sum(path.stat().st_size for path in files.values())
    send = _to_registry if settings.target.startswith("oci:") else _to_store
    uri = send(settings, files, version, trained)
    return {"uri": uri, "files": len(files), "bytes": size}


def _to_store(settings: UploadSettings, files: dict[str, Path], version: str, trained: str) -> str:
    from nudge.components.common.clients.bucket import BucketStore
    from nudge.components.common.clients.storage import s3_errors
    from nudge.components.common.core.progress import progress
    from nudge.components.upload.sending import Sender

    target = (settings.target or f"s3://{_bucket()}/models").rstrip("/")
    uri = f"{target}/{settings.model_name}/{version}"
    store = BucketStore(uri)
    size = sum(path.stat().st_size for path in files.values())
    with (
        s3_errors(f"upload to {uri}"),
        progress("upload", total=size, unit="bytes") as bar,
        contextlib.closing(Sender(store, bar.advance)) as sender,
    ):
        listing = _send(sender, store, files, bar)
        _check_trained(listing, trained)
        if settings.read_back:
            bar.note(stage="reading back")
            for name, entry in listing.items():
                if sender.read_back(name) != entry.sha256:
                    raise UserError(
                        f"{uri}/{name} differs from the file that was sent: its sha256 is not "
                        f"{entry.sha256}. The version stays invisible. Delete it there, and report "
                        "this to the administrator of the store"
                    )
        _publish(store, Upload(listing, settings.model_name, version))
        sender.forget()
    return uri


def _bucket() -> str:
    from nudge.components.common.clients.storage import bucket_name

    bucket = bucket_name()
    if not bucket:
        raise UserError("upload.target is empty and AWS_S3_BUCKET is not set; set one of them")
    return bucket


def _to_registry(
    settings: UploadSettings, files: dict[str, Path], version: str, trained: str
) -> str:
    from nudge.components.common.clients import image_registry
    from nudge.components.common.clients.image_reference import parse_reference
    from nudge.components.common.core.progress import progress
    from nudge.components.upload import image
    from nudge.components.upload.sending import Taken, unchanged

    tagged = parse_reference(f"{settings.target.rstrip('/')}/{settings.model_name}:{version}")
    layers = image.layers_of(files)
    total = 2 * sum(layer.size for layer in layers)  # once to compute the digests, once to send
    with (
        image_registry.repository(tagged) as target,
        image_registry.repository(parse_reference(settings.base_image)) as base,
        progress("upload", total=total, unit="bytes") as bar,
    ):
        with contextlib.ExitStack() as stack:
            for path in files.values():
                stack.enter_context(unchanged(path))
            bar.note(stage="reading")
            layers = [image.measured(layer, bar.advance) for layer in layers]
            listing = {
                name: UploadedFile(sha256, layer.sizes[name])
                for layer in layers
                for name, sha256 in layer.sha256.items()
            }
            _check_trained(listing, trained)
            # Older releases wrote manifests without names.
            manifests = Upload(listing, settings.model_name, version), Upload(listing)
            named, nameless = (
                [*layers[:-1], image.with_text(layers[-1], MANIFEST, each.to_json())]
                for each in manifests
            )
            if existing := target.digest(version):
                if not any(image.same_model(target, existing, each) for each in (named, nameless)):
                    raise _taken(tagged.uri)
                return replace(tagged, tag="", digest=existing).uri
            layers = named
            made = image.Image(base, layers, version)
            bar.note(stage="sending")
            image.send(made, base, target, bar.advance)
            if settings.read_back:
                bar.note(stage="reading back")
                for layer in layers:
                    target.read_blob(layer.digest, lambda _: None)
        try:
            return image.publish(made, target).uri
        except Taken:
            raise _taken(tagged.uri) from None


def _send(sender: Any, store: Store, files: dict[str, Path], bar: Any) -> Listing:
    """Send every file; returns the manifest's entries for the bytes that are in the store."""
    from nudge.components.upload.sending import Taken, unchanged

    existing = store.list()
    complete = MANIFEST in existing
    begun = {} if complete else sender.begun()
    listing = {}
    with contextlib.ExitStack() as stack:
        for path in files.values():
            stack.enter_context(unchanged(path))
        for name, path in files.items():
            if complete and name not in existing:
                raise _taken(store.uri)
            try:
                if name in existing:
                    sent = sender.found(path, name)
                    bar.advance(sent.bytes)
                else:
                    sent = sender.send(path, name, begun.get(name, []))
            except Taken:
                raise _taken(store.uri) if complete else _mixed(store.uri, name) from None
            listing[name] = UploadedFile(sent.sha256, sent.bytes)
    return listing


def _publish(store: Store, manifest: Upload) -> None:
    """Make the version visible; raises `UserError` if another model is visible there."""
    if store.write(MANIFEST, manifest.to_json(), replace=False):
        return
    try:
        existing = read_upload(store.read(MANIFEST) or b"")
    except Tampered:
        raise _taken(store.uri) from None
    # Older releases wrote manifests without names.
    if existing not in (manifest, Upload(manifest.files)):
        raise _taken(store.uri) from None


def _trained_sha256(files: dict[str, Path]) -> str:
    """The sha256 of the weights that training wrote; empty for a model from elsewhere."""
    if FILE not in files:
        return ""
    return read_model_facts(files[FILE].parent).weights_sha256 or ""


def _check_quantized(settings: UploadSettings, model: Path) -> None:
    if settings.quantize is None:
        return
    served = read_model_facts(model).training.served
    if served is None or served.kind != settings.quantize:
        raise UserError(
            f"upload.quantize = {settings.quantize}, but the model in {model} was "
            f"{f'quantized to {served.kind}' if served else 'not quantized'} when it was trained; "
            "train it again with this setting, or remove train.quantize"
        )


def _check_trained(listing: Listing, trained: str) -> None:
    actual = weights_sha256(Upload(listing).sha256)
    if trained not in ("", actual):
        raise UserError(
            f"the weights have the sha256 {actual}, but training wrote {trained}: they were "
            "changed since. Nothing of this version is visible; train the model again"
        )


def _files(model: Path) -> dict[str, Path]:
    """The folder's files by relative name, without hidden files and a manifest."""
    root = model.resolve()
    if not (root / "config.json").is_file():
        raise UserError(f"{model} is not a model folder: config.json is missing")
    files = model_files(root)
    for path in files.values():
        if not path.resolve().is_relative_to(root):
            raise UserError(f"{path} is a link out of the model folder")
        if path.suffix in PICKLES:
            raise UserError(f"{path} may contain a pickle, which can run code; use safetensors")
    _check_weights(root, files)
    return files


def _check_weights(root: Path, files: dict[str, Path]) -> None:
    """Raise `UserError` if there are no weights, or if a shard is missing."""
    index = root / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if lost := sorted(named - files.keys()):
            raise UserError(
                f"{root} is not complete: {', '.join(lost)} is missing, which its index names"
            )
    elif not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{root} has no weights: it has no .safetensors file")


def _taken(uri: str) -> UserError:
    return UserError(f"{uri} already has another model; a version is never overwritten")


def _mixed(uri: str, name: str) -> UserError:
    return UserError(
        f"{uri}/{name} has other content, from an upload that is still running or was interrupted; "
        "choose another version. If nothing is uploading there now, you can instead delete "
        f"everything below {uri}/ and run the upload again"
    )
