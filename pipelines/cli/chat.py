"""`nudge chat` and `nudge ask`: talk to one version, or to two side by side."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from nudge.components.common.core.environment import nudge_home
from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli import connections, display
from nudge.pipelines.cli.connections import MODEL
from nudge.pipelines.cli.output import echo
from nudge.pipelines.cli.screen import Screen

if TYPE_CHECKING:
    from nudge.pipelines.local.talking import Loaded, Served

VERSIONS = click.option(
    "--version",
    "-v",
    "versions",
    multiple=True,
    metavar="VERSION",
    shell_complete=connections.complete_version,
    help="A version or a run instead of what is served; twice for two side by side.",
)
MAX_TOKENS = click.option(
    "--max-tokens", default=200, show_default=True, help="The longest answer, in tokens."
)
COMPLETE = click.option(
    "--complete", is_flag=True, help="Continue the text instead of answering a message."
)


@click.command()
@click.argument("text", nargs=-1, required=True)
@VERSIONS
@MODEL
@MAX_TOKENS
@COMPLETE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def ask(
    text: tuple[str, ...],
    versions: tuple[str, ...],
    model: str,
    max_tokens: int,
    complete: bool,
    as_json: bool,
) -> None:
    """Ask a model once and print its answer.

    \b
    nudge ask "Where is the Eiffel Tower?"          what is served now
    nudge ask -v ffc6 -v ab12 "Where is ...?"       two versions, each answer under its name
    nudge ask --complete "The Eiffel Tower is in"   continue the text

    A model without a chat template continues the text in any case.
    """
    messages = [{"role": "user", "content": " ".join(text)}]
    with _models(model, versions) as models:
        answers = {}
        for each in models:
            if len(models) > 1 and not as_json:
                echo(f"{each.name}:")
            answers[each.name] = _answer(each, messages, max_tokens, complete, aloud=not as_json)
    if as_json:
        echo(json.dumps({"prompt": messages[0]["content"], "answers": answers}, indent=2))


@click.command()
@click.argument("versions", nargs=-1, shell_complete=connections.complete_version)
@MODEL
@MAX_TOKENS
@COMPLETE
def chat(versions: tuple[str, ...], model: str, max_tokens: int, complete: bool) -> None:
    """Talk to what is served, to one VERSION, or to two versions side by side.

    \b
    nudge chat                 what is served now
    nudge chat ffc6 ab12       two versions, or two runs, promoted or not

    An empty line, Ctrl-D or Ctrl-C ends it; `/new` starts a new conversation.
    """
    with _models(model, versions) as models:
        names = ", ".join(each.name for each in models)
        echo(f"{names}; an empty line ends it, /new starts over", err=True)
        histories: list[list[dict[str, str]]] = [[] for _ in models]
        while line := _line():
            if line == "/new":
                histories = [[] for _ in models]
                continue
            answers = []
            for each, messages in zip(models, histories, strict=True):
                messages.append({"role": "user", "content": line})
                answer = _answer(each, messages, max_tokens, complete, aloud=len(models) == 1)
                messages.append({"role": "assistant", "content": answer})
                answers.append(answer)
            if len(models) > 1:
                _beside([each.name for each in models], answers)


def _line() -> str:
    try:
        return str(input("> " if sys.stdin.isatty() else "")).strip()
    except (EOFError, KeyboardInterrupt):
        echo(err=True)
        return ""


def _answer(
    model: Any, messages: list[dict[str, str]], max_tokens: int, complete: bool, aloud: bool
) -> str:
    """A model's answer; ``aloud`` prints it as it comes."""
    pieces = []
    for piece in model.answer(messages, max_tokens, complete):
        pieces.append(piece)
        if aloud:
            echo(piece, nl=False)
    if aloud:
        echo()
    return "".join(pieces)


def _beside(names: list[str], answers: list[str]) -> None:
    screen = Screen()
    width = max(20, screen.width // len(names) - 1)
    panels = [
        Panel(Text(answer.strip()), title=Text(name), width=width)
        for name, answer in zip(names, answers, strict=True)
    ]
    screen.print(Columns(panels, padding=(0, 0)))


@contextlib.contextmanager
def _models(model: str, versions: tuple[str, ...]) -> "Iterator[list[Served | Loaded]]":
    """What to talk to; raises `UserError` if nothing is served or a name fits nothing."""
    if len(versions) > 2:
        raise UserError(f"{len(versions)} versions; name one, or two to compare them")
    with contextlib.ExitStack() as stack:
        if versions:
            yield [_version(stack, model, version) for version in versions]
        else:
            yield [_served(model)]


def _served(model: str) -> "Served":
    from nudge.components.common.clients.registry.releases import find_served
    from nudge.pipelines.local import services, serving, talking

    home = nudge_home()
    with connections.registry() as ask_registry:
        name = connections.model_name(ask_registry, model)
        found = ask_registry(find_served(name))
    if found is None:
        raise UserError(
            f"no version of {name} is served; name one (`nudge models` lists them), or serve it "
            "with `nudge promote VERSION`"
        )
    if serving.serves(home, name, found.endpoint) is False:
        variables = services.up(home, instead=services.env_store(home))
        serving.restore(home, variables, display.stage)
    return talking.served(home, name, found.endpoint)


def _version(stack: contextlib.ExitStack, model: str, begun: str) -> "Loaded":
    """A run's model from its folder, or else a registered version from the store."""
    from nudge.components.common.clients.registry.releases import find_version
    from nudge.pipelines.local import history, talking

    with contextlib.suppress(UserError):
        run = history.find(nudge_home(), begun)
        if folder := run.output("train", "model"):
            return talking.Loaded(run.run_id, folder)
    with connections.registry() as ask_registry:
        name = connections.model_name(ask_registry, model)
        full = connections.version_name(ask_registry, name, begun)
        version = ask_registry(find_version(name, full))
    connections.start()
    return stack.enter_context(talking.fetched(version))
