"""Numbers for tables: never wider than a column, and a small number is never shown as zero."""

import math
from decimal import Decimal
from typing import Any

MISSING = "not available"
LARGE = 1e9
"""From here on, and below the last digit, a figure is written with an exponent."""


def finite(value: Any) -> bool:
    """Whether ``value`` is a number that can be shown or plotted."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def fixed(value: Any, digits: int = 0) -> str:
    """``1,234.50``, ``1.23e+12`` or ``4.5e−07``; a count, which has no digits, is complete."""
    return _written(value, digits, "")


def signed(value: Any, digits: int = 0) -> str:
    """The same with a sign: ``+1.50`` or ``−1.50``."""
    return _written(value, digits, "+")


def probability(value: Any) -> str:
    """Three decimals; more for small values, and never 1 or 0 for a value that is neither."""
    if not finite(value):
        return MISSING
    if 0.9995 <= value < 1:
        return f"{value:.6f}" if value < 0.9999995 else "> 0.999999"
    if value >= 0.01 or value == 0:
        return f"{value:.3f}"
    return f"{value:.5f}" if value >= 1e-4 else f"{value:.1e}".replace("-", "−")


def _written(value: Any, digits: int, sign: str) -> str:
    if not finite(value):
        return MISSING
    size = abs(value)
    is_count = isinstance(value, int)
    if not is_count and (size >= LARGE or 0 < size < 0.5 * 10.0**-digits):
        return f"{value:{sign}.2e}".replace("-", "−")
    return f"{value:{sign},.{digits}f}".replace("-", "−")


def significant(value: float, digits: int = 2) -> str:
    """``0.000012``, ``3.2`` or ``1,250``: a few significant digits, every digit of an integer, and
    no exponent."""
    rounded = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e+" in rounded else f"{Decimal(rounded):f}"


def money(value: float, currency: str) -> str:
    """``USD 1.20``; more decimals for less than half a cent."""
    return f"{currency} {value:,.2f}" if value >= 0.005 else f"{currency} {significant(value)}"


def amounts(spent: dict[str, Any], currency: str) -> str:
    """``USD 1.20, 0.012 core hours``: what was used, without what is zero or unknown."""
    parts = [money(spent["cost"], currency)] if currency and spent.get("cost") else []
    for key, unit in (("gpu_hours", "GPU hours"), ("core_hours", "core hours"), ("kwh", "kWh")):
        if value := spent.get(key):
            parts.append(f"{significant(value)} {unit}")
    return ", ".join(parts)


def per_gain(cost: dict[str, Any]) -> str:
    """The cost of one bit per byte gained, in money or hours; empty without a gain."""
    if value := cost.get("per_gained_bit"):
        return f"{money(value, cost.get('currency', ''))} per gained bit per byte"
    for key, unit in (
        ("gpu_hours_per_gained_bit", "GPU hours"),
        ("core_hours_per_gained_bit", "core hours"),
    ):
        if value := cost.get(key):
            return f"{significant(value)} {unit} per gained bit per byte"
    return ""
