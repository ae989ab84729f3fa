"""Gives each source of ``ingest.mix`` its share of the documents, in each split.

No document is repeated, so documents of the other sources are left out until the shares fit: the
source that is shortest of documents keeps all of its own. The documents with the smallest hashes
stay, so the choice depends neither on the order of the files nor on timing, and one more document
changes it little. A shuffled epoch of training sees each document once, and a resumed one goes on
where it stopped, so the shares hold for what was trained on.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.ingest.duplicates import Documents
from nudge.components.ingest.settings import IngestSettings
from nudge.components.ingest.sources import Source

WASTE = 50
"""Documents are left out to make every share exact if they are at most 1 / WASTE of the total."""


def apply_mix(documents: Documents, sources: Sequence[Source], settings: IngestSettings) -> None:
    """Drop the documents that a source has beyond its share, for the reason ``over_its_share``.

    Raises `UserError` if a source of the mix has no document left.
    """
    if not settings.mix:
        return
    names = [part.name for part in settings.mix]
    documents.run("CREATE TABLE parts (object INTEGER, part INTEGER)")
    documents.run(
        "INSERT INTO parts SELECT unnest(?::INTEGER[]), unnest(?::INTEGER[])",
        [list(range(len(sources))), [names.index(source.part) for source in sources]],
    )
    counts = mix_counts(documents, settings)
    if empty := [name for name in names if not sum(counts[name].values())]:
        raise UserError(
            f"ingest.mix: no document of {', '.join(empty)} is left after cleaning; correct its "
            "data_uri, or remove it"
        )
    weights = {part.name: part.weight for part in settings.mix}
    for split in ("train", "validation"):
        quotas = shares({name: counts[name][split] for name in names}, weights)
        for part, name in enumerate(names):
            documents.run(
                f"""UPDATE verdicts SET reason = 'over_its_share' WHERE doc IN (
                    SELECT doc FROM docs JOIN verdicts USING (doc) JOIN parts USING (object)
                    WHERE reason IS NULL AND part = ? AND (side < ?) = ?
                    ORDER BY sha256 OFFSET {quotas[name]})""",
                [part, settings.validation_share, split == "validation"],
            )


def mix_counts(documents: Documents, settings: IngestSettings) -> dict[str, dict[str, int]]:
    """The kept documents of each source of the mix: ``{name: {"train", "validation"}}``."""
    found = {part.name: {"train": 0, "validation": 0} for part in settings.mix}
    rows = documents.query(
        """SELECT part, side < ? AS held_out, count(*) FROM docs JOIN verdicts USING (doc)
        JOIN parts USING (object) WHERE reason IS NULL GROUP BY ALL""",
        [settings.validation_share],
    )
    for part, held_out, count in rows:
        found[settings.mix[part].name]["validation" if held_out else "train"] = count
    return found


def shares(available: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """How many documents of each source are used, as many as there are for the weights.

    The shares are exact if that costs at most 1 / `WASTE` of the documents. Otherwise each count
    differs from its exact share by less than one document.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total_weight = sum(exact.values())
    parts = {name: weight / total_weight for name, weight in exact.items()}
    total = min(math.floor(available[name] / part) for name, part in parts.items())
    unit = math.lcm(*(part.denominator for part in parts.values()))
    if total >= unit and total % unit * WASTE <= total:
        total -= total % unit
    quotas = {name: math.floor(total * part) for name, part in parts.items()}
    rest = sorted(parts, key=lambda name: (quotas[name] - total * parts[name], name))
    for name in rest[: total - sum(quotas.values())]:
        quotas[name] += quotas[name] < available[name]
    return quotas


def mix_of(documents: Documents, settings: IngestSettings) -> list[dict[str, Any]]:
    """What the corpus's manifest says about the mix."""
    counts = mix_counts(documents, settings)
    return [
        {
            "name": part.name,
            "weight": part.weight,
            "train_documents": counts[part.name]["train"],
            "validation_documents": counts[part.name]["validation"],
        }
        for part in settings.mix
    ]
