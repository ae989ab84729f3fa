"""`nudge plan`: what a recipe takes before it runs."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from nudge.pipelines.cli.output import echo_json
from nudge.pipelines.cli.run import OVERRIDES, RECIPE
from nudge.pipelines.cli.screen import Screen
from nudge.pipelines.recipes import load

if TYPE_CHECKING:
    from nudge.pipelines.plan.plan import Plan

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state (AdamW)",
    "gathered": "gathered layers and exchange buffers",
    "activations": "activations and temporaries",
    "loss": "loss (a chunk of logits, head gradients)",
    "runtime": "torch and its libraries",
    "base_model": "base model",
    "checkpoints": "checkpoints",
    "export": "model and its upload",
}


@click.command()
@RECIPE
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The base model's config.json, if it is not on this machine.",
)
def plan(recipe: str, overrides: tuple[str, ...], as_json: bool, config_file: Path | None) -> None:
    """Show what a recipe needs before it runs: memory, disk, hours and cost, and whether it fits.

    It reads only the model's config: nothing is downloaded, loaded or started. If the recipe does
    not fit, it lists the settings to change, cheapest first.

    \b
    nudge plan one-gpu-8b
    nudge plan one-node-70b --set plan.gpus=4
    nudge plan mine.yaml --set plan.tokens_per_s=4200 --set prices.gpu_hour=2.5

    The sections `plan` and `prices` of the recipe describe the hardware, the speed and the prices.
    Exit status: 0 it fits, 1 it does not, 2 the input was refused.
    """
    from nudge.pipelines.plan.plan import plan_recipe

    loaded = load(recipe, overrides)
    found = plan_recipe(loaded.name, loaded.text, config_file)
    if as_json:
        echo_json(dataclasses.asdict(found))
    else:
        _show(found)
    if not found.fits:
        sys.exit(1)


def _show(plan: "Plan") -> None:
    screen = Screen()
    device = "GPU" if plan.device == "cuda" else "rank on a CPU"
    table = Table(show_header=False, box=None)

    def row(name: str, value: str) -> None:
        table.add_row(Text(name), Text(value, overflow="fold"))

    row("parameters", f"{plan.parameters:,}, {plan.trainable_parameters:,} trained")
    row("ranks", f"{plan.ranks} on {plan.nodes} node{'s' if plan.nodes > 1 else ''}")
    limit = _gb(plan.device_memory_bytes)
    row(f"memory per {device}", f"{_gb(plan.device_peak_bytes)} of {limit}")
    for name, size in plan.device_parts.items():
        rough = plan.activations_from if name == "activations" else ""
        row(f"  {PARTS[name]}", f"{_gb(size)}{f' ({rough})' if rough else ''}")
    evaluated = f"{_gb(plan.evaluation_bytes)} of {limit}"
    too_large = plan.evaluation_bytes > (plan.device_memory_bytes or plan.evaluation_bytes)
    row("evaluation, weights on one device", f"{evaluated}{': too large' if too_large else ''}")
    row("host memory per node", f"{_gb(plan.host_peak_bytes)} of {_gb(plan.host_memory_bytes)}")
    row("disk", _gb(plan.disk_bytes))
    for name, size in plan.disk_parts.items():
        row(f"  {PARTS[name]}", _gb(size))
    row("training tokens", _number(plan.tokens) + f" ({plan.tokens_from})")
    row("steps", _number(plan.steps))
    speed = "unknown" if plan.tokens_per_s is None else f"{plan.tokens_per_s:,.0f} per second"
    row("speed", f"{speed} ({plan.tokens_per_s_from.removeprefix('unknown: ')})")
    row("hours", "unknown" if plan.hours is None else f"{plan.hours:,.1f}")
    if plan.gpu_hours:
        row("GPU hours", f"{plan.gpu_hours:,.1f}")
    if plan.hours is not None:
        unknown = "unknown: set a price, such as prices.gpu_hour"
        cost = unknown if plan.cost is None else f"{plan.cost:,.2f} {plan.currency}"
        row("cost of training, without energy", cost)
    row("largest micro-batch that fits", f"{plan.largest_micro_batch} sequences")
    row("training fits", "yes" if plan.fits else "no")
    screen.print(table)
    if plan.change:
        screen.print("Change, in this order, until it fits:")
        for each in plan.change:
            verdict = "fits" if each.fits else "does not fit yet"
            screen.print(
                f"  {each.setting}: {_gb(each.device_peak_bytes)}, {verdict} ({each.costs})",
                markup=False, highlight=False,
            )  # fmt: skip


def _gb(size: int | None) -> str:
    if size is None:
        return "no known limit"
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
