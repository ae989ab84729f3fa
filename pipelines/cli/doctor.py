"""`nudge doctor`: what is missing here or on the cluster."""

import sys

import click
from rich.table import Table
from rich.text import Text

from nudge.pipelines.cli.screen import Screen
from nudge.pipelines.cluster.doctor import examine

MARKS = {"ok": "✓", "missing": "✗", "not used": "–"}


@click.command()
def doctor() -> None:
    """Check this machine and the cluster, and print a command that fixes each problem.

    It checks Python, packages, programs, the GPU, the disk, the data connection, the model
    registry, the pipelines server and your permissions. It changes nothing.

    Exit status: 0 nothing is missing, 1 something is.
    """
    findings = examine()
    table = Table(show_header=False, box=None)
    for each in findings:
        message = f"{each.found}\n→ {each.fix}" if each.fix else each.found
        table.add_row(MARKS[each.state], each.check, Text(message, overflow="fold"))
    Screen().print(table)
    if any(each.state == "missing" for each in findings):
        sys.exit(1)
