"""Rows for charts: thousands of tensors in a number of rows an eye can take in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from update_watch.kinds import places
from update_watch.naming import without_prefix


class Rows(NamedTuple):
    """Rows of a chart: a label and the indices of its tensors each."""

    by: str  # what a row is: "tensor", "layer", "kind"
    labels: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    prefix: str = ""  # left out of every label


def tensor_rows(names: Sequence[str], indices: Iterable[int] | None = None) -> Rows:
    """One row per tensor, all or those of `indices` in that order."""
    chosen = list(range(len(names)) if indices is None else indices)
    labels, prefix = without_prefix([names[i] for i in chosen])
    return Rows("tensor", tuple(labels), tuple((i,) for i in chosen), prefix)


def layer_rows(names: Sequence[str], layers: Sequence[str], limit: int) -> Rows:
    """One row per layer in order of appearance; where there are more than `limit`, per module above, or per stretch of layers."""
    paths = [(layer or name).split(".") for layer, name in zip(layers, names, strict=True)]
    deepest = max((len(path) for path in paths), default=1)
    finer: dict[str, list[int]] = {}
    for depth in range(deepest, 0, -1):
        groups: dict[str, list[int]] = {}
        for i, path in enumerate(paths):
            groups.setdefault(".".join(path[:depth]), []).append(i)
        if len(groups) <= limit:
            if finer and len(groups) * 2 < limit:
                break  # one step up says too little ("model.layers"): stretches of the finer ones say more
            labels, prefix = without_prefix(list(groups))
            return Rows("layer", tuple(labels), tuple(tuple(m) for m in groups.values()), prefix)
        finer = groups
    labels, prefix = without_prefix(list(finer))
    size = -(-len(labels) // max(1, limit))
    members = list(finer.values())
    stretches = range(0, len(labels), size)
    return Rows(
        "layer",
        tuple(_stretch(labels[k : k + size]) for k in stretches),
        tuple(tuple(i for m in members[k : k + size] for i in m) for k in stretches),
        prefix,
    )


def kind_rows(names: Sequence[str], limit: int) -> Rows:
    """One row per kind of tensor ("h.*.ln_1.weight"), the most frequent kept where there are more than `limit`, and the
    others together."""
    groups: dict[str, list[int]] = {}
    place_of = places(names)
    for i, name in enumerate(names):
        groups.setdefault(place_of[name].kind, []).append(i)
    if len(groups) > limit:
        ranked = sorted(groups, key=lambda kind: -len(groups[kind]))
        kept = set(ranked[: limit - 1])
        others = [i for kind in ranked[limit - 1 :] for i in groups[kind]]
        groups = {kind: members for kind, members in groups.items() if kind in kept}
        groups[f"{len(ranked) - len(kept)} other kinds"] = others
    labels, prefix = without_prefix(list(groups))
    return Rows("kind", tuple(labels), tuple(tuple(m) for m in groups.values()), prefix)


def _stretch(labels: Sequence[str]) -> str:
    first, last = labels[0], labels[-1]
    if first == last:
        return first
    shared = os.path.commonprefix([first, last])
    shared = shared[: shared.rfind(".") + 1]
    return f"{first} – {last[len(shared) :]}"
