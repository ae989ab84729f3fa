"""Serving on the machine that this container runs on, through what `nudge run` opens there.

What a container starts ends with it, so each method is a request. The lock of a shift is a request
too, which lasts as long as the lock is held: it ends with its holder, however that ends.
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
"""The variables that say where the host's server is, and what it asks for."""


class HostServing:
    """A `Target`: the `LocalServing` of the host, at ``url``."""

    environment = "local"
    runtime = "transformers"

    def __init__(self, url: str, token: str, settings: DeploySettings) -> None:
        import httpx

        self._settings = asdict(settings)
        # A download and a model's load take as long as they take; the host has limits of its own.
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(None, connect=10.0),
        )

    @contextlib.contextmanager
    def exclusive(self, model: str) -> Iterator[None]:
        """Wait until no other shift of this model is under way on the host."""
        with self._asked("exclusive", model=model) as answer:
            body = answer.iter_bytes()  # kept: the connection would end with it
            next(body)  # the first byte comes when the lock is held
            yield

    def live(self, model: str) -> dict[str, int]:
        """The percent of requests that the host's gateway sends to each version."""
        return dict(self._ask("live", model=model))

    def make_room(self, model: str, wanted: set[str]) -> bool:
        """Nothing, as on the host itself."""
        return False

    def bring_up(self, version: Version) -> ModelServer:
        """Have the host download, check and start a version."""
        started = self._ask("bring_up", version=asdict(version))
        return ModelServer(started["address"], started["token"])

    def move(self, model: str, shares: dict[str, int]) -> str:
        """Route the model's address on the host to its versions' servers."""
        return str(self._ask("move", model=model, shares=shares))

    def retire(self, model: str, keep: set[str]) -> None:
        """Have the host stop the servers of other versions."""
        self._ask("retire", model=model, keep=sorted(keep))

    def counts(self, model: str, version: str) -> Counts | None:
        """What the host's gateway counted."""
        counted = self._ask("counts", model=model, version=version)
        return Counts(**counted) if counted else None

    def _ask(self, what: str, **values: Any) -> Any:
        with self._asked(what, **values) as answer:
            answer.read()
            return answer.json()

    @contextlib.contextmanager
    def _asked(self, what: str, **values: Any) -> Iterator[Any]:
        """The answer to a request; raises `UserError` with what the host says is wrong."""
        import httpx

        body = {**values, "settings": self._settings}
        try:
            with self._client.stream("POST", f"/{what}", json=body) as answer:
                if answer.is_error:
                    answer.read()
                    raise UserError(_problem(answer))
                yield answer
        except httpx.TransportError as error:
            raise UserError(
                f"the serving of this container's host at {self._client.base_url} does not "
                f"answer ({error}); `nudge run` starts it: run this again"
            ) from None


def _problem(answer: Any) -> str:
    if answer.status_code == 409:
        return str(answer.json()["detail"])
    return f"the serving of this container's host answered {answer.status_code}: {answer.text}"
