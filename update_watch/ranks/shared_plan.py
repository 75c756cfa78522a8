"""One window's evidence of many ranks, joined: what is sent, how it adds up, how it is read.

All ranks agree on a `Plan` once: which tensors there are, and what their accumulators are called. From then on a rank's
window is a vector of FP64 numbers. The vectors of all ranks are added, and every rank makes the same evidence of the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from update_watch.evidence import TensorEvidence, WindowEvidence
from update_watch.ranks.weighted_means import (
    ACCUMULATOR_NUMBERS,
    PLACE_OF_ACCUMULATOR,
    PLACE_OF_TENSOR,
    TENSOR_NUMBERS,
    Means,
    elements_held,
    put_accumulator,
    put_histograms,
    put_tensor,
    read_accumulator,
    read_tensor,
)
from update_watch.report import HEADROOM_BINS, PLACES

Vector = npt.NDArray[np.float64]

_BINS = 2 * (1 + HEADROOM_BINS) + 1 + PLACES  # a weight before each histogram
Entry = dict[str, Any]  # a tensor in a catalogue: JSON
_Key = tuple[str, str, tuple[int, ...]]


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
            "low_states": t.low_states,
            "options": list(t.options),
            "reason": t.reason if elements_held(t) else "",
            "note": t.note,
            "steps_copy": t.steps_copy,
            "is_held": bool(elements_held(t) and t.optimizer_group),
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
    if not tensor.weight_decay or not elements_held(tensor) or tensor.dtype not in ("bfloat16", "float16"):
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
            self.length += 2 * len(TENSOR_NUMBERS) + _BINS + 2 * len(ACCUMULATOR_NUMBERS) * len(entry["accumulators"])

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
        for field in ("reason", "group", "note"):
            known[field] = known[field] or entry[field]
        known["accumulators"] = {**entry["accumulators"], **known["accumulators"]}

    def encode(self, evidence: WindowEvidence) -> Vector:
        """A rank's own part of the sum. Tensors that are not in the plan are left out."""
        values = [0.0] * self.length
        for tensor in evidence.tensors:
            entry = self._entries.get(_key_of(tensor))
            if entry is not None:
                means, bins, accumulators = self._parts(values, _key_of(tensor), entry)
                put_tensor(tensor, means)
                put_histograms(tensor, values, bins)
                if tensor.checksum is not None and tensor.part is not None:
                    ranks = self._replicas.get(_key_of(tensor), {}).get(tensor.part, [])
                    self._put_checksum(tensor.checksum, ranks, means)
                for name, part in accumulators.items():
                    if name in tensor.accumulators:
                        put_accumulator(tensor.accumulators[name], float(elements_held(tensor)), part)
        return np.array(values)

    def decode(self, vector: Vector, own: WindowEvidence) -> WindowEvidence:
        """The evidence of all ranks. `own`: this rank's, for what is the same on all."""
        tensors, values = [], vector.tolist()
        for key, entry in self._entries.items():
            means, bins, accumulators = self._parts(values, key, entry)
            if means.weight("present"):
                found = {
                    name: read_accumulator(name, entry["accumulators"][name], part)
                    for name, part in accumulators.items()
                    if part.weight("present")
                }
                tensor = read_tensor(self._names[key], entry, means, values[bins : bins + _BINS], found)
                if self._has_difference(key, means):
                    tensor = dataclasses.replace(tensor, replicas_differ=True)
                tensors.append(tensor)
        return dataclasses.replace(own, tensors=tuple(tensors))

    def _put_checksum(self, checksum: int, ranks: list[int], means: Means) -> None:
        """Terms that add up to 0 over the ranks that hold the same part, if their checksums are the same."""
        if len(ranks) > 1 and self._rank in ranks:
            is_first = self._rank == ranks[0]
            # another factor for each part, or two differences could cancel each other; all stays exact in FP64
            factor = 1 + ranks[0] % 1021
            means.put("difference", float(factor * checksum * (len(ranks) - 1 if is_first else -1)), 1.0)

    def _has_difference(self, key: _Key, means: Means) -> bool:
        expected = sum(len(ranks) for ranks in self._replicas.get(key, {}).values() if len(ranks) > 1)
        return expected > 0 and means.weight("difference") == expected and means.get("difference") != 0.0

    def _parts(self, values: list[float], key: _Key, entry: Entry) -> tuple[Means, int, dict[str, Means]]:
        """A tensor's means, where its histograms begin, and the means of its accumulators."""
        start = self._places[key]
        bins = start + 2 * len(TENSOR_NUMBERS)
        after = bins + _BINS
        size = 2 * len(ACCUMULATOR_NUMBERS)
        accumulators = {
            name: Means(PLACE_OF_ACCUMULATOR, values, after + i * size) for i, name in enumerate(entry["accumulators"])
        }
        return Means(PLACE_OF_TENSOR, values, start), bins, accumulators


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
