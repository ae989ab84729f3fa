"""`nudge completion`: the script that lets a shell complete commands, recipes and versions."""

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from nudge.pipelines.cli.output import echo

SHELLS = {
    "bash": "echo 'eval \"$(nudge completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(nudge completion zsh)\"' >> ~/.zshrc",
    "fish": "nudge completion fish > ~/.config/fish/completions/nudge.fish",
}


@click.command()
@click.argument("shell", type=click.Choice([*SHELLS]), required=False)
def completion(shell: str | None) -> None:
    """Print the completion script of a shell: bash, zsh or fish (default: yours).

    \b
    eval "$(nudge completion bash)"                         for this terminal
    echo 'eval "$(nudge completion bash)"' >> ~/.bashrc     for every new one
    """
    mine = Path(os.environ.get("SHELL", "")).name
    shell = shell or (mine if mine in SHELLS else "bash")
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    echo(kind(root, {}, "nudge", "_NUDGE_COMPLETE").source())
    echo(f"to install it: {SHELLS[shell]}", err=True)
