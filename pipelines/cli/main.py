"""The command `nudge`. The module of a subcommand is imported only when that subcommand runs."""

import signal
import sys

if sys.argv[0].rpartition("/")[2] == "nudge":  # until `invoke`: Ctrl-C while modules are imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import errno
import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from nudge.components.common.core.environment import bypass_proxy_here, nudge_home
from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli import output
from nudge.pipelines.cli.output import echo

PREFIX = "nudge.pipelines.cli."
EVERYTHING = ("data", "train", "release", "pipeline", "local")
"""The extras that a run of all steps needs."""


@dataclass(frozen=True)
class Command:
    """A subcommand: ``module:attribute`` below `PREFIX`, its line in --help, the extras it uses."""

    where: str
    help: str
    extras: tuple[str, ...] = ()


COMMANDS = {
    "init": Command("init:init", "Write a recipe for a folder of text.", EVERYTHING),
    "settings": Command("settings:settings", "Explain the keys of a recipe."),
    "run": Command("run:run", "Run the pipeline on this machine.", EVERYTHING),
    "ingest": Command("run:ingest", "Show what a recipe reads and drops.", ("data",)),
    "preview": Command(
        "preview:preview", "Show what a recipe's data teaches.", ("data", "train")
    ),
    "step": Command("step:step", "Run one step on existing artifacts.", EVERYTHING),
    "runs": Command("history:runs", "List, show, compare, delete runs.", EVERYTHING),
    "logs": Command("history:logs", "Print the log of a run or a step.", EVERYTHING),
    "plan": Command(
        "plan:plan", "Show memory, disk, hours and cost before a run.", ("data", "train", "local")
    ),
    "recipes": Command("run:recipes", "List the recipes that ship with nudge."),
    "services": Command("services:services", "Start, stop, show embedded services.", EVERYTHING),
    "trace": Command("trace:trace", "Show what learned a document.", EVERYTHING),
    "clean": Command("clean:clean", "Free disk space by rules.", EVERYTHING),
    "models": Command("models:models", "List registered versions.", ("release", "local")),
    "ask": Command("chat:ask", "Ask a model once.", EVERYTHING),
    "chat": Command("chat:chat", "Talk to one version, or to two.", EVERYTHING),
    "approve": Command("approval:approve", "Approve a version that waits; serve it.", EVERYTHING),
    "reject": Command("approval:reject", "Reject a version that waits.", ("release", "local")),
    "export": Command("export:export", "Write a version as a folder or GGUF file.", EVERYTHING),
    "promote": Command("release:promote", "Give a version all of the traffic.", EVERYTHING),
    "split": Command("release:split", "Divide the traffic between versions.", EVERYTHING),
    "rollback": Command("release:rollback", "Go back to the previous version.", EVERYTHING),
    "register": Command(
        "release:register", "Finish an interrupted registration.", ("data", "release", "local")
    ),
    "verify": Command("verify:verify", "Check the signature of a version.", ("release", "local")),
    "registry": Command(
        "registry:registry", "Copy models between registries.", ("release", "local")
    ),
    "compile": Command("compiling:compile_", "Write the pipelines as YAML.", ("pipeline",)),
    "upload": Command("cluster:upload", "Upload a pipeline to a server.", ("pipeline",)),
    "submit": Command("cluster:submit", "Run a pipeline on a server.", ("pipeline", "data")),
    "schedule": Command("schedule:schedule", "Run a recipe regularly.", ("pipeline", "data")),
    "doctor": Command("doctor:doctor", "Find what is missing and how to fix it."),
    "gpu-check": Command("gpu_check:gpu_check", "Check that all works on a GPU.", ("train",)),
    "completion": Command("completion:completion", "Let your shell complete commands."),
}  # fmt: skip


class Commands(click.Group):
    """The subcommands in `COMMANDS`, and the one way in which all of them end on an error.

    A `UserError` ends a command with its text and status 2, Ctrl-C with status 130, and a package
    that is not installed with the name of the extra to install.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand of this name, or None."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = COMMANDS[cmd_name].where.partition(":")
        found: click.Command = getattr(importlib.import_module(PREFIX + module), attribute)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of subcommands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        output.write_anything()
        bypass_proxy_here()
        try:
            return super().invoke(ctx)
        except UserError as error:
            echo(f"error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt as stop:  # click itself would end with 1, as a failure does
            echo(str(stop) or "stopped", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            echo(f"error: {_full_disk(error)}", err=True)
            ctx.exit(2)
        except ModuleNotFoundError as error:
            if not (message := _missing(ctx, error)):
                raise
            echo(f"error: {message}", err=True)
            ctx.exit(2)


def _full_disk(error: OSError) -> str:
    """What was written, how much is free there, and what to do."""
    path = Path(error.filename or nudge_home())
    there = next((each for each in (path, *path.parents) if each.exists()), Path.cwd())
    free = shutil.disk_usage(there).free / 1e6
    return (
        f"no space is left on the disk for {path}: {free:.0f} MB are free; nothing that is served "
        "changed, so free some space (`nudge clean --dry-run` shows what can go) and run it again"
    )


def _missing(ctx: click.Context, error: ModuleNotFoundError) -> str:
    """What to install for a subcommand; empty if the module is one of nudge's own."""
    name = (error.name or "").partition(".")[0]
    command = COMMANDS.get(ctx.invoked_subcommand or "")
    if not command or not command.extras or name in ("", "nudge"):
        return ""
    extras = ",".join(command.extras)
    return (
        f"`nudge {ctx.invoked_subcommand}` needs the Python package {name}, which is not "
        f"installed; install it: pip install 'nudge-lm[{extras}]'"
    )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nudge-lm")
def main() -> None:
    """Retrain a language model on your own text and put it into production.

    Start with `nudge run`: it runs the whole pipeline on this machine, from text to a served model.
    Then `nudge init FOLDER` writes a recipe for your text, `nudge ingest RECIPE.yaml` shows what is
    read before you train, and `nudge settings KEY` explains what you can change.
    """
