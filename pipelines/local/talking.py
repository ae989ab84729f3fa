"""Talk to a model: the served one at its endpoint, or any version or run from its own files."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.local import guard, processes
from nudge.components.deploy.local import gateway

Message = dict[str, str]

ANSWER_TIMEOUT_S = 600.0


@dataclass
class Served:
    """The model at an endpoint that speaks OpenAI's API."""

    name: str
    endpoint: str
    token: str
    chats: bool = True
    """Whether it takes messages; found out at the first answer."""

    def answer(self, messages: list[Message], max_tokens: int, complete: bool) -> Iterator[str]:
        """The answer in pieces as they come; raises `UserError` if the endpoint fails."""
        if not complete and self.chats:
            with contextlib.suppress(_NoChat):
                yield from self._stream(
                    "chat/completions", {"messages": messages, "max_tokens": max_tokens}
                )
                return
            self.chats = False
        prompt = messages[-1]["content"]
        yield from self._stream("completions", {"prompt": prompt, "max_tokens": max_tokens})

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        import httpx

        url = f"{self.endpoint}/v1/{path}"
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        body = {"model": self.name, "stream": True, "temperature": 0, **body}
        own = guard.is_here(self.endpoint)
        try:
            with (
                httpx.Client(trust_env=not own, timeout=ANSWER_TIMEOUT_S) as client,
                client.stream("POST", url, json=body, headers=headers) as answer,
            ):
                if answer.status_code != 200:
                    text = answer.read().decode("utf-8", "replace")[:300]
                    if path.startswith("chat") and answer.status_code in (400, 404, 422, 500, 501):
                        raise _NoChat(text)
                    raise UserError(f"{url} answers {answer.status_code}: {text}")
                for line in answer.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if data and data != "[DONE]" and data.startswith("{"):
                        yield from _pieces(json.loads(data))
        except httpx.HTTPError as error:
            raise UserError(
                f"{self.endpoint} does not answer ({error or type(error).__name__}); "
                "`nudge services up` serves this machine's models"
            ) from None


class _NoChat(Exception):
    """The endpoint takes no messages, because the model has no chat template."""


def _pieces(chunk: dict[str, Any]) -> Iterator[str]:
    for choice in chunk.get("choices") or ():
        if text := (choice.get("delta") or {}).get("content") or choice.get("text"):
            yield text


@dataclass
class Loaded:
    """A model in this process, from its folder."""

    name: str
    folder: Path
    _model: Any = field(default=None, repr=False)
    _tokenizer: Any = field(default=None, repr=False)

    def load(self) -> None:
        """Read the weights; raises `UserError` if the folder is no model."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self._model is not None:
            return
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name}: {self.folder} is not a usable model: {error}") from None
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def answer(self, messages: list[Message], max_tokens: int, complete: bool) -> Iterator[str]:
        """The answer in pieces as they come, greedy as at the endpoint."""
        import threading

        import torch
        from transformers import TextIteratorStreamer

        self.load()
        if complete or not self._tokenizer.chat_template:
            inputs = self._tokenizer(messages[-1]["content"], return_tensors="pt")
        else:
            inputs = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        inputs = inputs.to(self._model.device)
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {
            **{key: inputs[key] for key in ("input_ids", "attention_mask")},
            "max_new_tokens": max_tokens,
            "do_sample": False,
            "streamer": streamer,
            "pad_token_id": self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
        }
        failed: list[Exception] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self._model.generate(**options)
            except Exception as error:  # noqa: BLE001  the caller raises it, and would wait forever
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        yield from (piece for piece in streamer if piece)
        thread.join()
        if failed and isinstance(failed[0], RuntimeError | ValueError | IndexError):
            raise UserError(f"{self.name} could not answer: {failed[0]}")
        if failed:
            raise failed[0]


def served(home: Path, model: str, endpoint: str) -> Served:
    """The model at its endpoint, with this home's token if this home serves it there.

    Raises `UserError` if its server has ended: another user's program may have taken the port.
    """
    name = gateway.gateway_name(model)
    if gateway.addresses(home).get(name) != endpoint:
        return Served(model, endpoint, "")
    record = processes.read_record(home, name)
    if record is None or record.process() is None:
        raise UserError(
            f"{model} should be served at {endpoint}, but its server has ended; "
            "`nudge services up` starts it"
        )
    return Served(model, endpoint, guard.read_token(home, gateway.TOKEN))


@contextlib.contextmanager
def fetched(version: Version) -> Iterator[Loaded]:
    """A version from the object store, checked against the registry, in a temporary folder that
    the end of the block removes."""
    from nudge.components.common.models.registered import (
        check_download,
        download_model,
        pinned_uri,
        split_pin,
    )

    uri, digest = split_pin(pinned_uri(version))
    with tempfile.TemporaryDirectory(prefix="nudge-") as made:
        folder = Path(made) / "model"
        download_model(uri, folder)
        check_download(folder, uri, digest)
        yield Loaded(version.name, folder)
