"""How numbers and names are written in sentences, wherever the sentence is made."""

from __future__ import annotations

_NAMES = 8  # of tensors, in a sentence


def size(count: int) -> str:
    """Bytes for people: "1.5 MB" (units of 1000)."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    return f"{count} B" if unit == "B" else f"{amount:.3g} {unit}"


def listed(names: tuple[str, ...], most: int = _NAMES) -> str:
    """Names for a sentence, the rest counted."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
