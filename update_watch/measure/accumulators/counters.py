"""Step counters in a format too short to count on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from update_watch import formats
from update_watch.evidence import AccumulatorEvidence, Numbers
from update_watch.measure.parameters import Row
from update_watch.odd_tensors import unreadable


def short_counters(row: Row, state: Mapping[str, Any]) -> dict[str, AccumulatorEvidence]:
    """Read at the end of a window, where they are on the CPU."""
    counters = {}
    for name, value in state.items():
        if (
            isinstance(value, Tensor)
            and value.dtype in formats.HALVES
            and row.rule.forms.get(name) == "scalar"
            and not unreadable(value)
            and value.numel() == 1
            and value.device.type == "cpu"
        ):
            dtype = str(value.dtype).removeprefix("torch.")
            counters[name] = AccumulatorEvidence(name, dtype, Numbers(), value=float(value))
    return counters
