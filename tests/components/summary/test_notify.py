"""Notifications over real HTTP and SMTP: once per event, retried, and no address in any log."""

import contextlib
import json
import logging
import ssl
from collections.abc import Iterator
from dataclasses import replace
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

from nudge.components.common.clients.storage import s3_client
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.nothing_new import nothing_new
from nudge.components.common.core.settings import parse
from nudge.components.common.local import processes
from nudge.components.summary import notify as module
from nudge.components.summary import summary as summarizing
from nudge.components.summary.notify import Notice, notify
from nudge.components.summary.settings import NotifySettings
from nudge.pipelines.local import preflight
from tests.kubernetes_api import KubernetesApi
from tests.web_server import Server

SECRET = "T0P-SECRET-PATH"
NOTICE = Notice(
    "promoted", "run-1", "m", "v2", "m v2 is served", "0.1 bits per byte <better> & more",
    "https://m.example.com",
)  # fmt: skip
HTTP = ("webhook", "slack", "teams")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.01)
    for name in ("AWS_S3_BUCKET", *module.VARIABLES.values()):
        monkeypatch.delenv(name, raising=False)


class Receiver:
    """Keeps the bodies of posts; answers with the next of ``statuses``, then 200."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.statuses: list[int] = []

    async def receive(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("Idempotency-Key", ""))
        return web.Response(status=self.statuses.pop(0) if self.statuses else 200)


@pytest.fixture
def receiver(quick: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    receiver = Receiver()
    with Server(("POST", f"/{SECRET}", receiver.receive)) as server:
        for channel in HTTP:
            monkeypatch.setenv(module.VARIABLES[channel], f"{server.url}/{SECRET}")
        yield receiver


def to(*channels: Any) -> NotifySettings:
    return NotifySettings(channels=list(channels), email_to=["team@example.com"])


def test_each_service_gets_its_own_form(receiver: Receiver) -> None:
    assert notify(to(*HTTP), NOTICE) == dict.fromkeys(HTTP, "sent")
    webhook, slack, teams = receiver.bodies
    assert (webhook["event"], webhook["version"], webhook["endpoint"]) == (
        "promoted", "v2", NOTICE.endpoint,
    )  # fmt: skip
    assert slack["blocks"][1]["text"]["text"] == "0.1 bits per byte &lt;better&gt; &amp; more"
    (card,) = teams["attachments"]
    assert card["contentType"] == "application/vnd.microsoft.card.adaptive"
    assert [each["text"] for each in card["content"]["body"]] == [NOTICE.title, NOTICE.text]


def test_a_busy_service_is_asked_again_and_a_refusal_is_final(receiver: Receiver) -> None:
    receiver.statuses = [503, 429, 200]
    assert notify(to("webhook"), NOTICE) == {"webhook": "sent"}
    assert len(receiver.bodies) == 3
    assert len(set(receiver.keys)) == 1, "the receiver can tell a repetition"
    receiver.statuses = [404]
    assert notify(to("slack"), NOTICE) == {"slack": "not sent: it answered 404"}
    receiver.statuses = [500] * 9
    assert notify(to("teams"), NOTICE) == {"teams": "not sent: it answered 500"}
    assert len(receiver.bodies) == 3 + 1 + module.ATTEMPTS


def test_an_event_is_sent_once(receiver: Receiver, connected: dict[str, str], home: Path) -> None:
    assert notify(to("webhook"), NOTICE) == {"webhook": "sent"}
    assert notify(to("webhook"), NOTICE) == {"webhook": "sent before"}
    assert notify(to("webhook"), replace(NOTICE, event="failed")) == {"webhook": "sent"}
    assert notify(to("webhook"), replace(NOTICE, run_id="run-2")) == {"webhook": "sent"}
    receiver.statuses = [404]
    assert notify(to("slack"), NOTICE) == {"slack": "not sent: it answered 404"}
    assert notify(to("slack"), NOTICE) == {"slack": "sent"}, "what failed is tried again"
    listed = s3_client().list_objects_v2(Bucket=connected["AWS_S3_BUCKET"], Prefix=module.MARKERS)
    assert len(listed["Contents"]) == 4
    assert SECRET not in str(listed)


def test_only_the_wanted_events_are_sent(receiver: Receiver) -> None:
    settings = replace(to("webhook"), events=["failed"])
    assert notify(settings, NOTICE) == {}
    assert receiver.bodies == []


def test_no_address_is_in_a_log(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with caplog.at_level(logging.DEBUG):
        notify(to("webhook"), NOTICE)
        receiver.statuses = [404]
        outcomes = [notify(to("webhook"), NOTICE)]
        for address in (
            f"http://127.0.0.1:1/{SECRET}", f"nonsense://{SECRET}", SECRET,
            f"http://[::{SECRET}", f"http://user:{SECRET}@127.0.0.1:1/",
        ):  # fmt: skip
            monkeypatch.setenv(module.VARIABLES["webhook"], address)
            monkeypatch.setenv(module.VARIABLES["email"], address)
            outcomes.append(notify(to("webhook", "email"), NOTICE))
    assert all("not sent" in each for outcome in outcomes for each in outcome.values())
    written = capfd.readouterr()
    for text in (caplog.text, written.out, written.err, str(outcomes)):
        assert SECRET not in text


class Mailbox:
    """An SMTP server's handler and its authenticator."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.logins: list[tuple[str, str]] = []
        self.answers: list[str] = []

    async def handle_DATA(self, _: Any, __: Any, envelope: Any) -> str:
        if self.answers:
            return self.answers.pop(0)
        self.messages.append(message_from_bytes(envelope.content, policy=policy.default))
        return "250 OK"

    def __call__(self, _: Any, __: Any, ___: Any, mechanism: str, data: Any) -> AuthResult:
        self.logins.append((data.login.decode(), data.password.decode()))
        return AuthResult(success=data.password == SECRET.encode())


@contextlib.contextmanager
def mail_server(box: Mailbox, **options: Any) -> Iterator[int]:
    port = processes.free_port()  # aiosmtpd connects to the port that it was given
    controller = Controller(box, hostname="127.0.0.1", port=port, authenticator=box, **options)
    controller.start()

    try:
        yield port
    finally:
        controller.stop()


def test_mail_is_sent_and_a_busy_server_is_asked_again(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Mailbox()
    with mail_server(box) as port:
        monkeypatch.setenv("NUDGE_NOTIFY_SMTP", f"smtp://127.0.0.1:{port}")
        box.answers = ["451 try later"]
        settings = replace(to("email"), email_from="nudge@example.com")
        assert notify(settings, NOTICE) == {"email": "sent"}
        box.answers = ["554 no"]
        assert notify(settings, NOTICE) == {"email": "not sent: the server answered 554"}
    (message,) = box.messages
    assert message["Subject"] == "[nudge] m v2 is served"
    assert (message["From"], message["To"]) == ("nudge@example.com", "team@example.com")
    assert message.get_content().splitlines() == [NOTICE.text, "", NOTICE.endpoint]


def test_a_password_is_sent_over_tls_only(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    box = Mailbox()
    with mail_server(box, auth_require_tls=False) as port:
        monkeypatch.setenv("NUDGE_NOTIFY_SMTP", f"smtp://nudge:{SECRET}@127.0.0.1:{port}")
        (outcome,) = notify(to("email"), NOTICE).values()
        assert outcome.endswith("no encryption, so the password was not sent")
    with mail_server(box, tls_context=context) as port:
        monkeypatch.setenv("NUDGE_NOTIFY_SMTP", f"smtp://nudge:{SECRET}@127.0.0.1:{port}")
        (outcome,) = notify(to("email"), NOTICE).values()
        assert outcome == "not sent: SSLCertVerificationError", "nobody trusts this authority"
        assert box.logins == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert notify(to("email"), NOTICE) == {"email": "sent"}
    assert box.logins == [("nudge", SECRET)]
    assert len(box.messages) == 1


def test_settings_and_addresses_are_checked_before_a_run(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="email_to needs at least one address"):
        parse(NotifySettings, {"channels": ["email"]}, "notify")
    with pytest.raises(UserError, match="set NUDGE_NOTIFY_SLACK to the address"):
        preflight._check_addresses(to("slack"))
    monkeypatch.setenv("NUDGE_NOTIFY_SLACK", "https://hooks.slack.com/x")
    preflight._check_addresses(to("slack"))


FOUND = {
    "uri": "s3://b/v2", "description": "m v2: 0.1 bits per byte better", "endpoint": "",
    "not_promoted": "", "awaiting": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("events", "found", "event", "text"),
    [
        (("train", "CUDA out of memory", ""), None, "failed", "CUDA out of memory"),
        (("train", "over budget: the run has used 3 GPU hours", ""), None, "over budget",
         "the run has used 3 GPU hours"),
        (("", "", "not better"), None, "refused", "not better"),
        (("", "", nothing_new({})), None, "", ""),
        (("", "", nothing_new({"account": "kept 6", "dropped": {"not_utf8": 3}})), None, "", ""),
        (("", "", ""), {"endpoint": "http://e"}, "promoted", "0.1 bits per byte better"),
        (("", "", ""), {"not_promoted": "v3 has the traffic now"}, "refused", "v3 has the traffic"),
        (("", "", ""), {"not_promoted": "awaiting approval; run", "awaiting": True},
         "awaiting approval", "awaiting approval; run"),
    ],
)  # fmt: skip
def test_the_summary_tells_what_happened(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Any,
    found: dict[str, Any] | None, event: str, text: str,
) -> None:  # fmt: skip
    record = None if found is None else {**FOUND, **found}
    monkeypatch.setattr(summarizing, "_local_events", lambda: events)
    monkeypatch.setattr(
        "nudge.components.common.clients.registry.connection.with_registry", lambda *_, **__: record
    )
    # The engine names its exit handler, however the run ended.
    result = summarizing.summary(
        "m", "http://r", version="v2", run_id="run-1", state="FAILED" if events[0] else "SUCCEEDED",
        task="exit-handler-1", error="", page=tmp_path / "page.md", notifications=to("webhook"),
    )  # fmt: skip
    if not event:
        assert receiver.bodies == []
        assert "notified" not in result
        return
    assert result["notified"] == {"webhook": "sent"}
    (body,) = receiver.bodies
    assert body["event"] == event
    assert text in body["text"]


def test_on_a_cluster_the_reason_is_in_the_logs_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KubernetesApi(role="nudge-runner") as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))

        def pod(step: str, attempt: int, phase: str, *lines: str) -> None:
            name = f"wf-{step}-{attempt}"
            node = f"wf.root.condition-new-text-1.{step}.executor({attempt})"
            body = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "labels": {"pipeline/runid": "run-1"},
                    "annotations": {"workflows.argoproj.io/node-name": node},
                },
                "spec": {"containers": [{"name": "main"}]},
            }
            api.add(body, phase=phase)
            api.write_log(name, "main", *lines)

        pod("ingest", 0, "Succeeded", "read", 'ingest: results {"new": 1}')
        verdict = {"promote": 0, "reason": "0.01 bits per byte worse"}
        pod("evaluate", 0, "Succeeded", f"evaluate: results {json.dumps(verdict)}", "done")
        results, *failure = summarizing._cluster_logs("run-1")
        assert failure == ["", ""]
        assert summarizing._verdict(results) == "0.01 bits per byte worse"
        pod("train", 0, "Failed", "step 10", "error: the loss is not finite")
        _, *failure = summarizing._cluster_logs("run-1")
        assert failure == ["train", "step 10\nerror: the loss is not finite"]
        assert summarizing._cluster_logs("another") == ({}, "", "")
        api.forbid("list", "pods")
        assert summarizing._cluster_logs("run-1") == ({}, "", "")
