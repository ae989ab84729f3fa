"""The servers of the small OpenShift: vLLM's for a version, and the router's.

`ModelServer` serves the OpenAI API as vLLM does (tokens, names, log-probabilities, metrics).
Versions named ``odd...`` answer as a different model would, ``slow...`` take longer, and
``flaky...`` fail after their first answers.
"""

import asyncio
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from nudge.components.common.local import processes
from nudge.components.deploy.kserve import objects
from nudge.components.deploy.local import caddy, gateway

TOKEN, P = " Paris", 0.8
"""The next token of the evaluated model, and its probability."""
ANSWER_S = 0.2


class ModelServer:
    """One version's server; `kill` stops it at once, with its requests in flight."""

    def __init__(self, service: dict[str, Any], token: str) -> None:
        meta = service["metadata"]
        self.version = meta["annotations"][objects.VERSION]
        self._names = _names(service["spec"]["predictor"]["model"]["args"])
        asks = meta["annotations"][objects.AUTHENTICATION] == "true"
        self._authorization = f"Bearer {token}" if asks else None
        self.chats: list[list[dict[str, str]]] = []
        """The messages of every chat that was asked."""
        self._running = 0
        self._answered = {"2xx": 0, "5xx": 0}
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )
        self._thread.start()

    def kill(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)
        self._socket.close()

    async def _health(self, _: Request) -> Response:
        return PlainTextResponse("")

    async def _metrics(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        return PlainTextResponse(
            f'vllm:num_requests_running{{engine="0"}} {self._running}.0\n'
            'vllm:num_requests_waiting{engine="0"} 0.0\n'
            + "".join(
                f'http_requests_total{{handler="/v1/completions",method="POST",status="{status}"}} '
                f"{count}.0\n"
                for status, count in self._answered.items()
            )
        )

    async def _complete(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        body = await request.json()
        if body["model"] not in self._names:
            return JSONResponse({"error": f"no model {body['model']}"}, 404)
        self._running += 1
        try:
            await asyncio.sleep(ANSWER_S + 0.5 * self.version.startswith("slow"))
        finally:
            self._running -= 1
        if self.version.startswith("flaky") and self._answered["2xx"] > 2:
            self._answered["5xx"] += 1
            return PlainTextResponse("out of memory", 500)
        self._answered["2xx"] += 1
        p = 0.1 if self.version.startswith("odd") else P + 0.02
        top = {TOKEN: math.log(p), " the": math.log(0.05)}
        choice: dict[str, Any] = {"text": f" {self.version}"}
        if "messages" in body:
            # As in OpenAI's API: https://platform.openai.com/docs/api-reference/chat/object
            assert all(each.keys() == {"role", "content"} for each in body["messages"])
            self.chats.append(body["messages"])
            last = body["messages"][-1]["content"]
            choice = {"message": {"role": "assistant", "content": f"{last}? {self.version}"}}
            if body.get("logprobs") is True and body["top_logprobs"] >= 2:
                listed = [{"token": token, "logprob": value} for token, value in top.items()]
                first = {**listed[0], "top_logprobs": listed}
                choice["logprobs"] = {"content": [first]}
        elif "logprobs" in body:
            choice["logprobs"] = {"top_logprobs": [top]}
        return JSONResponse({"choices": [choice]})

    def _refused(self, request: Request) -> Response | None:
        sent = request.headers.get("authorization")
        return None if self._authorization in (None, sent) else PlainTextResponse("no", 401)


class Router:
    """Caddy with TLS on one port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._admin = f"127.0.0.1:{processes.free_port()}"
        self.host = f"localhost:{processes.free_port()}"
        self.authority = folder / "caddy" / "pki" / "authorities" / "local" / "root.crt"
        folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
        program = shutil.which("caddy", path=os.pathsep.join(folders))
        assert program
        home = {"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
        (folder / "caddy.json").write_text(json.dumps(self._config()))
        self._process = subprocess.Popen(
            [program, "run", "--config", "caddy.json"],
            cwd=folder,
            env={**os.environ, **home},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(lambda: processes.answers(f"http://{self._admin}/config/"))
        until(self.authority.is_file)

    def send(self, weights: dict[str, int]) -> None:
        """Split requests by percent among ``host:port``s."""
        servers = {address: address for address in weights}
        gateway.switch(self._folder, gateway.Backends(0, weights, servers))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _config(self) -> dict[str, Any]:
        server = {
            "listen": [f"127.0.0.1:{self.host.rpartition(':')[2]}"],
            "automatic_https": {"disable_redirects": True},
            "routes": [{"match": [{"host": ["localhost"]}], "handle": [caddy.by_share("now")]}],
        }
        policy = {"subjects": ["localhost"], "issuers": [{"module": "internal"}]}
        return {
            "admin": {"listen": self._admin, "config": {"persist": False}},
            "apps": {
                "http": {"servers": {"router": server}},
                "tls": {"automation": {"policies": [policy]}},
                "pki": {"certificate_authorities": {"local": {"install_trust": False}}},
            },
        }


def _names(args: list[str]) -> list[str]:
    """The values of the last --served-model-name, as argparse takes them."""
    names: list[str] = []
    for arg in args[len(args) - args[::-1].index("--served-model-name") :]:
        if arg.startswith("-"):
            break
        names.append(arg)
    return names


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
