"""One window's evidence of many ranks, joined: what is sent, how it adds up, how it is read.

All ranks agree on a `Plan` once: which tensors there are, and what their accumulators are called. From then on a rank's
window is a vector of FP64 numbers. The vectors of all ranks are added, and every rank makes the same evidence of the sum.

Every number is sent as a weighted mean: the sum of weights, and of weight x value. A ratio's weight is its denominator
times the elements of the tensor that lie on the rank: an efficiency weighs by the squared size of what was intended there,
a lost fraction by the wanted elements. So uneven shards weigh what they hold, empty ones nothing, and replicas, all
alike, do not change a mean: each one's other sample positions only sharpen it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from update_watch.evidence import AccumulatorEvidence, Numbers, TensorEvidence, WindowEvidence, median_headroom
from update_watch.report import HEADROOM_BINS

Vector = npt.NDArray[np.float64]
Entry = dict[str, Any]  # a tensor in a catalogue: JSON
_Key = tuple[str, str, tuple[int, ...]]

_NOTHING = 1e-6  # what an empty shard weighs where it is asked for its steps
_TENSOR = (
    *("present", "frozen", "broken", "measured", "difference"),
    *("steps", "gradless_steps", "skipped_steps", "zero_gradient_fraction"),
    *("efficiency", "error", "displacement", "wanted", "lost", "weight", "path_weight"),
    *("changed", "intended", "applied", "stored"),
    *("lr", "lr_max", "lr_min", "weight_decay"),
    *("state_factor", "state_factor_steps", "displacement_evidence", "what_if"),
)
_ACCUMULATOR = (
    *("present", "efficiency", "displacement", "wanted", "lost", "value"),
    *("growth.efficiency", "growth.wanted", "growth.lost", "decay.efficiency", "decay.wanted", "decay.lost"),
)


_PLACE_OF_TENSOR = {name: 2 * i for i, name in enumerate(_TENSOR)}
_PLACE_OF_ACCUMULATOR = {name: 2 * i for i, name in enumerate(_ACCUMULATOR)}


class _Means:
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


def catalogue(evidence: WindowEvidence) -> list[Entry]:
    """What a rank says of its tensors when the plan is made. Plain data for JSON."""
    return [
        {
            "name": t.name,
            "names": list(t.names),
            "layer": t.layer,
            "dtype": t.dtype,
            "shape": list(t.shape),
            "numel": t.numel,
            "group": t.optimizer_group,
            "scheme": t.scheme,
            "reason": t.reason if _held(t) else "",
            "is_held": bool(_held(t) and t.optimizer_group),
            "is_plain": t.held is None,
            "part": t.part,
            "accumulators": _foreseen(t)
            | {
                name: {"dtype": a.dtype, "reason": a.reason, "rate": a.rate, "note": a.note}
                for name, a in t.accumulators.items()
            },
        }
        for t in evidence.tensors
    ]


def _foreseen(tensor: TensorEvidence) -> dict[str, Any]:
    """Decay is reported once enough of it was to be seen, at another window for each tensor: one plan is made for all."""
    if not tensor.weight_decay or not _held(tensor) or tensor.dtype not in ("bfloat16", "float16"):
        return {}
    return {"weight_decay": {"dtype": tensor.dtype, "reason": "", "rate": None, "note": ""}}


class Plan:
    """Which number of the vector means what. The same on all ranks."""

    def __init__(self, catalogues: Iterable[list[Entry]] = (), rank: int = 0) -> None:
        """`catalogues`: by rank. `rank`: this one."""
        self._rank = rank
        self._entries: dict[_Key, Entry] = {}
        self._replicas: dict[_Key, dict[str, list[int]]] = {}  # tensor -> part -> ranks that hold it
        for holder, entries in enumerate(catalogues):
            for entry in entries:
                self._add(entry, holder)
        for entry in self._entries.values():
            if len(set(entry["pieces"])) > 1:
                entry["numel"] = sum(entry["pieces"])
                entry["shape"] = [entry["numel"]]
        self._names = _distinct_names(list(self._entries))
        self._places: dict[_Key, int] = {}
        self.length = 0
        for key, entry in self._entries.items():
            self._places[key] = self.length
            self.length += 2 * len(_TENSOR) + 1 + HEADROOM_BINS + 2 * len(_ACCUMULATOR) * len(entry["accumulators"])

    def __len__(self) -> int:
        return len(self._entries)

    def _add(self, entry: Entry, rank: int) -> None:
        if entry["part"] is not None:
            self._replicas.setdefault(_key(entry), {}).setdefault(entry["part"], []).append(rank)
        known = self._entries.get(_key(entry))
        if known is None:
            self._entries[_key(entry)] = {
                **entry,
                "accumulators": dict(entry["accumulators"]),
                "pieces": [entry["numel"]],
            }
            return
        known["pieces"].append(entry["numel"])
        if entry["is_held"] and not known["is_held"]:  # who holds elements of it knows more of it
            known.update({k: v for k, v in entry.items() if k != "accumulators"})
        for field in ("reason", "group"):
            known[field] = known[field] or entry[field]
        known["accumulators"] = {**entry["accumulators"], **known["accumulators"]}

    def encode(self, evidence: WindowEvidence) -> Vector:
        """A rank's own part of the sum. Tensors that are not in the plan are left out."""
        values = [0.0] * self.length
        for tensor in evidence.tensors:
            entry = self._entries.get(_key_of(tensor))
            if entry is not None:
                means, bins, accumulators = self._parts(values, _key_of(tensor), entry)
                _put_tensor(tensor, means)
                _put_histogram(tensor, values, bins)
                if tensor.checksum is not None and tensor.part is not None:
                    ranks = self._replicas.get(_key_of(tensor), {}).get(tensor.part, [])
                    self._put_checksum(tensor.checksum, ranks, means)
                for name, part in accumulators.items():
                    if name in tensor.accumulators:
                        _put_accumulator(tensor.accumulators[name], float(_held(tensor)), part)
        return np.array(values)

    def decode(self, vector: Vector, own: WindowEvidence) -> WindowEvidence:
        """The evidence of all ranks. `own`: this rank's, for what is the same on all."""
        tensors, values = [], vector.tolist()
        for key, entry in self._entries.items():
            means, bins, accumulators = self._parts(values, key, entry)
            if means.weight("present"):
                found = {
                    name: _read_accumulator(name, entry["accumulators"][name], part)
                    for name, part in accumulators.items()
                    if part.weight("present")
                }
                tensor = _read_tensor(self._names[key], entry, means, values[bins : bins + 1 + HEADROOM_BINS], found)
                if self._has_difference(key, means):
                    tensor = dataclasses.replace(tensor, replicas_differ=True)
                tensors.append(tensor)
        return dataclasses.replace(own, tensors=tuple(tensors))

    def _put_checksum(self, checksum: int, ranks: list[int], means: _Means) -> None:
        """Terms that add up to 0 over the ranks that hold the same part, if their checksums are the same."""
        if len(ranks) > 1 and self._rank in ranks:
            is_first = self._rank == ranks[0]
            # another factor for each part, or two differences could cancel each other; all stays exact in FP64
            factor = 1 + ranks[0] % 1021
            means.put("difference", float(factor * checksum * (len(ranks) - 1 if is_first else -1)), 1.0)

    def _has_difference(self, key: _Key, means: _Means) -> bool:
        expected = sum(len(ranks) for ranks in self._replicas.get(key, {}).values() if len(ranks) > 1)
        return expected > 0 and means.weight("difference") == expected and means.get("difference") != 0.0

    def _parts(self, values: list[float], key: _Key, entry: Entry) -> tuple[_Means, int, dict[str, _Means]]:
        """A tensor's means, where its histogram begins, and the means of its accumulators."""
        start = self._places[key]
        bins = start + 2 * len(_TENSOR)
        after = bins + 1 + HEADROOM_BINS
        size = 2 * len(_ACCUMULATOR)
        accumulators = {
            name: _Means(_PLACE_OF_ACCUMULATOR, values, after + i * size)
            for i, name in enumerate(entry["accumulators"])
        }
        return _Means(_PLACE_OF_TENSOR, values, start), bins, accumulators


def _key(entry: Entry) -> _Key:
    return _key_from(entry["name"], entry["dtype"], tuple(entry["shape"]), entry["is_plain"])


def _key_of(tensor: TensorEvidence) -> _Key:
    return _key_from(tensor.name, tensor.dtype, tensor.shape, tensor.held is None)


def _key_from(name: str, dtype: str, shape: tuple[int, ...], is_plain: bool) -> _Key:
    # plain vectors of one name and different lengths: FSDP1 gives every rank a flat piece of the parameter
    return name, dtype, (-1,) if is_plain and len(shape) == 1 else shape


def _distinct_names(keys: list[_Key]) -> dict[_Key, str]:
    """Tensors of one name that differ between ranks are told apart by shape."""
    count: dict[str, int] = {}
    for name, _, _ in keys:
        count[name] = count.get(name, 0) + 1
    return {k: k[0] if count[k[0]] == 1 else f"{k[0]} ({k[1]} {'x'.join(map(str, k[2]))})" for k in keys}


def _held(tensor: TensorEvidence) -> int:
    return tensor.numel if tensor.held is None else tensor.held


def _times(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


def _put_tensor(t: TensorEvidence, means: _Means) -> None:
    held = float(_held(t))
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
    means.put("what_if", (t.what_if or {}).get("bfloat16"), wanted)


def _put_histogram(t: TensorEvidence, values: list[float], start: int) -> None:
    """The weight, then the bins."""
    wanted = _times(t.numbers.wanted_fraction, float(_held(t)))
    if t.headroom_histogram is not None and wanted:
        values[start] = wanted
        values[start + 1 : start + 1 + HEADROOM_BINS] = [wanted * share for share in t.headroom_histogram]


def _put_accumulator(a: AccumulatorEvidence, held: float, means: _Means) -> None:
    means.put("present", 1.0, 1.0)
    means.put("value", a.value, 1.0)
    means.put("displacement", a.numbers.displacement_efficiency, _times(_or(a.numbers.path_weight, 1.0), held))
    for prefix, n in (("", a.numbers), ("growth.", a.growth), ("decay.", a.decay)):
        wanted = _times(_or(n.wanted_fraction, 1.0), held)
        means.put(f"{prefix}efficiency", n.efficiency, wanted if n.weight is None else n.weight * held)
        means.put(f"{prefix}wanted", n.wanted_fraction, held)
        means.put(f"{prefix}lost", n.lost_fraction, wanted)


def _or(value: float | None, instead: float) -> float:
    return instead if value is None else value


def _read_tensor(
    name: str, entry: Entry, means: _Means, bins: Sequence[float], accumulators: Mapping[str, AccumulatorEvidence]
) -> TensorEvidence:
    histogram = tuple(share / bins[0] for share in bins[1:]) if bins[0] > 0 else None
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
        ),
        changed_fraction=means.get("changed"),
        update_ratio=_over(_root(means.get("intended")), stored),
        applied_ratio=_over(_root(means.get("applied")), stored),
        headroom_histogram=histogram,
        lr=lr,
        lr_max=_setting(means.get("lr_max")),
        lr_min=_setting(means.get("lr_min")),
        weight_decay=_setting(means.get("weight_decay")),
        critical_lr=lr * 2**-headroom if lr and headroom is not None else None,
        state_factor=means.get("state_factor"),
        state_factor_steps=round(means.get("state_factor_steps") or 0.0),
        scheme=entry["scheme"],
        displacement_evidence=means.get("displacement_evidence"),
        accumulators=accumulators,
        what_if=None if what_if is None else {"bfloat16": what_if},
        stored=stored,
    )


def _read_accumulator(name: str, entry: Entry, means: _Means) -> AccumulatorEvidence:
    def part(prefix: str) -> Numbers:
        get: Callable[[str], float | None] = lambda field: means.get(prefix + field)  # noqa: E731
        return Numbers(get("efficiency"), wanted_fraction=get("wanted"), lost_fraction=get("lost"))

    numbers = dataclasses.replace(part(""), displacement_efficiency=means.get("displacement"))
    reason = "" if numbers.efficiency is not None else entry["reason"]
    value, note = means.get("value"), entry["note"]
    return AccumulatorEvidence(
        name, entry["dtype"], numbers, part("growth."), part("decay."), reason, entry["rate"], value, note
    )


def _setting(value: float | None) -> float | None:
    """A setting that is the same on all ranks, without what adding and dividing left in its last digits."""
    return None if value is None else float(f"{value:.12g}")


def _root(value: float | None) -> float | None:
    return None if value is None else math.sqrt(value)


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
