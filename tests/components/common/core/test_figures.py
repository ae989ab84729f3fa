"""Figures stay as wide as a column, and scripts without spaces have no words."""

import math

import pytest

from nudge.components.common.core.figures import (
    MISSING,
    amounts,
    fixed,
    per_gain,
    probability,
    signed,
)
from nudge.components.common.core.scripts import separates_words

ODD = [math.nan, math.inf, -math.inf, None, "text", True]


@pytest.mark.parametrize("value", ODD)
def test_what_is_not_a_number_is_not_available(value: object) -> None:
    assert fixed(value, 2) == signed(value, 2) == probability(value) == MISSING


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (1234.5, 2, "1,234.50"),
        (-0.5, 1, "−0.5"),
        (0.0, 4, "0.0000"),
        (3.2e-9, 4, "3.20e−09"),
        (1e9, 2, "1.00e+09"),
        (1e300, 4, "1.00e+300"),
        (123_456_789_012, 0, "123,456,789,012"),
    ],
)
def test_a_figure_is_never_wider_than_a_column(value: float, digits: int, shown: str) -> None:
    assert fixed(value, digits) == shown
    assert len(signed(value, digits)) <= 16


def test_amounts_keep_what_is_small_and_every_digit_before_the_point() -> None:
    small = {"cost": 0.00048, "core_hours": 0.012}
    assert amounts(small, "USD") == "USD 0.00048, 0.012 core hours"
    tiny = {"cost": 6.43e-05, "core_hours": 0.00017}
    assert amounts(tiny, "EUR") == "EUR 0.000064, 0.00017 core hours"
    large = {"cost": 3750.0, "gpu_hours": 1250.4, "core_hours": 99.6, "kwh": 3.21}
    assert amounts(large, "EUR") == "EUR 3,750.00, 1,250 GPU hours, 100 core hours, 3.2 kWh"
    gained = {"per_gained_bit": 0.25, "currency": "EUR", "gpu_hours_per_gained_bit": 250.0}
    assert per_gain(gained) == "EUR 0.25 per gained bit per byte"
    assert per_gain({"gpu_hours_per_gained_bit": 250.0}) == "250 GPU hours per gained bit per byte"


@pytest.mark.parametrize(
    ("text", "separated"),
    [
        ("The tower stands in Paris.", True),
        ("Die Straßenbahnhaltestelle ist alt.", True),
        ("Башня стоит в Париже.", True),
        ("탑은 파리에 서 있다.", True),
        ("मीनार पेरिस में है।", True),
        ("The sign says 出口, and nobody saw it.", True),
        ("塔位于巴黎。\n它很古老。", False),
        ("東京タワー は 古い です", False),
        ("หอคอยอยู่ในปารีส", False),
    ],
)
def test_words_are_counted_only_where_spaces_separate_them(text: str, separated: bool) -> None:
    assert separates_words(text) is separated
