"""Serving on this machine: `transformers serve` on the CPU, one process per version.

A gateway gives each model one address. The server finds a model by its path, so it runs in a folder
where the model's own name is that path: requests name the registered model, as they do on a cluster
(vLLM's --served-model-name).
"""

import contextlib
import shutil
import sys
from pathlib import Path

from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.names import check_name
from nudge.components.common.core.publish import published
from nudge.components.common.core.say import say
from nudge.components.common.local import guard, processes
from nudge.components.common.local.child_environment import MODEL_CHILD
from nudge.components.common.models.registered import download_model
from nudge.components.deploy.local import gateway
from nudge.components.deploy.measure import Counts
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer
from nudge.components.deploy.verify import check_folder, check_version

KEPT_VERSIONS = 3
"""Downloaded versions kept on disk, newest first: the way back needs no download."""


class LocalServing:
    """A `Target` below ``home``: one server per version, and one address per model."""

    environment = "local"
    runtime = "transformers"

    def __init__(self, home: Path, settings: DeploySettings) -> None:
        self._home, self._settings = home, settings

    def exclusive(self, model: str) -> contextlib.AbstractContextManager[None]:
        """Wait until no other shift of this model is under way."""
        check_name("the model", model)
        return processes.locked(self._home, f"shift-{model}")

    def live(self, model: str) -> dict[str, int]:
        """The percent of requests that the gateway sends to each version."""
        route = gateway.routes(self._home).get(model)
        return dict(route.shares) if route else {}

    def make_room(self, model: str, wanted: set[str]) -> bool:
        """Nothing: two small models run beside one another here."""
        return False

    def bring_up(self, version: Version) -> ModelServer:
        """Download and check a version, and start its server unless it runs."""
        check_version(version, self._settings)
        folder = self._fetch(version)
        record = self._running(version.model, version.name)
        if record is None:
            record = self._serve(folder, version.model, version.name)
        else:
            health = f"{record.address}/health"
            timeout_s = self._settings.start_timeout_s
            processes.wait_for(record, lambda: processes.answers(health), timeout_s)
        return ModelServer(record.address, guard.read_token(self._home, gateway.TOKEN))

    def move(self, model: str, shares: dict[str, int]) -> str:
        """Route the model's address to its versions' servers."""
        servers = {}
        for version in shares:
            record = self._running(model, version)
            if record is None:
                raise UserError(f"the server of {model} {version} has ended; run this again")
            servers[version] = record.address.removeprefix("http://")
        return gateway.route(self._home, model, servers, shares, self._settings.port)

    def retire(self, model: str, keep: set[str]) -> None:
        """Stop the servers of other versions, and forget versions long gone."""
        kept = {service_name(model, version) for version in keep}
        for record in processes.records(self._home):
            if record.name.startswith(f"serving-{model}@") and record.name not in kept:
                if not gateway.drained(self._home, model, record.address.removeprefix("http://")):
                    continue  # the next shift takes it
                processes.stop(self._home, record.name)
        paths = list((self._home / "serving" / model).glob("*"))
        for path in paths:
            if path.name.startswith("."):  # of a download that was killed: no other is under way
                shutil.rmtree(path)
        folders = [path for path in paths if path.is_dir() and path.name[0] != "."]
        newest = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
        for path in newest[KEPT_VERSIONS:]:
            if path.name not in keep:
                shutil.rmtree(path)

    def counts(self, model: str, version: str) -> Counts | None:
        """The requests to a version in the gateway's log; None if the version does not run."""
        record = self._running(model, version)
        if record is None:
            return None
        return gateway.counts(self._home, model, record.address.removeprefix("http://"))

    def _fetch(self, version: Version) -> Path:
        """The folder that holds the model under its own name, each file as it was uploaded."""
        folder = self._home / "serving" / version.model / version.name
        if not folder.is_dir():
            with published(folder) as part:
                model = part / version.model
                download_model(version.uri, model)
                check_folder(model, version)
        elif self._running(version.model, version.name) is None:
            try:
                check_folder(folder / version.model, version)
            except UserError as error:  # damaged here; the store has the version
                say(f"{error}; downloading it anew")
                shutil.rmtree(folder)
                return self._fetch(version)
        folder.touch()
        return folder

    def _serve(self, folder: Path, model: str, version: str) -> processes.ServiceRecord:
        port = processes.free_port()
        program = [sys.executable, "-P", "-m", "nudge.components.deploy.local.model_server", model]
        token = guard.token_file(self._home, gateway.TOKEN)
        address = f"http://127.0.0.1:{port}"
        return processes.start(
            self._home,
            service_name(model, version),
            [*program, "--port", str(port), "--token-file", str(token)],
            address=address,
            ready=lambda: processes.answers(f"{address}/health"),
            timeout_s=self._settings.start_timeout_s,
            cwd=folder,
            environment={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            passes=MODEL_CHILD,
        )

    def _running(self, model: str, version: str) -> processes.ServiceRecord | None:
        record = processes.read_record(self._home, service_name(model, version))
        return record if record and record.process() else None


def service_name(model: str, version: str) -> str:
    """The name of the process that serves a version, which is a file's name as well."""
    check_name("the model", model)
    check_name("the version", version)
    return f"serving-{model}@{version}"
