"""The map of a model: kinds of tensors by depth. Each cell holds the tensors that stand there, experts together.

What a kind and a layer is, `update_watch.kinds` decides; here is only how they are laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from update_watch.kinds import layer_label, places
from update_watch.naming import kind_labels

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
    found = places(names)
    kinds = list(dict.fromkeys(found[name].kind for name in names))
    label_of = kind_labels(kinds)
    row_of = _rows(kinds, [found[name].kind for name in names])
    layers = sorted({found[name].layer for name in names if found[name].layer})
    column_of, columns = _columns(layers)
    if any(not found[name].layer for name in names):
        columns = [OUTSIDE, *columns]
        column_of = {layer: c + 1 for layer, c in column_of.items()}
        column_of[()] = 0
    cells: dict[tuple[int, int], list[int]] = {}
    for i, name in enumerate(names):
        place = found[name]
        cells.setdefault((row_of[place.kind], column_of[place.layer]), []).append(i)
    rows = [""] * (max(row_of.values(), default=-1) + 1)
    for kind in kinds:
        row = row_of[kind]
        rows[row] = label_of[kind] if not rows[row] else f"{_sharing(row_of, row)} other kinds"
    return KindMap(
        tuple(rows), tuple(columns), tuple(Cell(r, c, tuple(members)) for (r, c), members in sorted(cells.items()))
    )


def _rows(kinds: Sequence[str], each: Sequence[str]) -> dict[str, int]:
    """Kind -> row. Beyond MOST_ROWS kinds those with the fewest tensors share the last."""
    if len(kinds) <= MOST_ROWS:
        return {kind: row for row, kind in enumerate(kinds)}
    counts = {kind: 0 for kind in kinds}
    for kind in each:
        counts[kind] += 1
    kept = set(sorted(kinds, key=lambda kind: -counts[kind])[: MOST_ROWS - 1])
    own = [kind for kind in kinds if kind in kept]
    return {kind: own.index(kind) if kind in kept else MOST_ROWS - 1 for kind in kinds}


def _sharing(row_of: dict[str, int], row: int) -> int:
    return sum(other == row for other in row_of.values())


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
