"""Kubernetes quantities, such as 16Gi or 500m."""

import re
from decimal import Decimal

UNITS = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1),
    **{unit: Decimal(1000) ** (power + 1) for power, unit in enumerate("kMGTPE")},
    **{f"{unit}i": Decimal(1024) ** (power + 1) for power, unit in enumerate("KMGTPE")},
}  # fmt: skip


def quantity(text: str) -> Decimal:
    """The number that a quantity stands for; 0 for other text."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text)
    return Decimal(match[1]) * UNITS.get(match[2], Decimal(1)) if match else Decimal(0)
