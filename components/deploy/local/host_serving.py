"""Serving on the host of this container, through the server that `nudge run` starts there.

A process that a container starts ends with the container, so each method is a request to the host.
The lock of a traffic shift is a request too: it is released when the connection ends, even if the
client is killed.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.measure import Counts
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer

URL, TOKEN = "NUDGE_HOST_SERVING_URL", "NUDGE_HOST_SERVING_TOKEN"
"""The variables with the URL and the token of the host's server."""


class HostServing:
    """A `Target`: the `LocalServing` of the host, at ``url``."""

    environment = "local"
    runtime = "transformers"

    def __init__(self, url: str, token: str, settings: DeploySettings) -> None:
        import httpx

        self._settings = asdict(settings)
        # No read timeout: a download or a model's load may be slow, and the host has limits itself.
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(None, connect=10.0),
        )

    @contextlib.contextmanager
    def exclusive(self, model: str) -> Iterator[None]:
        """Wait until no other shift of this model is running on the host."""
        with self._request("exclusive", model=model) as answer:
            body = answer.iter_bytes()  # keep a reference: garbage collection would close it
            next(body)  # the first byte arrives once the lock is acquired
            yield

    def live(self, model: str) -> dict[str, int]:
        """The percent of requests that the host's gateway sends to each version."""
        return dict(self._call("live", model=model))

    def make_room(self, model: str, wanted: set[str]) -> bool:
        """Do nothing, as `LocalServing` does."""
        return False

    def bring_up(self, version: Version) -> ModelServer:
        """Have the host download, check and start a version."""
        started = self._call("bring_up", version=asdict(version))
        return ModelServer(started["address"], started["token"])

    def move(self, model: str, shares: dict[str, int]) -> str:
        """Route the model's address on the host to its versions' servers."""
        return str(self._call("move", model=model, shares=shares))

    def retire(self, model: str, keep: set[str]) -> None:
        """Have the host stop the servers of other versions."""
        self._call("retire", model=model, keep=sorted(keep))

    def counts(self, model: str, version: str) -> Counts | None:
        """What the host's gateway counted."""
        counted = self._call("counts", model=model, version=version)
        return Counts(**counted) if counted else None

    def _call(self, method: str, **values: Any) -> Any:
        with self._request(method, **values) as answer:
            answer.read()
            return answer.json()

    @contextlib.contextmanager
    def _request(self, method: str, **values: Any) -> Iterator[Any]:
        """The response to a request; raises `UserError` with the host's message if it failed."""
        import httpx

        body = {**values, "settings": self._settings}
        try:
            with self._client.stream("POST", f"/{method}", json=body) as answer:
                if answer.is_error:
                    answer.read()
                    raise UserError(_problem(answer))
                yield answer
        except httpx.TransportError as error:
            raise UserError(
                f"the serving on this container's host, {self._client.base_url}, does not answer "
                f"({error}); `nudge run` starts it, so run that again"
            ) from None


def _problem(answer: Any) -> str:
    if answer.status_code == 409:
        return str(answer.json()["detail"])
    return f"the serving on this container's host answered {answer.status_code}: {answer.text}"
