"""Rows of charts: one per tensor where they are few, else one per kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from update_watch.naming import cut_middle, kind_labels, members_by_kind, without_prefix

_LETTERS = 34  # of a label


class Rows(NamedTuple):
    """Rows of a chart: a label and the indices of its tensors each."""

    by: str  # what a row is: "tensor", "kind"
    labels: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]


def tensor_rows(names: Sequence[str]) -> Rows:
    """One row per tensor; what all names share is left out."""
    labels, _ = without_prefix(names)
    return Rows(
        "tensor", tuple(cut_middle(label, _LETTERS) for label in labels), tuple((i,) for i in range(len(names)))
    )


def kind_rows(names: Sequence[str], limit: int) -> Rows:
    """One row per kind of tensor in the order of the model, the most frequent kept where there are more than `limit`, and
    the others together."""
    groups = members_by_kind(names)
    label_of = kind_labels(groups)
    named = {
        kind: label_of[kind] if len(members) == 1 else f"{label_of[kind]} ×{len(members):,}"
        for kind, members in groups.items()
    }
    if len(groups) > limit:
        ranked = sorted(groups, key=lambda kind: -len(groups[kind]))
        kept = set(ranked[: limit - 1])
        others = [i for kind in ranked[limit - 1 :] for i in groups[kind]]
        groups = {kind: members for kind, members in groups.items() if kind in kept}
        rest = f"{len(ranked) - len(kept)} other kinds"
        groups[rest], named[rest] = others, rest
    return Rows("kind", tuple(named[kind] for kind in groups), tuple(tuple(m) for m in groups.values()))
