"""The named filters of a recipe. A filter maps a text to a text, or to the reason to drop it.

``unicode`` repairs mojibake and control characters with ftfy and keeps quotes and ligatures;
``length`` drops short and long texts; ``repetition`` follows Gopher (Rae et al. 2021, arXiv
2112.11446, table A1); ``language`` uses py3langid; ``pii`` finds e-mail addresses, public IP
addresses, payment cards, IBANs and phone numbers written with a country code.
"""

import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.readers import Unreadable
from nudge.components.ingest.settings import FILTER_GROUP, IngestSettings

Filter = Callable[[str], str | Unreadable]

DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS = 0.30, 0.20
TOP_NGRAM_CHARACTERS = {2: 0.20, 3: 0.18, 4: 0.16}
LANGUAGE_CHARACTERS = 2000

EMAIL = re.compile(r"\b[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b")
ADDRESS = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f:]*:[0-9A-Fa-f:]+)(?![\w:])")
CARD = re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")


def normalize(text: str) -> str:
    """The text in Unicode NFC with plain newlines, without NUL, lone surrogates, outer blanks."""
    return tidy(text).strip()


def tidy(text: str) -> str:
    """The same with outer blanks."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text)


def make_filters(settings: IngestSettings, names: Sequence[str] | None = None) -> list[Filter]:
    """The recipe's filters in their order, or those of ``names``.

    Raises `UserError` if a filter lacks what it needs.
    """
    names = settings.filters if names is None else names
    made: dict[str, Callable[[IngestSettings], Filter]] = {
        "unicode": _unicode,
        "length": _length,
        "repetition": lambda _: repetition,
        "language": _language,
        "pii": _pii,
    }
    for point in entry_points(group=FILTER_GROUP):
        if point.name in names:
            try:
                made[point.name] = point.load()
            except (ImportError, AttributeError) as error:
                raise UserError(
                    f"ingest.filters: {point.name} ({point.value}) cannot be loaded: {error}"
                ) from None
    return [made[name](settings) for name in names]


def _unicode(_: IngestSettings) -> Filter:
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        normalization="NFC",
    )

    def repaired(text: str) -> str:
        # Printable ASCII needs no repair, and ftfy takes milliseconds per page.
        if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
            return text
        return ftfy.fix_text(text, config).strip()

    return repaired


def _length(settings: IngestSettings) -> Filter:
    def fits(text: str) -> str | Unreadable:
        if len(text) < settings.min_characters:
            return Unreadable("too_short")
        return Unreadable("too_long") if len(text) > settings.max_characters else text

    return fits


def repetition(text: str) -> str | Unreadable:
    """Drop a text that consists too much of repeated lines or of one repeated phrase."""
    lines = [line for line in text.split("\n") if line.strip()]
    occurrences = Counter(lines)
    extra = [(count - 1, len(line)) for line, count in occurrences.items() if count > 1]
    if sum(count for count, _ in extra) > DUPLICATE_LINES * len(lines):
        return Unreadable("repetition")
    if sum(count * size for count, size in extra) > DUPLICATE_LINE_CHARACTERS * len(text):
        return Unreadable("repetition")
    words = text.split()
    for size, share in TOP_NGRAM_CHARACTERS.items():
        grams = Counter(zip(*(words[first:] for first in range(size)), strict=False))
        if grams:
            gram, count = grams.most_common(1)[0]
            if count > 1 and count * len(" ".join(gram)) > share * len(text):
                return Unreadable("repetition")
    return text


def _language(settings: IngestSettings) -> Filter:
    import py3langid

    if not settings.languages:
        raise UserError(
            "ingest.filters has 'language' but ingest.languages is empty; list the languages to "
            "keep, such as [en, fr]"
        )

    def kept(text: str) -> str | Unreadable:
        found = py3langid.classify(text[:LANGUAGE_CHARACTERS])[0]
        return text if found in settings.languages else Unreadable("language", found)

    return kept


def _pii(settings: IngestSettings) -> Filter:
    def clean(text: str) -> str | Unreadable:
        masked = mask_pii(text)
        return Unreadable("pii") if settings.pii == "drop" and masked != text else masked

    return clean


def mask_pii(text: str) -> str:
    """The text with each piece of personal data replaced by its kind, such as ``<email>``."""
    import phonenumbers
    from stdnum import iban, luhn

    def valid(check: Callable[[str], Any], kind: str) -> Callable[[re.Match[str]], str]:
        return lambda match: kind if check(match.group()) else match.group()

    text = EMAIL.sub("<email>", text)
    text = IBAN.sub(valid(iban.is_valid, "<iban>"), text)
    text = CARD.sub(valid(lambda m: luhn.is_valid(re.sub("[ -]", "", m)), "<card>"), text)
    text = ADDRESS.sub(valid(_is_public, "<ip>"), text)
    if "+" in text:
        for match in reversed(list(phonenumbers.PhoneNumberMatcher(text, None))):
            text = text[: match.start] + "<phone>" + text[match.end :]
    return text


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False
