"""Serving on this machine: `transformers serve` on the CPU, a process a served model.

The server finds a model by its path, so it runs in a folder where the model's own name is that
path: requests name the registered model, as they do on a cluster (vLLM's --served-model-name).
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from nudge.components.common import processes
from nudge.components.common.errors import UserError
from nudge.components.common.publish import published, verify_file
from nudge.components.common.storage import download_folder
from nudge.components.deploy.settings import DeploySettings

KEPT_VERSIONS = 2
"""Downloaded versions kept on disk: the one that is served and the one before."""


def fetch(uri: str, home: Path, name: str, version: str) -> Path:
    """Download a version from the object store and check every file against its manifest.

    Returns the folder that holds the model under its own name. Raises `UserError` if the version is
    not complete or a file is not what was uploaded.
    """
    folder = home / "serving" / name / version
    if not folder.is_dir():
        with published(folder) as part:
            download_folder(uri, part / name)
            path = part / name / "manifest.json"
            if not path.is_file():
                raise UserError(f"{uri} is not complete: it has no manifest.json; upload it again")
            for file, entry in json.loads(path.read_text())["files"].items():
                verify_file(part / name / file, entry["sha256"])
    return folder


def serve(
    folder: Path, home: Path, name: str, version: str, settings: DeploySettings
) -> processes.Record:
    """Start a server for a fetched version beside whatever serves now; returns its record."""
    if settings.port and not processes.port_is_free(settings.port):
        raise UserError(
            f"deploy.port {settings.port} of 127.0.0.1 is taken by another program; "
            "give another one, or 0 to have a free one chosen"
        )
    port = settings.port or processes.free_port()
    program = [sys.executable, "-m", "transformers.cli.transformers", "serve", name]
    address = f"http://127.0.0.1:{port}"
    return processes.start(
        home,
        service_name(name, version),
        [*program, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        address=address,
        ready=lambda: processes.answers(f"{address}/health"),
        timeout_s=settings.start_timeout_s,
        cwd=folder,
        environment={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


def smoke_test(address: str, name: str, settings: DeploySettings) -> str:
    """Ask the server for a completion; returns it, or raises `UserError` if there is none."""
    import httpx

    body = {
        "model": name,
        "prompt": settings.smoke_prompt,
        "max_tokens": settings.smoke_tokens,
        "temperature": 0.0,
    }
    try:
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=120.0)
        answer.raise_for_status()
        text = str(answer.json()["choices"][0]["text"])
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"the smoke test of {name} at {address} failed: {error}") from None
    if not text.strip():
        raise UserError(f"the smoke test of {name} failed: an empty answer to {body['prompt']!r}")
    return text


def service_name(name: str, version: str) -> str:
    """The name of the process that serves a version."""
    return f"serving-{name}@{version}"


def stop_others(home: Path, name: str, version: str) -> None:
    """Stop the servers of a model's other versions and forget versions long gone."""
    for record in processes.records(home):
        of_model = record.name.startswith(f"serving-{name}@")
        if of_model and record.name != service_name(name, version):
            processes.stop(home, record.name)
    folders = sorted((home / "serving" / name).iterdir(), key=lambda path: path.stat().st_mtime)
    for folder in folders[:-KEPT_VERSIONS]:
        if folder.name != version:
            shutil.rmtree(folder)


def running(home: Path, name: str, version: str) -> Any:
    """The record of a version's server if it runs, else None."""
    record = processes.read_record(home, service_name(name, version))
    return record if record and record.process() else None
