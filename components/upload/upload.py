"""The step `upload`: a model folder to an object store or a registry, complete or invisible."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.model_files import FORMAT, MANIFEST, VERSION, model_files
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.step import step
from nudge.components.upload.settings import UploadSettings

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

Listing = dict[str, dict[str, Any]]


@step("upload", reuse=False)
def upload(settings: UploadSettings, *, model: Path, version: str) -> dict[str, Any]:
    """Upload a model folder to ``<target>/<model_name>/<version>/``; as an image to
    ``<target>/<model_name>:<version>``.

    ``manifest.json`` there names the model and the version, and lists each file with its size and
    sha256. A version is complete or invisible: in an object store the manifest is written last and
    only if there is none yet, and in a registry the tag. Nothing is ever replaced. The same content
    again is no error: files, parts of files and layers that are there already are not sent again.
    The URI of an image ends
    in its digest, so that it never means another one. Raises `UserError` on other content under
    the same version, on weights that are not those that training wrote, on a file that changes
    meanwhile, on pickles and on links out of the folder.
    """
    from nudge.components.common.core.names import check_name

    check_name("the version", version)
    files = _files(model)
    trained = _trained_sha256(files)
    size = sum(path.stat().st_size for path in files.values())
    send = _to_registry if settings.target.startswith("oci:") else _to_store
    uri = send(settings, files, version, trained)
    return {"uri": uri, "files": len(files), "bytes": size}


def _to_store(settings: UploadSettings, files: dict[str, Path], version: str, trained: str) -> str:
    from nudge.components.common.clients.storage import s3_client, s3_errors, split_s3_uri
    from nudge.components.common.core.progress import progress
    from nudge.components.upload.sending import Sender

    bucket, prefix = split_s3_uri(settings.target or f"s3://{_bucket()}/models")
    prefix = "/".join([*filter(None, [prefix]), settings.model_name, version])
    uri = f"s3://{bucket}/{prefix}"
    client = s3_client()
    size = sum(path.stat().st_size for path in files.values())
    with (
        s3_errors(f"upload to {uri}"),
        progress("upload", total=size, unit="bytes") as bar,
        contextlib.closing(Sender(client, bucket, bar.advance)) as sender,
    ):
        listing = _send(sender, client, files, uri, bar)
        _check_trained(listing, trained)
        if settings.read_back:
            bar.note(stage="reading back")
            for name, entry in listing.items():
                if sender.read_back(f"{prefix}/{name}") != entry["sha256"]:
                    raise UserError(
                        f"{uri}/{name} does not come back as it was sent: its sha256 is not "
                        f"{entry['sha256']}; the version stays invisible, delete it there and ask "
                        "who keeps the store"
                    )
        _publish(client, uri, _manifest_text(listing, settings.model_name, version))
        sender.forget(prefix)
    return uri


def _bucket() -> str:
    from nudge.components.common.clients.storage import bucket_name

    bucket = bucket_name()
    if not bucket:
        raise UserError("upload.target is empty and AWS_S3_BUCKET is not set; give one of them")
    return bucket


def _to_registry(
    settings: UploadSettings, files: dict[str, Path], version: str, trained: str
) -> str:
    from nudge.components.common.clients import image_registry
    from nudge.components.common.core.progress import progress
    from nudge.components.upload import image
    from nudge.components.upload.sending import Taken, unchanged

    tagged = image_registry.parse(f"{settings.target.rstrip('/')}/{settings.model_name}:{version}")
    layers = image.layers_of(files)
    total = 2 * sum(layer.size for layer in layers)  # once to learn the digests, once to send
    with (
        image_registry.repository(tagged) as target,
        image_registry.repository(image_registry.parse(settings.base_image)) as base,
        progress("upload", total=total, unit="bytes") as bar,
    ):
        with contextlib.ExitStack() as stack:
            for path in files.values():
                stack.enter_context(unchanged(path))
            bar.note(stage="reading")
            layers = [image.measured(layer, bar.advance) for layer in layers]
            listing = {
                name: {"bytes": layer.sizes[name], "sha256": sha256}
                for layer in layers
                for name, sha256 in layer.sha256.items()
            }
            _check_trained(listing, trained)
            # An older nudge wrote manifests without names.
            texts = _manifest_text(listing, settings.model_name, version), _manifest_text(listing)
            named, nameless = (
                [*layers[:-1], image.with_text(layers[-1], MANIFEST, text)] for text in texts
            )
            if there := target.digest(version):
                if not any(image.same_model(target, there, each) for each in (named, nameless)):
                    raise _taken(tagged.uri)
                return replace(tagged, tag="", digest=there).uri
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


def _send(sender: Any, client: Any, files: dict[str, Path], uri: str, bar: Any) -> Listing:
    """Bring every file there; gives the manifest's entries, of the bytes that are in the store."""
    from nudge.components.common.clients.storage import list_keys, split_s3_uri
    from nudge.components.upload.sending import Taken, unchanged

    bucket, prefix = split_s3_uri(uri)
    there = list_keys(client, bucket, prefix)
    complete = f"{prefix}/{MANIFEST}" in there
    begun = {} if complete else sender.begun(prefix)
    listing = {}
    with contextlib.ExitStack() as stack:
        for path in files.values():
            stack.enter_context(unchanged(path))
        for name, path in files.items():
            key = f"{prefix}/{name}"
            if complete and key not in there:
                raise _taken(uri)
            try:
                if key in there:
                    sent = sender.found(path, key)
                    bar.advance(sent.bytes)
                else:
                    sent = sender.send(path, key, begun.get(key, []))
            except Taken:
                raise _taken(uri) if complete else _mixed(uri, name) from None
            listing[name] = {"bytes": sent.bytes, "sha256": sent.sha256}
    return listing


def _publish(client: Any, uri: str, body: bytes) -> None:
    """Make the version visible, unless it is; raises `UserError` if it is another one."""
    import botocore.exceptions

    from nudge.components.common.clients.storage import split_s3_uri
    from nudge.components.upload.sending import LOST

    bucket, prefix = split_s3_uri(uri)
    key = f"{prefix}/{MANIFEST}"
    try:
        client.put_object(Bucket=bucket, Key=key, Body=body, IfNoneMatch="*")
    except botocore.exceptions.ClientError as error:
        if error.response["Error"]["Code"] not in LOST:
            raise
        stored = io.BytesIO()
        client.download_fileobj(bucket, key, stored)
        ours, there = json.loads(body), json.loads(stored.getvalue())
        # An older nudge wrote no names.
        if there not in (ours, {key: ours[key] for key in ("format", "version", "files")}):
            raise _taken(uri) from None


def _manifest_text(listing: Listing, model_name: str = "", version: str = "") -> bytes:
    manifest = {"format": FORMAT, "version": VERSION, "files": listing}
    if model_name:
        manifest |= {"model": model_name, "model_version": version}
    return json.dumps(manifest, indent=2, sort_keys=True).encode()


def _trained_sha256(files: dict[str, Path]) -> str:
    """What training wrote down of the weights that it left; empty of a model from elsewhere."""
    from nudge.components.common.core.publish import read_manifest

    if "nudge.json" not in files:
        return ""
    facts = read_manifest(files["nudge.json"], "nudge.model", 1)
    return str(facts.get("weights_sha256", ""))


def _check_trained(listing: Listing, trained: str) -> None:
    from nudge.components.common.models.base_model import weights_sha256

    actual = weights_sha256({name: entry["sha256"] for name, entry in listing.items()})
    if trained not in ("", actual):
        raise UserError(
            f"the weights have the sha256 {actual}, and training wrote {trained}: they were "
            "changed since; nothing of this version is visible, train it again"
        )


def _files(model: Path) -> dict[str, Path]:
    """The folder's files by relative name; hidden ones and a manifest are left out."""
    root = model.resolve()
    if not (root / "config.json").is_file():
        raise UserError(f"{model} is no model folder: config.json is not in it")
    files = model_files(root)
    for path in files.values():
        if not path.resolve().is_relative_to(root):
            raise UserError(f"{path} is a link that leads out of the model folder")
        if path.suffix in PICKLES:
            raise UserError(f"{path} may hold a pickle, which can run code; use safetensors")
    _check_weights(root, files)
    return files


def _check_weights(root: Path, files: dict[str, Path]) -> None:
    """Refuse weights of which a shard is missing, and such as are not those that were trained."""
    index = root / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if lost := sorted(named - files.keys()):
            raise UserError(f"{root} is not whole: its index names {', '.join(lost)}, not there")
    elif not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{root} has no weights: there is no .safetensors file in it")


def _taken(uri: str) -> UserError:
    return UserError(f"{uri} holds another model already; a version is never overwritten")


def _mixed(uri: str, name: str) -> UserError:
    return UserError(
        f"{uri}/{name} holds other bytes, of an upload that is under way or ended before it was "
        "complete; give another version, or, if nothing uploads there now, delete what is below "
        f"{uri}/ and run it again"
    )
