"""Caddy's configuration for a model's address (https://caddyserver.com/docs/json/)."""

import json
import time
from typing import Any

from nudge.components.common.local import guard

ADMIN = "admin.sock"
REQUESTS = "requests.log"
SLOTS = 100
LOGGED = {
    "handler": "log_append",
    "key": "server",
    "value": "{http.reverse_proxy.upstream.hostport}",
}
"""Caddy's handler that adds to the log which server a request went to."""


def configuration(port: int, model: str, token: str) -> dict[str, Any]:
    """The configuration of a model's Caddy, whose routes are read from the folder ``now``."""
    return {
        # Relative to the folder that Caddy runs in, since a socket's path is short.
        "admin": {"listen": f"unix/{ADMIN}|0600", "config": {"persist": False}},
        "logging": {
            "logs": {
                "default": {"exclude": ["http.log.access"]},
                "requests": {
                    "include": ["http.log.access"],
                    "writer": {
                        "output": "file",
                        "filename": REQUESTS,
                        "roll_size_mb": 20,
                        "roll_keep": 1,
                    },
                    # Log only which server answered and its status, not who asked or what.
                    "encoder": {
                        "format": "filter",
                        "wrap": {"format": "json"},
                        "fields": {
                            name: {"filter": "delete"}
                            for name in ("request", "resp_headers", "user_id")
                        },
                    },
                },
            }
        },
        "apps": {
            "http": {
                "servers": {
                    "model": {
                        "logs": {},
                        "listen": [f"127.0.0.1:{port}"],
                        "automatic_https": {"disable": True},
                        "protocols": ["h1"],
                        "routes": [
                            *_refusals(token),
                            *_listed(model),
                            {"handle": [LOGGED, by_share("now")]},
                        ],
                    }
                }
            }
        },
    }


def _refusals(token: str) -> list[dict[str, Any]]:
    """Caddy's routes that refuse what `guard.Guard` refuses."""
    health = {"path": list(guard.OPEN), "method": ["GET", "HEAD"]}
    allowed = {"header": {"Authorization": [f"Bearer {token}"]}}
    content = [{"header": {"Content-Type": [kind, f"{kind};*"]}} for kind in guard.JSON]
    cases = [
        (421, "this server answers to 127.0.0.1 and localhost only",
         {"not": [{"host": [name.strip("[]") for name in guard.HOSTS]}]}),
        (401, "the bearer token is missing or wrong", {"not": [health, allowed]}),
        (415, "send application/json", {"method": list(guard.WRITES), "not": content}),
    ]  # fmt: skip
    return [
        {
            "match": [match],
            "handle": [
                {
                    "handler": "static_response",
                    "status_code": status,
                    "headers": {"Content-Type": ["application/json"]},
                    "body": json.dumps({"error": {"message": why, "code": status}}),
                }
            ],
            "terminal": True,
        }
        for status, why, match in cases
    ]


def _listed(model: str) -> list[dict[str, Any]]:
    """Caddy's routes that list the one model behind it, as OpenAI's API does.

    Clients ask that first; `transformers serve` would list the hub's cache of this machine, and
    fails where there is none.
    """
    entry = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "nudge"}
    answers = {
        "/v1/models": {"object": "list", "data": [entry]},
        f"/v1/models/{model}": entry,
    }
    return [
        {
            "match": [{"path": [path], "method": ["GET", "HEAD"]}],
            "handle": [
                {
                    "handler": "static_response",
                    "headers": {"Content-Type": ["application/json"]},
                    "body": json.dumps(body),
                }
            ],
        }
        for path, body in answers.items()
    ]


def by_share(folder: str) -> dict[str, Any]:
    """Caddy's handler that reads where a request goes from the slots in a folder."""
    return {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": f"{{file.{folder}/{slot}}}"} for slot in range(SLOTS)],
        "load_balancing": {"selection_policy": {"policy": "round_robin"}},
        "headers": {
            "response": {"set": {"X-Served-By": ["{http.reverse_proxy.upstream.hostport}"]}}
        },
        "flush_interval": -1,  # tokens are streamed as they come
    }
