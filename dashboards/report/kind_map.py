"""The map of a model: kinds of tensors by depth. Each cell holds the tensors that stand there, experts together.

What a kind and a layer is, `update_watch.kinds` decides; here is only how they are laid out.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from update_watch.kinds import layer_label, tree_of
from update_watch.naming import kind_labels, members_by_kind

OUTSIDE = ""  # label of the column of what lies in no layer
MOST_ROWS = 26
MOST_COLUMNS = 96


class Cell(NamedTuple):
    row: int
    column: int
    members: tuple[int, ...]  # indices of its tensors


class KindMap(NamedTuple):
    rows: tuple[str, ...]  # labels of kinds, in the order of the model
    columns: tuple[str, ...]  # numbers of layers; OUTSIDE first where something lies in none
    cells: tuple[Cell, ...]

    @property
    def is_deep(self) -> bool:
        """Whether there are layers to tell apart."""
        return len(self.columns) > 1


def kind_map(names: Sequence[str]) -> KindMap:
    """The map of these tensors."""
    tree = tree_of(tuple(names))
    groups = members_by_kind(names)
    kinds, label_of = list(groups), kind_labels(groups)
    row_of = _rows({kind: len(members) for kind, members in groups.items()})
    present = [tree.layers[code] for code in np.unique(tree.layer_P).tolist()]
    layers = sorted(layer for layer in present if layer)
    column_of, columns = _columns(layers)
    if () in present:
        columns = [OUTSIDE, *columns]
        column_of = {layer: c + 1 for layer, c in column_of.items()}
        column_of[()] = 0
    row_K = np.array([row_of.get(kind, 0) for kind in tree.kinds], dtype=np.int64)
    column_L = np.array([column_of.get(layer, 0) for layer in tree.layers], dtype=np.int64)
    cell_P = row_K[tree.kind_P] * max(1, len(columns)) + column_L[tree.layer_P]
    order = np.argsort(cell_P, kind="stable")
    ends = np.flatnonzero(np.diff(cell_P[order])) + 1
    cells = [part.tolist() for part in np.split(order, ends)] if len(order) else []
    rows, sharing = [""] * (max(row_of.values(), default=-1) + 1), collections.Counter(row_of.values())
    for kind in kinds:
        row = row_of[kind]
        rows[row] = label_of[kind] if sharing[row] == 1 else f"{sharing[row]} other kinds"
    return KindMap(
        tuple(rows),
        tuple(columns),
        tuple(Cell(*divmod(int(cell_P[members[0]]), len(columns)), tuple(members)) for members in cells),
    )


def _rows(counts: Mapping[str, int]) -> dict[str, int]:
    """Kind -> row. Beyond MOST_ROWS kinds those with the fewest tensors share the last."""
    if len(counts) <= MOST_ROWS:
        return {kind: row for row, kind in enumerate(counts)}
    kept = set(sorted(counts, key=lambda kind: -counts[kind])[: MOST_ROWS - 1])
    own = {kind: row for row, kind in enumerate(kind for kind in counts if kind in kept)}
    return {kind: own.get(kind, MOST_ROWS - 1) for kind in counts}


def _columns(layers: Sequence[tuple[int, ...]]) -> tuple[dict[tuple[int, ...], int], list[str]]:
    """Layer -> column, and the columns' labels; very deep models have several layers a column."""
    size = max(1, -(-len(layers) // MOST_COLUMNS))
    # where the last number alone tells the layers apart (parts of a pipeline) it is enough
    is_last_enough = len({layer[-1] for layer in layers}) == len(layers)
    texts = [str(layer[-1]) if is_last_enough else layer_label(layer) for layer in layers]
    column_of = {layer: i // size for i, layer in enumerate(layers)}
    labels = []
    for k in range(0, len(texts), size):
        first, last = texts[k], texts[min(k + size, len(texts)) - 1]
        labels.append(first if first == last else f"{first}-{last}")
    return column_of, labels
