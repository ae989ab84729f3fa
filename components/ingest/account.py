"""The account of one run of ingest: how much was read, kept, held out and dropped, and whether too
much was lost to continue."""

from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from nudge.components.common.chat.refusals import REASONS
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sample_size import MIN_DOCUMENTS, corpus_size
from nudge.components.common.readers import CONVERTED, suffix_of
from nudge.components.ingest.settings import IngestSettings

DUPLICATES = ("duplicate", "near_duplicate", "repeated_prompt", "near_repeated_prompt")
NO_LOSS = ("forgotten", "hidden", "linked_folder", "metadata", "not_text", "over_its_share")
"""Reasons for what is left out on purpose; it does not count as a loss."""
EXAMPLES = 4
HINTS = {
    "no_text_layer": "add one with ocrmypdf, from pip install 'nudge-lm[ocr]'",
    "no_column": "name the column with the text in ingest.text_column",
    "overlaps_evaluation": "it shares 13 words with a guard, a probe or ingest.keep_out",
}
"""What to do about a reason, where a sentence says it."""


def account(counts: dict[str, Any]) -> str:
    """One line: ``read 340, kept 120, held out 12; dropped: 100 unknown_kind (.docx .xlsx)``."""
    dropped = ", ".join(reasons(counts))
    found = f"{_totals(counts)}; dropped: {dropped or 'nothing'}{_encodings(counts)}"
    return f"{found}{_mix(counts)}"


def reasons(counts: dict[str, Any]) -> list[str]:
    """One phrase per reason, most frequent first: count, name and some examples."""
    found = sorted(counts["dropped"].items(), key=lambda item: (-item[1], item[0]))
    phrases = []
    for reason, count in found:
        shown = examples(counts, reason)
        advice = hints(reason, shown)
        detail = "; ".join([" ".join(shown), *advice] if shown else advice)
        phrases.append(f"{count} {reason}" + (f" ({detail})" if detail else ""))
    return phrases


def examples(counts: dict[str, Any], reason: str) -> list[str]:
    """The file suffixes behind a reason, or the names of some files."""
    if reason in DUPLICATES:
        return []
    seen: Counter[str] = Counter()
    for source in counts["sources"]:
        if count := source["dropped"].get(reason):
            path = PurePosixPath(source["uri"].rpartition("/")[2])
            if reason in ("unknown_kind", "not_text") and path.suffix != ".zip":
                seen[suffix_of(path.name) or path.name] += count
            else:
                seen[path.name] += count
    ordered = sorted(seen.items(), key=lambda item: (-item[1], item[0]))
    return [name for name, _ in ordered[:EXAMPLES]] + ["..."] * (len(ordered) > EXAMPLES)


def hints(reason: str, shown: list[str]) -> list[str]:
    """What to do about a reason, whose `examples` are ``shown``."""
    if reason == "unknown_kind":
        return [f"{each}: {CONVERTED[each]}" for each in shown if each in CONVERTED]
    return [HINTS[reason]] if reason in HINTS else []


def with_hints(counts: dict[str, Any], reason: str) -> list[str]:
    """The examples behind a reason, and what to do about it."""
    shown = examples(counts, reason)
    return [*shown, *(f"({hint})" for hint in hints(reason, shown))]


def check_loss(counts: dict[str, Any], most: float) -> None:
    """Raise `UserError` with the account if more than the share ``most`` of the documents, or of
    their bytes, was lost for any reason other than duplication."""
    shares = []
    for total, lost in (("documents_in", "dropped"), ("text_bytes_in", "dropped_bytes")):
        skipped = sum(counts[lost].get(reason, 0) for reason in NO_LOSS)
        duplicates = sum(counts[lost].get(reason, 0) for reason in DUPLICATES)
        considered = counts[total] - skipped
        gone = sum(counts[lost].values()) - skipped - duplicates
        shares.append(gone / considered if considered else 0.0)
    if max(shares) <= most:
        return
    needed = min(1.0, -(-max(shares) * 100 // 1) / 100)
    table = "\n".join(f"  {phrase}" for phrase in reasons(counts))
    raise UserError(
        f"too much of the data would be lost: {shares[0]:.0%} of the documents and "
        f"{shares[1]:.0%} of their bytes; ingest.max_lost allows {most:.0%}\n"
        f"{_totals(counts)}; dropped:\n{table}\n"
        f"Fix or remove these files, or set ingest.max_lost: {needed:g} to train on the rest"
    )


def check_held_out(result: dict[str, Any], settings: IngestSettings) -> None:
    """Raise `UserError` if too few documents are held out for a verdict, unless that is allowed.

    ``result`` is that of `ingest`.
    """
    held_out = result["validation_documents"]
    if held_out >= MIN_DOCUMENTS or settings.allow_no_verdict:
        return
    need = corpus_size(settings.validation_share)
    raise UserError(
        f"{result['account']}\n"
        f"{held_out} documents are held out, and with fewer than {MIN_DOCUMENTS} nothing can be "
        f"shown to be better, so nothing would be promoted: bring about {need} documents, "
        f"raise ingest.validation_share (now {settings.validation_share:g}), set "
        "ingest.split_characters to split long documents, or set ingest.allow_no_verdict: true to "
        "train without a verdict"
    )


def check_conversations(counts: dict[str, Any], found: int) -> None:
    """Raise `UserError` if fewer than half of the conversations can be learned from; ``found`` is
    the number of those that were read and pass every check."""
    refused = {reason: n for reason, n in counts["dropped"].items() if reason in REASONS}
    lost = sum(refused.values())
    if lost <= found:
        return
    phrases = reasons({**counts, "dropped": refused})
    table = "\n".join(f"  {phrase}: {REASONS[phrase.split()[1]]}" for phrase in phrases)
    raise UserError(
        f"only {found} of {found + lost} conversations can be learned from, and at least half must "
        f"be; refused:\n{table}\n"
        "Correct these records (the report names file, row and reason of some), or set "
        "ingest.format: text if they are not conversations"
    )


def _totals(counts: dict[str, Any]) -> str:
    chats = counts.get("conversations", 0)
    return (
        f"read {counts['documents_in']}, kept {counts['documents']}"
        f"{f' ({chats} conversations)' if chats else ''}, "
        f"held out {counts['validation_documents']}"
    )


def _mix(counts: dict[str, Any]) -> str:
    parts = counts.get("mix", [])
    total = sum(part["train_documents"] for part in parts)
    shown = ", ".join(
        f"{part['name']} {part['train_documents']} ({part['train_documents'] / total:.1%})"
        for part in parts
        if total
    )
    return f"; mix of training documents: {shown}" if shown else ""


def _encodings(counts: dict[str, Any]) -> str:
    found = ", ".join(f"{count} {name}" for name, count in counts["encodings"].items())
    return f"; encodings other than UTF-8: {found}" if found else ""
