"""``python -m nudge.pipelines.local.host_serving --home FOLDER --port PORT``.

Lets steps in containers use the serving of this machine. Each request calls one method of
`nudge.components.deploy.local.local_serving.LocalServing`; the client is
`nudge.components.deploy.local.host_serving`.
"""

import os
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import anyio
import click
import uvicorn
from fastapi import Body, FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.local.guard import Guard
from nudge.components.deploy.local.host_serving import TOKEN
from nudge.components.deploy.local.local_serving import LocalServing
from nudge.components.deploy.settings import DeploySettings

Model = Annotated[str, Body()]


class LockResponse(Response):
    """A response whose first byte means that the lock is acquired; it is released when the client
    disconnects."""

    def __init__(self, lock: AbstractContextManager[None]) -> None:
        super().__init__(media_type="text/plain")
        self._lock = lock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Never cancel a thread that waits for the lock: it would acquire it for nobody.
        await anyio.to_thread.run_sync(self._lock.__enter__)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b".", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            self._lock.__exit__(None, None, None)


def create_app(home: Path, token: str) -> Guard:
    """The application, behind a `Guard` that requires the token."""

    def exclusive(model: Model, settings: DeploySettings) -> LockResponse:
        return LockResponse(LocalServing(home, settings).exclusive(model))

    def live(model: Model, settings: DeploySettings) -> dict[str, int]:
        return LocalServing(home, settings).live(model)

    def bring_up(version: Version, settings: DeploySettings) -> dict[str, str]:
        server = LocalServing(home, settings).bring_up(version)
        return {"address": server.address, "token": server.token}

    def move(model: Model, shares: dict[str, int], settings: DeploySettings) -> str:
        return LocalServing(home, settings).move(model, shares)

    def retire(model: Model, keep: list[str], settings: DeploySettings) -> None:
        LocalServing(home, settings).retire(model, set(keep))

    def counts(
        model: Model, version: Annotated[str, Body()], settings: DeploySettings
    ) -> dict[str, int] | None:
        counted = LocalServing(home, settings).counts(model, version)
        return asdict(counted) if counted else None

    app = FastAPI(title="nudge serving", openapi_url=None)
    app.add_api_route("/health", lambda: {"status": "ok"})
    for handler in (exclusive, live, bring_up, move, retire, counts):
        app.add_api_route(
            f"/{handler.__name__}",
            handler,
            methods=["POST"],
            response_model=None,
        )
    app.add_exception_handler(
        UserError, lambda _, error: JSONResponse({"detail": str(error)}, status_code=409)
    )
    return Guard(app, token)


@click.command()
@click.option("--home", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--port", type=int, required=True)
def main(home: Path, port: int) -> None:
    """Serve requests that carry the token, for the models below a NUDGE_HOME."""
    app = create_app(home, os.environ[TOKEN])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
