"""A tensor's evidence as weighted means that add up over ranks, and back.

Every number is sent as a weighted mean: the sum of weights, and of weight x value. A ratio's weight is its denominator
times the elements of the tensor that lie on the rank: an efficiency weighs by the squared size of what was intended there,
a lost fraction by the wanted elements. So uneven shards weigh what they hold, empty ones nothing, and replicas, all
alike, do not change a mean: each one's other sample positions only sharpen it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from update_watch.evidence import AccumulatorEvidence, Numbers, TensorEvidence, median_headroom
from update_watch.report import HEADROOM_BINS, PLACES

_NOTHING = 1e-6  # what an empty shard weighs where it is asked for its steps
TENSOR_NUMBERS = (
    *("present", "frozen", "broken", "measured", "difference"),
    *("steps", "gradless_steps", "skipped_steps", "zero_gradient_fraction"),
    *("efficiency", "error", "displacement", "wanted", "lost", "weight", "path_weight"),
    *("changed", "intended", "applied", "stored"),
    *("lr", "lr_max", "lr_min", "weight_decay"),
    *("state_factor", "state_factor_steps", "displacement_evidence", "what_if", "movement_octaves"),
    *("lost_error", "update_ratio_error", "state_factor_error", "unseen_error"),
    *(
        "net",
        "net_error",
        "between",
        "moved",
        "unmoved",
        "undone",
        "travelled",
        "written_steps",
        "written_step",
        "written_every",
        "is_master",
        "is_at_zero",
        "may_be_zero",
        "is_one_sided",
        "touched",
        "is_put_back",
        "held_fraction",
        "is_alike",
        "may_be_alike",
        "requires_grad",
    ),
    *("gradient_looks", "gradient_blind", "gradient", "gradient_spread", "copy_changed", "copy_changed_window"),
)
ACCUMULATOR_NUMBERS = (
    *("present", "efficiency", "displacement", "wanted", "lost", "value", "updated"),
    *("growth.efficiency", "growth.wanted", "growth.lost", "decay.efficiency", "decay.wanted", "decay.lost"),
)


PLACE_OF_TENSOR = {name: 2 * i for i, name in enumerate(TENSOR_NUMBERS)}
PLACE_OF_ACCUMULATOR = {name: 2 * i for i, name in enumerate(ACCUMULATOR_NUMBERS)}


class Means:
    """Weighted means under names, in a part of a list of numbers: weight and weight x value of each."""

    __slots__ = ("_places", "_start", "_values")

    def __init__(self, places: Mapping[str, int], values: list[float], start: int) -> None:
        self._places, self._values, self._start = places, values, start

    def put(self, name: str, value: float | None, weight: float | None) -> None:
        if value is None or weight is None or not weight > 0 or not math.isfinite(value) or not math.isfinite(weight):
            return
        at = self._start + self._places[name]
        self._values[at] += weight
        self._values[at + 1] += weight * value

    def get(self, name: str) -> float | None:
        at = self._start + self._places[name]
        weight = self._values[at]
        return self._values[at + 1] / weight if weight > 0 else None

    def weight(self, name: str) -> float:
        return self._values[self._start + self._places[name]]


def elements_held(tensor: TensorEvidence) -> int:
    return tensor.numel if tensor.held is None else tensor.held


def _times(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


def put_tensor(t: TensorEvidence, means: Means) -> None:
    held = float(elements_held(t))
    means.put("present", 1.0, 1.0)
    means.put("frozen", float(not t.trainable), 1.0)
    means.put("broken", float(not t.finite), 1.0)
    if t.optimizer_group:
        for name in ("lr", "lr_max", "lr_min", "weight_decay"):
            means.put(name, getattr(t, name), 1.0)
        for name in ("steps", "gradless_steps", "skipped_steps"):
            means.put(name, float(getattr(t, name)), held or _NOTHING)
    if t.measured_steps:
        means.put("measured", float(t.measured_steps), held)
    n = t.numbers
    means.put("efficiency", n.efficiency, _times(n.weight, held))
    # samples of several ranks may err together: the error of a sum is at most the sum of errors
    means.put("error", n.efficiency_error, _times(n.weight, held))
    means.put("displacement", n.displacement_efficiency, _times(n.path_weight, held))
    means.put("wanted", n.wanted_fraction, held)
    wanted = _times(n.wanted_fraction, held)
    means.put("lost", n.lost_fraction, wanted)
    means.put("weight", n.weight, held)
    means.put("path_weight", n.path_weight, held)
    means.put("zero_gradient_fraction", t.zero_gradient_fraction, held)
    means.put("changed", t.changed_fraction, held)
    for name, ratio in (("intended", t.update_ratio), ("applied", t.applied_ratio)):
        size = _times(ratio, t.stored)
        means.put(name, _times(size, size), held)
    means.put("stored", _times(t.stored, t.stored), held)
    means.put("state_factor", t.state_factor, held)
    means.put("state_factor_steps", float(t.state_factor_steps), held if t.state_factor is not None else None)
    means.put("displacement_evidence", t.displacement_evidence, held)
    # ranks look at headroom in steps of their own, so at rates that differ by what the rate changes in a few steps
    octaves = math.log2(t.movement_lr) if t.movement_lr else None
    means.put("movement_octaves", octaves, _times(n.weight, held))
    means.put("what_if", (t.what_if or {}).get("bfloat16"), wanted)
    # of errors the mean as well: what several ranks sample may err together, and the error of a mean is at most that
    means.put("unseen_error", n.unseen_error, _times(n.weight, held))
    means.put("lost_error", n.lost_fraction_error, wanted)
    means.put("update_ratio_error", t.update_ratio_error, held)
    means.put("state_factor_error", t.state_factor_error, held)
    _put_ledger(t, means, held)


def _put_ledger(t: TensorEvidence, means: Means, held: float) -> None:
    """What was written to the model's own tensor, and the gradients beside it."""
    weight = _times(_or(t.numbers.path_weight, 1.0), held)
    means.put("net", t.net_efficiency, weight)
    means.put("net_error", t.net_efficiency_error, weight)
    means.put("undone", t.undone_fraction, weight)
    means.put("travelled", t.travelled, weight)
    for name, size in (("between", t.written_between), ("moved", t.moved), ("gradient", t.gradient_rms)):
        means.put(name, _times(size, size), held)
    means.put("unmoved", t.unmoved_fraction, held)
    means.put("is_master", float(t.is_master), 1.0)
    means.put("is_at_zero", float(t.is_at_zero), weight)
    means.put("may_be_zero", float(t.may_be_zero), weight)
    means.put("is_one_sided", float(t.is_one_sided), weight)
    means.put("touched", t.touched_fraction, weight)
    means.put("is_put_back", float(t.is_put_back), weight)
    means.put("held_fraction", t.held_fraction or 0.0, held)
    means.put("is_alike", float(t.is_alike), weight)
    means.put("may_be_alike", float(t.is_alike or t.may_be_alike), weight)
    means.put("requires_grad", float(t.requires_grad), 1.0)
    means.put("gradient_looks", float(t.gradient_looks), held)
    means.put("gradient_blind", float(t.gradient_blind), held)
    means.put("gradient_spread", t.gradient_spread, held)
    means.put("copy_changed", t.copy_changed, held)
    means.put("copy_changed_window", t.copy_changed_window, held)
    if t.written_step is not None:
        means.put("written_step", float(t.written_step), 1.0)
        means.put("written_steps", float(t.written_steps), 1.0)
        means.put("written_every", t.written_every, 1.0)


def put_histograms(t: TensorEvidence, values: list[float], start: int) -> None:
    """Of each its weight, then its bins: by number of wanted elements, and by movement."""
    held = float(elements_held(t))
    wanted, energy = _times(t.numbers.wanted_fraction, held), _times(t.numbers.weight, held)
    for weight, shares, length in (
        (wanted, t.headroom_histogram, HEADROOM_BINS),
        (energy, t.movement_histogram, HEADROOM_BINS),
        (energy, t.movement_places, PLACES),
    ):
        if shares is not None and weight and math.isfinite(weight):
            values[start] = weight
            values[start + 1 : start + 1 + length] = [weight * share for share in shares]
        start += 1 + length


def _histograms(values: Sequence[float]) -> list[tuple[float, ...] | None]:
    found: list[tuple[float, ...] | None] = []
    start = 0
    for length in (HEADROOM_BINS, HEADROOM_BINS, PLACES):
        weight, *bins = values[start : start + 1 + length]
        found.append(tuple(share / weight for share in bins) if weight > 0 else None)
        start += 1 + length
    return found


def put_accumulator(a: AccumulatorEvidence, held: float, means: Means) -> None:
    means.put("present", 1.0, 1.0)
    means.put("value", a.value, 1.0)
    means.put("updated", None if a.is_updated is None else float(a.is_updated), 1.0)
    means.put("displacement", a.numbers.displacement_efficiency, _times(_or(a.numbers.path_weight, 1.0), held))
    for prefix, n in (("", a.numbers), ("growth.", a.growth), ("decay.", a.decay)):
        wanted = _times(_or(n.wanted_fraction, 1.0), held)
        means.put(f"{prefix}efficiency", n.efficiency, wanted if n.weight is None else n.weight * held)
        means.put(f"{prefix}wanted", n.wanted_fraction, held)
        means.put(f"{prefix}lost", n.lost_fraction, wanted)


def _or(value: float | None, instead: float) -> float:
    return instead if value is None else value


def read_tensor(
    name: str,
    entry: Mapping[str, Any],
    means: Means,
    bins: Sequence[float],
    accumulators: Mapping[str, AccumulatorEvidence],
) -> TensorEvidence:
    histogram, movement, places = _histograms(bins)
    octaves = means.get("movement_octaves")
    headroom = None if histogram is None else median_headroom(histogram)
    lr, what_if = _setting(means.get("lr")), means.get("what_if")
    stored = _root(means.get("stored"))
    steps, gradless = means.get("steps") or 0.0, means.get("gradless_steps") or 0.0
    return TensorEvidence(
        name=name,
        dtype=entry["dtype"],
        numel=entry["numel"],
        names=tuple(entry["names"]),
        layer=entry["layer"],
        optimizer_group=entry["group"],
        shape=tuple(entry["shape"]),
        trainable=means.get("frozen") != 1.0,
        reason="" if means.weight("measured") else entry["reason"],
        note=entry["note"],
        steps_copy=entry["steps_copy"],
        steps=round(steps),
        measured_steps=max(round(means.get("measured") or 0.0), int(means.weight("measured") > 0)),
        # a gradient anywhere is a gradient
        gradless_steps=round(steps)
        if gradless >= steps * (1 - 1e-9)
        else min(round(gradless), max(round(steps) - 1, 0)),
        skipped_steps=round(means.get("skipped_steps") or 0.0),
        zero_gradient_fraction=means.get("zero_gradient_fraction"),
        finite=not means.get("broken"),
        numbers=Numbers(
            means.get("efficiency"),
            means.get("error"),
            means.get("displacement"),
            means.get("wanted"),
            means.get("lost"),
            means.get("weight"),
            means.get("path_weight"),
            means.get("lost_error"),
            unseen_error=means.get("unseen_error"),
        ),
        changed_fraction=means.get("changed"),
        update_ratio=_over(_root(means.get("intended")), stored),
        applied_ratio=_over(_root(means.get("applied")), stored),
        headroom_histogram=histogram,
        movement_histogram=movement,
        movement_places=places,
        movement_lr=None if octaves is None or movement is None else _setting(2.0**octaves),
        lr=lr,
        lr_max=_setting(means.get("lr_max")),
        lr_min=_setting(means.get("lr_min")),
        weight_decay=_setting(means.get("weight_decay")),
        critical_lr=lr * 2**-headroom if lr and headroom is not None else None,
        state_factor=means.get("state_factor"),
        state_factor_steps=round(means.get("state_factor_steps") or 0.0),
        scheme=entry["scheme"],
        low_states=entry["low_states"],
        options=tuple(entry["options"]),
        displacement_evidence=means.get("displacement_evidence"),
        accumulators=accumulators,
        what_if=None if what_if is None else {"bfloat16": what_if},
        stored=stored,
        requires_grad=means.get("requires_grad") != 0.0,
        update_ratio_error=means.get("update_ratio_error"),
        state_factor_error=means.get("state_factor_error"),
        net_efficiency=means.get("net"),
        net_efficiency_error=means.get("net_error"),
        written_between=_root(means.get("between")),
        undone_fraction=means.get("undone"),
        travelled=means.get("travelled"),
        written_steps=round(means.get("written_steps") or 0.0),
        written_step=None if (last := means.get("written_step")) is None else round(last),
        written_every=means.get("written_every"),
        moved=_root(means.get("moved")),
        unmoved_fraction=means.get("unmoved"),
        is_master=bool(means.get("is_master")),
        is_at_zero=(means.get("is_at_zero") or 0.0) > 1 - 1e-9,
        may_be_zero=(means.get("may_be_zero") or 0.0) > 1 - 1e-9,
        is_one_sided=(means.get("is_one_sided") or 0.0) > 1 - 1e-9,
        touched_fraction=means.get("touched"),
        is_put_back=(means.get("is_put_back") or 0.0) > 0.5,
        held_fraction=means.get("held_fraction") or None,
        is_alike=(is_alike := (means.get("is_alike") or 0.0) > 1 - 1e-9),
        may_be_alike=not is_alike and (means.get("may_be_alike") or 0.0) > 1 - 1e-9,
        gradient_looks=round(means.get("gradient_looks") or 0.0),
        gradient_blind=round(means.get("gradient_blind") or 0.0),
        gradient_rms=_root(means.get("gradient")),
        gradient_spread=means.get("gradient_spread"),
        copy_changed=means.get("copy_changed"),
        copy_changed_window=means.get("copy_changed_window"),
    )


def read_accumulator(name: str, entry: Mapping[str, Any], means: Means) -> AccumulatorEvidence:
    def part(prefix: str) -> Numbers:
        get: Callable[[str], float | None] = lambda field: means.get(prefix + field)  # noqa: E731
        return Numbers(get("efficiency"), wanted_fraction=get("wanted"), lost_fraction=get("lost"))

    numbers = part("")._replace(displacement_efficiency=means.get("displacement"))
    reason = "" if numbers.efficiency is not None else entry["reason"]
    value, note = means.get("value"), entry["note"]
    updated = means.get("updated")
    return AccumulatorEvidence(
        *(name, entry["dtype"], numbers, part("growth."), part("decay."), reason, entry["rate"], value),
        is_updated=None if updated is None else updated > 0,
        note=note,
    )


def _setting(value: float | None) -> float | None:
    """A setting that is the same on all ranks, without what adding and dividing left in its last digits."""
    return None if value is None else float(f"{value:.12g}")


def _root(value: float | None) -> float | None:
    return None if value is None else math.sqrt(value)


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
