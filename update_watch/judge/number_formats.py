"""What the judge knows of number formats, by the names that evidence calls them."""

from __future__ import annotations

FULL = frozenset({"float32", "float64"})
# significant bits, the hidden one included: a value x loses x * c to rounding for all c <= 2^-(bits + 1), and for
# some x up to 2^-bits
SIGNIFICANT_BITS = {
    "bfloat16": 8,
    "float16": 11,
    "float32": 24,
    "float64": 53,
    "float8_e4m3fn": 4,
    "float8_e4m3fnuz": 4,
    "float8_e5m2": 3,
    "float8_e5m2fnuz": 3,
}


def smallest_rate(dtype: str) -> float | None:
    """1 - beta from which on every stored value can decay."""
    bits = SIGNIFICANT_BITS.get(dtype)
    return 2.0**-bits if bits is not None and bits < 24 else None
