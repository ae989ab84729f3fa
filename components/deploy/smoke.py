"""The smoke test: does a served version answer, and does it answer as the evaluated model did?"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.clients.tls import tls_context
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.settings import DeploySettings

SURE = 0.5
"""The served model must answer with a next token that the evaluation found likelier than this."""
PART = "\ufffd"
"""How a token is written that ends in the middle of a character's bytes."""
TOP = 5
"""Number of likeliest tokens to request; vLLM returns up to 20, the OpenAI API up to 5."""
FALLBACK_PROMPT = "Once upon a time"
TIMEOUT_S = 120.0
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""Greedy decoding for `transformers serve`: every value of the base's that would change it."""

NEUTRAL: list[dict[str, Any]] = [
    {"repetition_penalty": 1.0},  # vLLM
    {"generation_config": json.dumps(GREEDY)},  # transformers serve
    {"frequency_penalty": 0.0},  # any other server of the OpenAI API
]
"""Fields of a request that ask for plain greedy decoding, by server; each refuses the others'."""


Asked = str | list[dict[str, str]]
"""A text to continue, or the turns of a chat that the model must answer."""


@dataclass(frozen=True)
class SmokeAnswer:
    """What a version answered to the smoke prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class ModelServer:
    """Where a version answers, and the token that it asks for (none on this machine).

    ``router_delay_s`` is how long a server may be unreachable after it is ready: a cluster's router
    takes some seconds to learn of it.
    """

    address: str
    token: str = field(default="", repr=False)
    router_delay_s: float = 0

    def client(self, timeout_s: float = TIMEOUT_S) -> Any:
        """An httpx client for this server; it checks the certificate (see `tls_context`)."""
        import httpx

        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        verify = tls_context() if self.address.startswith("https:") else True
        return httpx.Client(
            base_url=self.address, headers=headers, timeout=timeout_s, verify=verify
        )


def smoke_test(server: ModelServer, version: Version, settings: DeploySettings) -> SmokeAnswer:
    """Ask the server for completions; returns the answer to the smoke prompt.

    A model that was trained on conversations is asked through ``/v1/chat/completions``, so that the
    server renders the prompt with the template that it was given.

    Registration recorded the likeliest next token of each probe. Comparing them with the served
    model detects one that is not the evaluated one: by the tokens' probabilities if the server
    reports them (vLLM), otherwise by the token itself wherever the evaluation was sure of it.
    Raises `UserError`, which names the prompt and the answer.
    """
    prompt = smoke_prompt(settings, version)
    with server.client() as client:
        _wait(client, server)
        asked = in_form_of(version, prompt)
        answer = _complete(client, version.model, asked, settings.smoke_tokens)["text"]
        if not answer.strip():
            raise UserError(
                f"the smoke test of {version.model} failed: an empty answer to {prompt!r}"
            )
        for expected in expected_next(version):
            _compare(client, version, expected, settings.smoke_tolerance)
    return SmokeAnswer(prompt, str(answer))


def smoke_prompt(settings: DeploySettings, version: Version) -> str:
    """The prompt of the settings, or one to which the version is known to have an answer."""
    evaluated = [str(each["prompt"]) for each in expected_next(version)]
    return settings.smoke_prompt or next(iter(evaluated), FALLBACK_PROMPT)


def expected_next(version: Version) -> list[dict[str, Any]]:
    """What the evaluated model answers: ``prompt``, perhaps ``messages``, ``token`` and ``p``."""
    return list(json.loads(str(version.properties.get("expected_next", "[]"))))


def in_form_of(version: Version, prompt: str) -> Asked:
    """A prompt as users of a version ask it: a user turn if it was trained on conversations."""
    return [{"role": "user", "content": prompt}] if version.properties.get("chat") else prompt


def request(model: str, asked: Asked, tokens: int) -> tuple[str, dict[str, Any]]:
    """The path and the body of a request for a greedy answer of at most ``tokens`` tokens."""
    body = {"model": model, "max_tokens": tokens, "temperature": 0.0, "n": 1}
    if isinstance(asked, str):
        return "/v1/completions", {**body, "prompt": asked}
    return "/v1/chat/completions", {**body, "messages": asked}


def _wait(client: Any, server: ModelServer) -> None:
    """Wait until anything behind the router answers, whatever its status."""
    import httpx
    import tenacity

    def reached() -> bool:
        try:
            return client.get("/health").status_code not in (502, 503, 504)
        except httpx.TransportError:
            return False

    tenacity.Retrying(
        stop=tenacity.stop_after_delay(server.router_delay_s),
        wait=tenacity.wait_fixed(1.0),
        retry=tenacity.retry_if_result(lambda ok: not ok),
        # If nothing answers, the first completion reports it.
        retry_error_callback=lambda _: None,
    )(reached)


def _compare(client: Any, version: Version, expected: dict[str, Any], tolerance: float) -> None:
    """Raise unless the served model predicts a probe's next token as the evaluated one did."""
    token, p = _named(expected["token"]), expected["p"]
    asked = expected.get("messages") or expected["prompt"]
    choice = _complete(client, version.model, asked, 1, probabilities=True)
    likeliest = _likeliest(choice)
    if likeliest is None:
        got = choice["text"]
        ok, answer = p <= SURE or _named(got).strip() == token.strip(), repr(got)
    else:
        # An unlisted token is no likelier than the last listed one.
        served = likeliest.get(token, 0.0)
        last = 0.0 if token in likeliest else min(likeliest.values())
        ok = served - tolerance <= p <= max(served, last) + tolerance
        answer = ", ".join(
            f"{name!r} (P {value:.2f})" for name, value in reversed(likeliest.items())
        )
    if not ok:
        raise UserError(
            f"the smoke test of {version.model} {version.name} failed: after "
            f"{expected['prompt']!r} the evaluated model says {token!r} (P {p:.2f}), the served "
            f"one {answer}; the served model is not the evaluated one"
        )


def _likeliest(choice: dict[str, Any]) -> dict[str, float] | None:
    """The likeliest first tokens with their probabilities, or None if the server reports none."""
    reported = choice.get("logprobs") or {}
    if first := (reported.get("content") or [None])[0]:  # of a chat completion
        listed = [(each["token"], each["logprob"]) for each in first["top_logprobs"]]
    else:
        listed = list(((reported.get("top_logprobs") or [None])[0] or {}).items())
    # Of several tokens with one name, the likeliest counts.
    ordered = sorted(listed, key=lambda each: each[1])
    return {_named(token): math.exp(value) for token, value in ordered} or None


def _named(token: str) -> str:
    """A token's text, or `PART`, which vLLM writes as an empty text."""
    return token if token and not token.endswith(PART) else PART


def _complete(
    client: Any,
    model: str,
    asked: Asked,
    tokens: int,
    probabilities: bool = False,
) -> dict[str, Any]:
    """The first choice of a greedy completion of a text, or of the answer to chat messages; its
    ``text``, and ``logprobs`` if the server knows them.

    A server takes what a request leaves open from the base's generation configuration, and a
    penalty for repetition changes even the likeliest token: the evaluation had none.
    """
    import httpx

    chat = not isinstance(asked, str)
    path, body = request(model, asked, tokens)
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP} if chat else {"logprobs": TOP}
    vllm, *others = NEUTRAL
    try:
        for fields in ({**vllm, **(wanted if probabilities else {})}, *others):
            answer = client.post(path, json={**body, **fields})
            if answer.status_code not in (400, 422):  # these refuse an unknown field
                break
        answer.raise_for_status()
        choice = dict(answer.json()["choices"][0])
        if chat:
            choice["text"] = choice["message"]["content"] or ""
        return choice
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"the smoke test of {model} at {client.base_url} failed: {error}") from None
