"""A layers-by-steps grid of bounded size: what a heatmap of a run of any length is drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping


class LayerGrid:
    """Smallest value per layer and span of windows.

    Every window is a column of its own at first. When all `columns` are used, neighbours are joined two by two
    and every further column spans twice as many windows. The smallest value of a span is kept, so that a short
    stall stays visible.

    Args:
        columns: the largest number of columns, an even number.
    """

    def __init__(self, columns: int = 64) -> None:
        self.columns = columns
        self.spans: list[tuple[int, int]] = []  # of each column: the step before its first, and its last
        self._cells: list[dict[str, float]] = []  # layer -> value, per column
        self._span = 1  # windows a full column holds
        self._held = 0  # windows in the last column

    def add(self, begin: int, step: int, values: Mapping[str, float | None]) -> None:
        """Add a window of the steps after `begin` up to and with `step`."""
        known = {layer: v for layer, v in values.items() if v is not None and math.isfinite(v)}
        if self.spans and self._held < self._span:
            self.spans[-1] = (self.spans[-1][0], step)
            self._cells[-1] = _join(self._cells[-1], known)
            self._held += 1
            return
        if len(self.spans) == self.columns:
            self._halve()
        self.spans.append((begin, step))
        self._cells.append(known)
        self._held = 1

    def rows(self) -> list[list[str | int | float]]:
        """`[layer, begin, step, value]` for every known cell, layers in the order in which they appeared."""
        layers = list(dict.fromkeys(layer for column in self._cells for layer in column))
        return [
            [layer, begin, step, column[layer]]
            for layer in layers
            for (begin, step), column in zip(self.spans, self._cells, strict=False)
            if layer in column
        ]

    def _halve(self) -> None:
        self._cells = [_join(a, b) for a, b in zip(self._cells[::2], self._cells[1::2], strict=False)]
        self.spans = [(a[0], b[1]) for a, b in zip(self.spans[::2], self.spans[1::2], strict=False)]
        self._span *= 2


def _join(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {layer: min(first.get(layer, math.inf), second.get(layer, math.inf)) for layer in {**first, **second}}
