"""What a window has shown of averages, on its way to the host and there."""

from __future__ import annotations

from typing import NamedTuple

from update_watch import formats
from update_watch.evidence import AccumulatorEvidence, Numbers
from update_watch.measure.transfer import Part

SUMS = 10  # dot, want, wanted, lost, looks, rounded looks, moved, gap^2 of all looks, moved over the window, rate of near copies
NEARLY_COPIED = 0.5  # rate of an update that takes more of the weight than it leaves of the average
_AVERAGES = 0.1  # and of one that averages
_WRITES = 2  # in a window, that moved nothing, from which on they are taken for updates that are lost
_HALVES = frozenset(str(dtype).removeprefix("torch.") for dtype in formats.HALVES)


class AverageWindow(NamedTuple):
    """One chunk's sums on their way to the host."""

    label: str
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    rate: float | None  # None: not known
    transfer: Part
    updates: int  # writes to the average that were seen
    counts: bool  # whether writes to it are counted
    begins_late: bool = False  # by design, and no write to it was seen so far


class UnreadWindow(NamedTuple):
    """Tensors of an average that cannot be read, with why."""

    label: str
    reasons: dict[str, str]  # name -> why


def read(window: AverageWindow | UnreadWindow) -> dict[str, AccumulatorEvidence]:
    """Evidence by tensor name. Runs on the background thread."""
    key = f"average:{window.label}"
    if isinstance(window, UnreadWindow):
        return {name: AccumulatorEvidence(key, "", Numbers(), reason=why) for name, why in window.reasons.items()}
    sums = window.transfer.wait().reshape(SUMS, len(window.names))
    found = {}
    for i, (name, dtype, size) in enumerate(zip(window.names, window.dtypes, window.sizes, strict=True)):
        dot, want, wanted, lost, looks, rounded, moved, gaps, has_moved, copied = (float(x) for x in sums[:, i])
        is_updated = bool(window.updates or moved or has_moved)
        reason, note, numbers = "", "", Numbers()
        if rounded and dtype == "float32":
            note = "rounded through BF16 weights, as by a swap for validation"
        if want > 0:
            # a decay that ramps up copies in the first few updates; one that does in nearly all is another than was said
            is_copy = window.rate is not None and window.rate <= _AVERAGES and copied >= NEARLY_COPIED * looks
            speed = copied / looks / window.rate if is_copy and window.rate else 1.0
            numbers = Numbers(
                efficiency=speed * dot / want, wanted_fraction=wanted / (size * looks), lost_fraction=lost / wanted
            )
        elif window.updates >= _WRITES and gaps > 0 and not (moved or has_moved) and dtype in _HALVES:
            numbers = Numbers(efficiency=0.0, lost_fraction=1.0)  # whatever its decay
        elif is_updated and gaps > 0 and window.rate is None:
            reason = f"its decay is not known; give it: averages={{{window.label!r}: (model, decay)}}"
        elif window.begins_late and not is_updated:
            reason = "it averages all weights alike, which begins late, and no update of it was seen so far"
        elif is_updated and not (window.updates or moved):
            reason = "it moved in this window, and no update of it was seen"
        found[name] = AccumulatorEvidence(
            key, dtype, numbers, reason="" if note else reason, rate=window.rate, note=note, is_updated=is_updated
        )
    return found
