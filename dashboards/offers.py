"""Which cures a run is offered, and what they cost there: for the page and the terminal, from one window's columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from update_watch.cures import Cure, cures_for, extra_bytes
from update_watch.dashboards.frame import NO_CODE, Floats, Frame
from update_watch.dashboards.verdict import Verdict

HALVES = ("bfloat16", "float16")
_OF_FEW = (Cure.fp32_states, Cure.fp32_average)  # are for the tensors that have it, the others for all that train
_BESIDE = ("weight_decay", "grad")


class Offer(NamedTuple):
    cure: Cure
    bytes: int  # of memory, more than now


def offers_of(frame: Frame, verdict: Verdict) -> tuple[Offer, ...]:
    """What fits the worst group of a verdict; empty where nothing of it is a matter of precision."""
    group = verdict.groups[0] if verdict.groups else None
    if group is None or group.cause is None:
        return ()
    table = frame.table
    is_half = _is_half(table.dtype)
    whole = np.flatnonzero(is_half & np.array(table.trainable, dtype=bool))
    members = np.array(group.members, dtype=np.intp)
    if not len(whole):
        return ()
    states, sizes = _low_states(frame), np.array(table.numel, dtype=object)  # whole numbers without a limit
    found = []
    for cure in cures_for(group.cause.value, set(map(table.options.__getitem__, group.members))):
        places = members[is_half[members]] if cure in _OF_FEW else whole
        # of tensors with as many states together
        cost = sum(
            extra_bytes(cure, int(sizes[places[states[places] == count]].sum()), int(count))
            for count in np.unique(states[places]).tolist()
        )
        found.append(Offer(cure, cost))
    return tuple(found)


def _is_half(dtypes: Sequence[str]) -> NDArray[np.bool_]:
    return np.fromiter(map(frozenset(HALVES).__contains__, dtypes), dtype=bool, count=len(dtypes))


def _low_states(frame: Frame) -> Floats:
    """States in 16 bits of each tensor, (P,); early journals do not say it: what was measured of them counts."""
    said = frame.tensors.numbers["low_states"]
    seen = np.zeros(len(frame.table.name))
    for name, columns in frame.accumulators.items():
        if name not in _BESIDE and not name.startswith("average:"):
            seen += _is_half(columns.dtype) & (columns.health != NO_CODE)
    found: Floats = np.where(np.isnan(said), seen, said)
    return found
