"""`nudge ask` and `nudge chat`: the served model by OpenAI's API, and versions from their files."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result

from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli.main import main
from nudge.pipelines.local.talking import Loaded, Served
from tests.pipelines.finished_run import finished_run

QUESTION = [{"role": "user", "content": "Where is it?"}]


def nudge(*arguments: object, status: int = 0, text: str = "") -> Result:
    command = [str(each) for each in arguments]
    done = CliRunner().invoke(main, command, input=text, catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done


class Endpoint(BaseHTTPRequestHandler):
    """Streams as `transformers serve` and vLLM do: one ``data:`` line per chunk, then [DONE]."""

    chats = True
    asked: ClassVar[list[tuple[str, dict[str, Any], str]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append((self.path, body, self.headers["authorization"]))
        is_chat = self.path == "/v1/chat/completions"
        if is_chat and not self.chats:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "the tokenizer has no chat template"}}')
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for word in ("In", " Paris"):
            choice = {"delta": {"content": word}} if is_chat else {"text": word}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.write(b'data: {"choices": []}\n\ndata: [DONE]\n\n')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Endpoint.asked.clear()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_an_answer_comes_in_pieces_with_the_token(endpoint: str) -> None:
    served = Served("m", endpoint, "secret")
    assert list(served.answer(QUESTION, 9, complete=False)) == ["In", " Paris"]
    (path, body, token) = Endpoint.asked[0]
    assert (path, body["messages"], body["max_tokens"]) == ("/v1/chat/completions", QUESTION, 9)
    assert token == "Bearer secret"


def test_a_model_without_a_chat_template_completes(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "chats", False)
    served = Served("m", endpoint, "")
    for _ in range(2):
        assert list(served.answer(QUESTION, 9, complete=False)) == ["In", " Paris"]
    assert [path for path, *_ in Endpoint.asked] == [
        *("/v1/chat/completions", "/v1/completions", "/v1/completions"),
    ]
    assert Endpoint.asked[1][1]["prompt"] == "Where is it?"


def test_an_endpoint_that_is_down_is_a_sentence(endpoint: str) -> None:
    with pytest.raises(UserError, match="does not answer .*`nudge services up`"):
        list(Served("m", "http://127.0.0.1:9", "").answer(QUESTION, 9, complete=False))


@pytest.fixture
def runs(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two runs with the tiny model, neither of them promoted."""
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "home"))
    found = []
    for bits in (1.4, 1.5):
        run = finished_run(tmp_path / "home", bits, promoted=False)
        shutil.copytree(tiny_model, run.folder / "artifacts/train/model", dirs_exist_ok=True)
        found.append(run.run_id)
    return found


def test_runs_that_were_refused_can_be_asked_too(runs: list[str]) -> None:
    first, second = runs
    asked = ("ask", "-v", first[-4:], "-v", second, "--max-tokens", 4, "The Eiffel")
    answers = json.loads(nudge(*asked, "--json").stdout)["answers"]
    assert set(answers) == {first, second}
    assert answers[first] == answers[second]  # the same weights
    assert f"{first}:" in nudge(*asked, "--complete").stdout
    too_many = ("chat", first, second, first)
    assert "name one, or two" in nudge(*too_many, status=2).stderr


def test_chat_shows_two_side_by_side_and_ends_with_an_empty_line(runs: list[str]) -> None:
    said = nudge("chat", *runs, "--max-tokens", 3, text="The tower\n/new\nThe bridge\n\n").stdout
    lines = [line for line in said.splitlines() if line.startswith("╭")]
    assert len(lines) == 2
    assert all(line.count("╭") == 2 for line in lines)


def test_a_folder_that_is_no_model_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a usable model"):
        Loaded("x", tmp_path).load()


def test_nothing_served_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUDGE_REGISTRY_URL", raising=False)
    assert "nothing was run in this folder" in nudge("ask", "hello", status=2).stderr
