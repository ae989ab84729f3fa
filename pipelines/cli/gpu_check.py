"""`nudge gpu-check`: does everything work on this GPU, and how fast is the loss?"""

import importlib.util
import sys
from pathlib import Path

import click

from nudge.pipelines.cli.output import echo
from nudge.pipelines.gpu_check.catalog import NAMES, chosen


@click.command("gpu-check")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("gpu-check"),
    show_default=True,
    help="The folder for gpu-check.json and gpu-check.html.",
)
@click.option(
    "--device",
    type=click.Choice(["gpu", "cpu"]),
    default="gpu",
    show_default=True,
    help="cpu runs everything that a CPU can.",
)
@click.option("--only", multiple=True, metavar="NAME", help="Run checks whose names begin so.")
@click.option("--list", "listing", is_flag=True, help="Print the names of the checks and exit.")
def gpu_check(out: Path, device: str, only: tuple[str, ...], listing: bool) -> None:
    """Check this GPU: the kernel, every mode of training, resume, export, and the loss's speed.

    It needs no network, no model and no data: it makes a tiny model and its tokenizer itself. Each
    check passes, fails with the reason, or is skipped with the reason. The results are one JSON
    file and one HTML page.

    It ends after 8 minutes at the latest: the check that is running then fails, and the remaining
    ones are skipped. Nobody has measured yet how long all of them take on a GPU.

    \b
    nudge gpu-check --out results
    nudge gpu-check --only train-lora

    Exit status: 0 no check failed, 1 one failed, 2 none could run.
    """
    from nudge.pipelines.gpu_check.run import run_checks, write_report

    if listing:
        echo("\n".join(NAMES))
        return
    if importlib.util.find_spec("torch") is None:  # only a child imports it
        raise ModuleNotFoundError(name="torch")
    report = run_checks(device, chosen(only), echo)
    result, page = write_report(report, out)
    counts = ", ".join(f"{report.count(each)} {each}" for each in ("passed", "failed", "skipped"))
    echo(f"{counts} in {report.seconds:.0f} s\n{result}\n{page}")
    if report.count("failed"):
        sys.exit(1)
    if not report.count("passed"):
        sys.exit(2)
