"""A canary with real servers, on this machine and on KServe, and its judgement."""

import contextlib
import itertools
import json
import time
from dataclasses import replace
from typing import Any

import pytest

from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.settings import parse
from nudge.components.deploy import canary, measure
from nudge.components.deploy.canary import plan, worse
from nudge.components.deploy.local import caddy, gateway
from nudge.components.deploy.measure import Counts, Measured
from nudge.components.deploy.settings import CanaryLimits, DeploySettings
from tests.components.deploy.site import Site

BOTH = pytest.mark.parametrize("site", ["local", "kserve"], indirect=True)
MOSTLY_LOCAL = pytest.mark.parametrize(
    "site", ["local", pytest.param("kserve", marks=pytest.mark.long)], indirect=True
)
LOCAL = pytest.mark.parametrize("site", ["local"], indirect=True)


@pytest.fixture
def site_with_canary(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """v1 is served, and candidates get half of the traffic for a moment first."""
    monkeypatch.setattr(measure, "PAUSE_S", 0.05)
    monkeypatch.setattr(canary, "POLL_S", 0.05)
    site.run("v1")
    site.settings = replace(site.settings, canary=[50, 100], canary_duration_s=1.0)
    return site


@BOTH
def test_a_good_candidate_gets_all_of_the_traffic(site_with_canary: Site) -> None:
    site = site_with_canary
    site.evaluate("v2")
    result = site.deploy("v2")
    assert (result["promoted"], result["shares"]) == (True, {"v2": 100})
    (step,) = result["canary"]
    assert (step["share"], step["problems"]) == (50, [])
    for which in ("candidate", "incumbent"):
        assert step[which]["requests"] >= canary.ENOUGH
        assert step[which]["errors"] == 0
        assert step[which]["first_token_s"] > 0
    assert site.weights() == site.served().shares == {"v2": 100}
    properties = site.version("v2").properties
    assert json.loads(properties["canary"]) == result["canary"]
    assert (properties["promoted"], properties["canary_plan"] != "") == (True, True)
    site.rollback()
    assert site.weights() == {"v1": 100}


@MOSTLY_LOCAL
@pytest.mark.parametrize(
    ("version", "reason"),
    [("slow", "its first token takes"), ("flaky", "of its requests failed, 0.0% of the")],
    ids=["slow", "flaky"],
)
def test_a_candidate_that_serves_worse_loses_the_traffic(
    site_with_canary: Site, version: str, reason: str
) -> None:
    site = site_with_canary
    site.evaluate(version)
    result = site.deploy(version)
    assert (result["promoted"], result["shares"]) == (False, {"v1": 100})
    assert result["reason"].startswith("the canary went back to v1 at 50 %: ")
    assert reason in result["reason"]
    assert site.weights() == site.served().shares == {"v1": 100}
    properties = site.version(version).properties
    assert (properties["promoted"], properties["not_promoted"]) == (False, result["reason"])
    assert "it was withdrawn" in site.deploy(version)["reason"], "a retry does not start it again"
    assert site.weights() == {"v1": 100}
    site.run("v3")
    assert site.weights() == {"v3": 100}


@LOCAL
def test_a_person_ends_a_canary(site_with_canary: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_with_canary
    site.evaluate("v2")
    observe = canary._observe

    def observed(*arguments: Any) -> dict[str, Measured]:
        assert site.weights() == {"v1": 50, "v2": 50}
        site.serve(v1=100)
        return observe(*arguments)

    monkeypatch.setattr(canary, "_observe", observed)
    result = site.deploy("v2")
    assert result["promoted"] is False
    assert "the canary of v2 ended because the traffic was moved by hand" in result["reason"]
    assert site.weights() == site.served().shares == {"v1": 100}


@LOCAL
@pytest.mark.long
def test_a_killed_canary_continues_where_it_was(
    site_with_canary: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_with_canary
    site.settings = replace(site.settings, canary=[10, 50, 100], canary_duration_s=0.2)
    site.evaluate("v2")
    with monkeypatch.context() as patch:
        seen = []

        def killed(settings: Any, servers: Any, world: Any) -> Any:
            seen.append(site.weights())
            if len(seen) == 2:
                raise KeyboardInterrupt
            return dict.fromkeys(servers, Measured(requests=9))

        patch.setattr(canary, "_observe", killed)
        with pytest.raises(KeyboardInterrupt):
            site.deploy("v2")
    assert site.weights() == {"v1": 50, "v2": 50}
    site.evaluate("other")
    assert "the traffic is still split" in site.refused("other")
    result = site.deploy("v2")
    assert [step["share"] for step in result["canary"]] == [50]
    assert site.weights() == {"v2": 100}


@LOCAL
def test_the_gateway_counts_what_users_send(site: Site, home: Any) -> None:
    """Only the server and the status: neither who asked nor what."""
    import httpx

    from tests.local_registry import endpoint_headers

    site.run("v1")
    site.register("flaky", {})
    site.serve(v1=50, flaky=50)
    endpoint = site.served().endpoint
    with httpx.Client(headers=endpoint_headers(home)) as client:
        for _ in range(20):
            client.post(f"{endpoint}/v1/completions", json={"prompt": "a secret"})
    servers = gateway.routes(home)[site.model].servers
    for _ in range(50):  # Caddy writes a line when the answer has been sent
        found = {name: gateway.counts(home, site.model, server) for name, server in servers.items()}
        if sum(each.requests for each in found.values() if each) == 20:
            break
        time.sleep(0.1)
    assert found["v1"] == Counts(10, 0)
    assert found["flaky"] is not None
    assert found["flaky"].requests == 10
    assert found["flaky"].errors >= 8
    text = (home / "gateway" / site.model / caddy.REQUESTS).read_text()
    assert "secret" not in text
    assert "Authorization" not in text
    assert "remote_ip" not in text


GOOD = Measured(100, 1, 0.2, 30.0, 20, 20)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, None),
        ({"errors": 3}, None),
        ({"errors": 4}, "4.0% of its requests failed, 1.0% of the incumbent's (limit +2.0%)"),
        ({"first_token_s": 0.3}, None),
        ({"first_token_s": 0.31}, "its first token takes 0.31 s, the incumbent's 0.20 s"),
        ({"tokens_per_s": 21.1}, None),
        ({"tokens_per_s": 20.9}, "it writes 20.9 tokens/s, the incumbent 30.0 (limit -30%)"),
        ({"right": 19}, "95% of its probe answers are as evaluated, 100% of the incumbent's"),
        ({"first_token_s": None, "tokens_per_s": None, "answers": 0}, None),
        ({"requests": 0, "errors": 0}, "it finished 0 requests while the incumbent finished 100"),
        ({"requests": 5, "errors": 0}, None),
    ],
)
def test_worse_is_beyond_the_limits(change: dict[str, Any], found: str | None) -> None:
    problems = worse(replace(GOOD, **change), GOOD, CanaryLimits())
    assert len(problems) == (found is not None)
    assert found is None or problems[0].startswith(found)


def test_a_candidate_is_not_worse_if_the_incumbent_answers_as_few_requests() -> None:
    few, none = replace(GOOD, requests=1, errors=0), replace(GOOD, requests=0, errors=0)
    assert worse(none, none, CanaryLimits()) == worse(few, few, CanaryLimits()) == []


def test_an_answer_that_is_no_completion_is_an_error() -> None:
    """A candidate that answers anything else must not end its own measurement."""
    from aiohttp import web

    from nudge.components.deploy.smoke import ModelServer
    from tests.web_server import Server

    bodies = itertools.cycle(
        [
            *("null", "[]", '{"choices": ["x"]}', '{"choices": [null]}', "{}", "?"),
            *('{"choices": [{"message": null}]}', '{"choices": [{"message": "x"}]}'),
        ]
    )

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=next(bodies), content_type="application/json")

    version = Version("m", "v2", "1", "v2", "s3://b/v2", False, 0, {})
    with Server(("POST", "/v1/completions", answer)) as server:
        prompts = measure.prompts_of("Paris", [version])
        probe = measure.Probe(ModelServer(server.url), version, prompts, 1)
        for _ in range(8):
            with probe.server.client(timeout_s=5.0) as client:
                probe._ask(client, "Paris")
    assert (probe.measured().requests, probe.measured().errors) == (8, 8)


CHUNKS = """\
data: {"id":"chatcmpl-1","choices":[{"delta":{"role":"assistant"},"index":0}],"model":"m"}

data: {"id":"chatcmpl-1","choices":[{"delta":{"content":" Paris"},"index":0}],"model":"m"}

data: {"id":"chatcmpl-1","choices":[{"delta":{},"index":0,"finish_reason":"stop"}],"model":"m"}

data: [DONE]

"""
"""What `transformers serve` streams for a chat, without the fields that say when and by whom."""


class Endpoint:
    """A server that streams chats and completions, and keeps what it was asked."""

    def __init__(self) -> None:
        self.chats: list[Any] = []
        self.texts: list[Any] = []

    async def chat(self, request: Any) -> Any:
        from aiohttp import web

        self.chats.append((await request.json())["messages"])
        return web.Response(text=CHUNKS, content_type="text/event-stream")

    async def complete(self, request: Any) -> Any:
        from aiohttp import web

        self.texts.append((await request.json())["prompt"])
        return web.json_response({"choices": [{"text": " Paris"}]})


def test_each_version_is_asked_in_its_own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat model gets turns, and one that continues texts gets the prompts' text."""
    from nudge.components.deploy.smoke import ModelServer
    from tests.web_server import Server

    monkeypatch.setattr(measure, "PAUSE_S", 0.01)
    monkeypatch.setattr(canary, "POLL_S", 0.05)
    monkeypatch.setattr(canary, "PATIENCE", 200)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    sure = {"token": " Paris", "p": 0.9}
    properties: dict[str, Any] = {
        "chat-model": {
            "chat": True,
            "expected_next": [{"prompt": "Where?", "messages": turns} | sure],
        },
        "text-model": {"expected_next": [{"prompt": "It is in"} | sure]},
    }
    versions = {
        name: Version(
            "m", name, "1", "v", "s3://b/v", False, 0,
            {**each, "expected_next": json.dumps(each["expected_next"])},
        )
        for name, each in properties.items()
    }  # fmt: skip
    world = canary.World(
        live=dict, counts=lambda _: None, move=None, version=versions.__getitem__,  # type: ignore[arg-type]
        record=print, note=print,
    )  # fmt: skip
    ends = {name: Endpoint() for name in versions}
    with contextlib.ExitStack() as stack:
        servers = {
            name: ModelServer(
                stack.enter_context(
                    Server(
                        ("POST", "/v1/chat/completions", each.chat),
                        ("POST", "/v1/completions", each.complete),
                    )
                ).url
            )
            for name, each in ends.items()
        }
        settings = DeploySettings(smoke_prompt="Hello", canary_duration_s=0.3)
        found = canary._observe(settings, servers, world)
    for each in found.values():
        assert (each.errors, each.answers > 0, each.right) == (0, True, each.answers)
        assert each.requests >= canary.ENOUGH
    chat, text = ends.values()
    asked = [[{"role": "user", "content": prompt}] for prompt in ("Hello", "It is in")]
    assert chat.chats[:3] == [asked[0], turns, asked[1]]
    assert text.texts[:3] == ["Hello", "Where?", "It is in"]
    assert chat.texts == text.chats == []


def test_a_version_is_asked_with_the_turns_of_its_own_evaluation() -> None:
    from nudge.components.deploy.smoke import ModelServer

    def version(name: str, system: str, **more: Any) -> tuple[Version, list[dict[str, str]]]:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": "Where?"}]
        entry = {"prompt": "Where?", "messages": turns, "token": "In", "p": 0.9}
        values = {"expected_next": json.dumps([entry]), **more}
        return Version("m", name, "1", "v", "s3://b/v", False, 0, values), turns

    made = [version("v1", "Be brief.", chat=True), version("v2", "Be kind.", chat=True)]
    made.append(version("asked as a chat, but trained on texts", "Rhyme."))
    prompts = measure.prompts_of("Hello", [each for each, _ in made])
    hello = [{"role": "user", "content": "Hello"}]
    for each, turns in made:
        probe = measure.Probe(ModelServer("http://127.0.0.1"), each, prompts, 1)
        wanted = hello if each.properties.get("chat") else "Hello"
        assert probe._asked_as == {"Hello": wanted, "Where?": turns}


def test_a_difference_that_nobody_notices_is_not_worse() -> None:
    fast, faster = replace(GOOD, first_token_s=0.03), replace(GOOD, first_token_s=0.01)
    assert worse(fast, faster, CanaryLimits()) == []


def test_the_steps_that_are_due() -> None:
    settings = DeploySettings(canary=[5, 25, 100])
    steps = [{"v1": 95, "v2": 5}, {"v1": 75, "v2": 25}, {"v2": 100}]
    assert plan(settings, "v2", {"v1": 100}) == steps
    assert plan(settings, "v2", {"v2": 25, "v1": 75}) == steps[1:]
    assert plan(settings, "v2", {}) == plan(settings, "v2", {"v2": 100}) == steps[2:]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"canary": [5, 25]}, "expected rising shares that end with 100"),
        ({"canary": [25, 5, 100]}, "expected rising shares that end with 100"),
        (
            {"canary": [5, 25, 100], "canary_duration_s": 3000},
            "would take 6000 s and may",
        ),
        ({"canary": [5, 100], "kserve": {"stop_old_first": True}}, "needs both versions at once"),
    ],
)
def test_a_canary_that_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(DeploySettings, values, "deploy")
