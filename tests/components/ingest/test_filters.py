"""Each named filter keeps and drops the right texts, and says why."""

from typing import Any

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.settings import parse
from nudge.components.common.readers import Unreadable
from nudge.components.ingest.filters import make_filters, mask_pii, normalize, repetition
from nudge.components.ingest.settings import IngestSettings

PROSE = (
    "The tower was built by a firm of bridge makers for the fair of 1889. It was to stand for "
    "twenty years, and then be taken apart. A radio mast at its top saved it: the army found that "
    "it could be heard from there across an ocean. Painters go over it by hand every seven years."
)


def filtered(text: str, name: str, **values: object) -> str | Unreadable:
    settings = IngestSettings(data_uri="x", filters=(name,), **values)  # type: ignore[arg-type]
    (apply,) = make_filters(settings)
    return apply(text)


def test_normalizing_removes_what_no_tokenizer_should_see() -> None:
    assert normalize("\r\n a\0b\rc \r\n") == "ab\nc"
    assert normalize("e\u0301") == "\u00e9"
    assert normalize("a\ud800b") == "a\ufffdb"


def test_unicode_repairs_mojibake_and_keeps_good_text() -> None:
    assert filtered("schÃ¶n und groÃŸ", "unicode") == "schön und groß"
    for good in (PROSE, "“quoted” & &amp; ﬁne", "日本語の文", "x = 'a\\tb'\n\tif x:"):
        assert filtered(good, "unicode") == good
    assert filtered("a\x1b[31mb", "unicode") == "ab"


def test_length_counts_characters() -> None:
    assert filtered("ä" * 5, "length", min_characters=5, max_characters=5) == "ä" * 5
    assert filtered("ä" * 4, "length", min_characters=5) == Unreadable("too_short")
    assert filtered("ä" * 6, "length", min_characters=1, max_characters=5) == Unreadable("too_long")


def test_repetition_uses_the_thresholds_of_gopher() -> None:
    assert repetition(PROSE) == PROSE
    dropped = Unreadable("repetition")
    lines = [f"{n} {sentence}" for n, sentence in enumerate(PROSE.split(". ") * 2)] + ["Next"] * 4
    assert repetition("\n".join(lines)) == "\n".join(lines)  # 3 of 12 lines are repeats
    assert repetition("\n".join([*lines, "Next", "Next"])) == dropped  # 5 of 14
    long = "This line is much longer than any other and is said again, word for word, at the end."
    few = [f"short {n}" for n in range(10)]
    assert repetition("\n".join([*few, long, long])) == dropped  # by characters, not by lines
    assert repetition(PROSE + " buy now" * 30) == dropped
    assert repetition("") == ""


def test_language_keeps_the_configured_languages() -> None:
    french = "La tour se dresse au bord du fleuve et se voit de partout dans la ville."
    assert filtered(french, "language", languages=("fr", "de")) == french
    assert filtered(french, "language", languages=("en",)) == Unreadable("language", "fr")
    assert filtered(PROSE, "language", languages=("en",)) == PROSE
    with pytest.raises(UserError, match=r"ingest.languages is empty; list .* such as \[en, fr\]"):
        filtered(PROSE, "language")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("to jean.d+x@mail.example.fr.", "to <email>."),
        ("call +33 1 42 68 53 00 now", "call <phone> now"),
        ("card 4111 1111 1111 1111, 4111-1111-1111-1111", "card <card>, <card>"),
        ("FR76 3000 6000 0112 3456 7890 189", "<iban>"),
        ("from 8.8.8.8 and 2001:4860:4860::8888", "from <ip> and <ip>"),
    ],
)
def test_personal_data_is_masked(text: str, masked: str) -> None:
    assert mask_pii(text) == masked
    assert filtered(text, "pii") == masked
    assert filtered(text, "pii", pii="drop") == Unreadable("pii")


@pytest.mark.parametrize(
    "text",
    [
        "user@host, @name and a@b",
        "4111 1111 1111 1112 fails the check digit; 1234567890123456 too",
        "FR76 3000 6000 0112 3456 7890 188",
        "192.168.1.1, 127.0.0.1, ::1 and fe80::1 are nobody's",
        "at 10:30:45 std::vector 3.11.7 was 1 + 1 = 2",
        "phone 555-1234, ISBN 978-0-306-40615-7",
        PROSE,
    ],
)
def test_text_that_only_looks_personal_stays(text: str) -> None:
    assert filtered(text, "pii", pii="drop") == text


def test_filters_run_in_the_order_of_the_recipe() -> None:
    settings = IngestSettings(data_uri="x", filters=("pii", "length"), min_characters=10)
    mask, length = make_filters(settings)
    assert length(str(mask("a.b@example.org"))) == Unreadable("too_short")


@pytest.mark.parametrize(
    ("values", "name"), [({"pii": "drop"}, "pii"), ({"languages": ["en", "fr"]}, "language")]
)
def test_a_setting_without_its_filter_is_refused(values: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=rf"set filters: \[unicode, length, {name}\]$"):
        parse(IngestSettings, {"data_uri": "x", **values}, "ingest")
    named = {"data_uri": "x", "filters": ["length", name], **values}
    assert parse(IngestSettings, named, "ingest").filters == ("length", name)
