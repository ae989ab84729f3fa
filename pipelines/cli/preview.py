"""`nudge preview`: the text that a model would be trained on, and which of it is learned."""

import collections
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import click
from rich.text import Text

from nudge.components.common.chat import ChatTemplate, Refusal, from_json, template_of_folder
from nudge.components.common.chat.render import Learn, Rendered
from nudge.components.common.core.errors import UserError
from nudge.components.ingest.settings import IngestSettings
from nudge.pipelines.cli.output import echo_json
from nudge.pipelines.cli.run import OVERRIDES, RECIPE
from nudge.pipelines.cli.screen import Screen
from nudge.pipelines.recipes import Recipe, load
from nudge.pipelines.steps import STEPS

LEARNED = "bold green"
MOST_READ = 10_000
"""Records that are read before giving up on finding enough of them."""


@dataclass
class Preview:
    """What the first records of a recipe's data teach, and why some teach nothing."""

    rows: list[tuple[str, Rendered]]
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: dict[str, str] = field(default_factory=dict)
    template: ChatTemplate | None = None

    def refuse(self, reason: str, where: str, detail: str) -> None:
        """Count a record that teaches nothing."""
        self.refused[reason] += 1
        self.examples.setdefault(reason, f"{where}: {detail}" if detail else where)


@click.command()
@RECIPE
@OVERRIDES
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="How many records to show; a record may give several texts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list on stdout.")
def preview(recipe: str, overrides: tuple[str, ...], rows: int, as_json: bool) -> None:
    """Show the first texts that RECIPE trains on, and color what the model learns of each.

    \b
    nudge preview mine.yaml              the learned part is green, the rest is only context
    nudge preview mine.yaml --rows 20
    nudge preview mine.yaml --json       [{"text": ..., "learned": [[start, end], ...]}, ...]

    A conversation is shown as the base model's chat template (or tokenize.chat_template) renders
    it; positions count characters. Duplicates are not looked for, and nothing is trained or kept.
    Exit status: 0, or 2 if no record can be learned from.
    """
    loaded = load(recipe, overrides)
    found = previewed(loaded, rows)
    if as_json:
        values = [{"text": each.text, "learned": each.learned} for _, each in found.rows]
        echo_json(values)
        return
    _print(found)


def previewed(recipe: Recipe, count: int) -> Preview:
    """The texts of a recipe's first ``count`` records; raises `UserError` if there are none."""
    settings: IngestSettings = STEPS["ingest"].read_settings(recipe.text)
    found = Preview([])
    template = _TemplateOnce(recipe)
    shown = 0
    for where, row in itertools.islice(_records(settings, found), MOST_READ):
        try:
            texts = template.texts(row)
        except Refusal as refusal:
            found.refuse(refusal.reason, where, refusal.detail)
            continue
        found.rows += [(where, text) for text in texts]
        if (shown := shown + 1) >= count:
            break
    found.template = template.made
    if not found.rows:
        reasons = "\n".join(
            f"  {number} {reason} ({found.examples[reason]})"
            for reason, number in found.refused.most_common()
        )
        raise UserError(f"no record can be learned from:\n{reasons}")
    return found


def _records(settings: IngestSettings, found: Preview) -> Iterator[tuple[str, Any]]:
    """The records that pass cleaning, with their file and name."""
    from nudge.components.ingest.cleaning import Row, clean_all
    from nudge.components.ingest.downloads import WebLimits
    from nudge.components.ingest.filters import make_filters
    from nudge.components.ingest.finding import sources_of
    from nudge.components.ingest.overlap import overlap_of, texts_to_keep_out
    from nudge.components.ingest.sources import Changed, opened
    from nudge.components.ingest.stores import Vanished

    filters, keep_out = make_filters(settings), overlap_of(texts_to_keep_out(settings))
    limits = WebLimits(settings.allow_private_addresses, settings.max_download_bytes)
    for source in sources_of(settings, limits):
        if not source.is_readable:
            found.refuse(source.unread, source.uri, "")
            continue
        with contextlib.suppress(Changed, Vanished), opened(source, settings) as (records, _):
            for record in records:
                for result in clean_all(record, filters, settings, keep_out):
                    if isinstance(result, Row):
                        yield f"{source.uri} {result.id}", result
                    else:
                        found.refuse(result.reason, f"{source.uri} {record.name}", result.detail)


class _TemplateOnce:
    """The chat template of a recipe, loaded when the first conversation needs it."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._settings = STEPS["tokenize"].read_settings(recipe.text)
        self.made: ChatTemplate | None = None

    def texts(self, row: Any) -> list[Rendered]:
        """The texts of a clean document; raises `Refusal` if it teaches nothing."""
        if row.turns is None:
            return [Rendered(row.text, ((0, len(row.text)),))]
        learn: Learn = (self._recipe.values.get("train") or {}).get("learn", "assistant")
        from nudge.components.common.chat.masks import rendered

        template, conversation = self.get(), from_json(row.text)
        if self._settings.control_tokens == "refuse":
            return template.render(conversation, learn)
        return [each.rendered for each in rendered(template, conversation, learn)]

    def get(self) -> ChatTemplate:
        """The template; raises `UserError` if the base model has none that can be used."""
        if self.made is None:
            from nudge.components.common.models.base_model import local_tokenizer

            settings = self._settings
            if settings.tokenizer == "train":
                raise UserError(
                    "conversations need the tokenizer of a base model with an end-of-turn token; "
                    "set base_model and remove tokenize.tokenizer: train"
                )
            folder = local_tokenizer(settings.base_model)
            self.made = template_of_folder(folder, settings.chat_template)
        return self.made


SOURCES = {
    "model": "the base model's own chat template",
    "recipe": "the recipe's chat template (tokenize.chat_template)",
    "chatml": "ChatML, because the base model has no chat template",
}


def _print(found: Preview) -> None:
    screen = Screen(highlight=False)
    for number, (where, each) in enumerate(found.rows, 1):
        learned = sum(end - start for start, end in each.learned)
        screen.rule(Text(f"{number}  {where}"), align="left", style="dim")
        text = Text(each.text)
        for start, end in each.learned:
            text.stylize(LEARNED, start, end)
        screen.print(text, soft_wrap=True)
        screen.print(f"{learned} of {len(each.text)} characters are learned", style="dim")
    screen.rule(style="dim")
    screen.print(Text("green", LEARNED), "is learned; the rest is context.")
    if found.template:
        screen.print(f"Rendered with {SOURCES[found.template.source]}.")
        if opened := found.template.opened_by_prompt:
            screen.print(
                f"Its generation prompt ends with {opened!r}, which a served model sees but an "
                "answer without reasoning does not teach. Train on answers with reasoning_content, "
                "or set tokenize.chat_template.",
                style="yellow",
                markup=False,
            )
    for reason, number in found.refused.most_common():
        screen.print(
            Text(f"left out: {number} {reason} ({found.examples[reason]})", "yellow"),
            soft_wrap=True,
        )
