"""The step `upload`: a model folder to the object store, complete or invisible."""

import json
import os
from pathlib import Path
from typing import Any

from nudge.components.common.errors import UserError
from nudge.components.common.publish import sha256_file
from nudge.components.common.step import step
from nudge.components.upload.settings import UploadSettings

FORMAT, VERSION = "nudge.upload", 1
MANIFEST = "manifest.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PART_BYTES = 16 << 20


@step("upload", reuse=False)
def upload(settings: UploadSettings, *, model: Path, version: str) -> dict[str, Any]:
    """Upload a model folder to ``s3://bucket/prefix/<model_name>/<version>/``.

    ``manifest.json`` there lists each file with its size and sha256. It is written last and only
    if there is none yet, so a version is complete or invisible and is never overwritten; the same
    content again is no error, and files that are there already are not sent again. Raises
    `UserError` on other content under the same version, on pickles and on links out of the folder.
    """
    import boto3.s3.transfer
    import botocore.exceptions
    from nudge.components.common.progress import progress
    from nudge.components.common.storage import list_keys, s3_client, s3_errors

    files = _files(model)
    bucket = settings.bucket or os.environ.get("AWS_S3_BUCKET", "")
    if not bucket:
        raise UserError("upload.bucket is empty and AWS_S3_BUCKET is not set; give one of them")
    prefix = f"{settings.prefix.strip('/')}/{settings.model_name}/{version}"
    uri = f"s3://{bucket}/{prefix}"
    listing: dict[str, dict[str, Any]] = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in files.items()
    }
    manifest = {"format": FORMAT, "version": VERSION, "files": listing}
    size = sum(entry["bytes"] for entry in listing.values())
    client = s3_client()
    transfer = boto3.s3.transfer.TransferConfig(
        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4
    )
    with s3_errors(f"upload to {uri}"), progress("upload", total=size, unit="bytes") as bar:
        there = list_keys(client, bucket, prefix)
        for name, path in files.items():
            key, sha256 = f"{prefix}/{name}", listing[name]["sha256"]
            if there.get(key) == listing[name]["bytes"] and _sent(client, bucket, key) == sha256:
                bar.advance(listing[name]["bytes"])
                continue
            if f"{prefix}/{MANIFEST}" in there:
                raise _taken(uri)
            try:
                client.upload_file(
                    str(path),
                    bucket,
                    key,
                    ExtraArgs={"Metadata": {"sha256": sha256}, "ChecksumAlgorithm": "CRC32"},
                    Config=transfer,
                    Callback=bar.advance,
                )
            except boto3.exceptions.S3UploadFailedError as error:
                raise UserError(
                    f"upload to {uri} failed at {name}: {error}; nothing of it is visible, "
                    "run it again to go on where it stopped"
                ) from None
        body = json.dumps(manifest, indent=2, sort_keys=True).encode()
        try:
            client.put_object(Bucket=bucket, Key=f"{prefix}/{MANIFEST}", Body=body, IfNoneMatch="*")
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] != "PreconditionFailed":
                raise
            stored = client.get_object(Bucket=bucket, Key=f"{prefix}/{MANIFEST}")["Body"].read()
            if json.loads(stored) != manifest:
                raise _taken(uri) from None
    return {"uri": uri, "files": len(files), "bytes": size}


def _files(model: Path) -> dict[str, Path]:
    """The folder's files by relative name; hidden ones are left out."""
    root = model.resolve()
    if not (root / "config.json").is_file():
        raise UserError(f"{model} is no model folder: config.json is not in it")
    files = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if not path.resolve().is_relative_to(root):
            raise UserError(f"{path} is a link that leads out of the model folder")
        if path.suffix in PICKLES:
            raise UserError(f"{path} may hold a pickle, which can run code; use safetensors")
        files[name.as_posix()] = path
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


def _sent(client: Any, bucket: str, key: str) -> str:
    return str(client.head_object(Bucket=bucket, Key=key)["Metadata"].get("sha256", ""))


def _taken(uri: str) -> UserError:
    return UserError(f"{uri} holds another model already; a version is never overwritten")
