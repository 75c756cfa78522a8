"""Gradients that are looked at as a whole: of rows of which all that was sampled was 0.

Samples say nothing of rows of an embedding that no token used, and turns nothing of the steps in between. Only all elements
in all steps prove that no gradient comes, so such rows are looked at in every step, by an operator or two for all of them, as
far as their elements are few beside the model's. Of more than that, in the steps in which headroom is looked at.

Legend: n rows (parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from update_watch.measure.sampling import local
from update_watch.measure.sums.device_sums import DeviceSums
from update_watch.measure.sums.error_bars import Array

_SHARE, _LEAST = 1 / 64, 2**16  # of the model's elements, and how many at least, that may be looked at in every step
_LATE = 0.1  # of a window's steps: the last window's numbers arrive in the first steps of this one


class WholeGradients:
    """Of the rows of some sums. `are_sampled`: rows that are not read whole; at first their gradients are looked at once."""

    def __init__(self, params: Sequence[Tensor], are_sampled: Sequence[bool]) -> None:
        self._params = list(params)
        self._sizes = [local(param).numel() for param in params]
        self._most = max(int(_SHARE * sum(self._sizes)), _LEAST)
        self._first = {i for i, is_sampled in enumerate(are_sampled) if is_sampled}
        self._told: dict[int, frozenset[int]] = {}  # by the cohort's first row
        self._version = self._seen = 0
        self._every: list[int] = []  # rows looked at in every step
        self._others: frozenset[int] = frozenset()  # suspected too, but too large for that together with them
        self._places: list[Tensor] = []
        self._of: DeviceSums | None = None  # whose places those are
        self.open_window()

    def open_window(self) -> None:
        """Start counting anew."""
        self.steps = 0
        self.looks_n: Array = np.zeros(len(self._params))

    def suspect(self, start: int, rows: frozenset[int]) -> None:
        """Of a cohort, whose first row is `start`: look at these from now on. May be called from another thread."""
        self._told[start] = frozenset(start + i for i in rows)
        self._version += 1

    def look(self, give: Callable[[], DeviceSums]) -> None:
        """In every step that is looked at, before the rule runs. `give`: the sums, if there is anything to add to them."""
        self.steps += 1
        if self._seen != self._version:
            self._seen = self._version
            self._choose()
        if not self._every:
            return
        sums = give()
        if self._of is not sums:
            self._of, self._places = sums, [sums.views["touched_n"][i] for i in self._every]
        grads, places = [], []
        for i, place in zip(self._every, self._places, strict=True):
            grad = self._gradient(i)
            if isinstance(grad, Tensor):
                grads.append(grad)
                places.append(place)
            if grad is not False:  # that there is none is known as well
                self.looks_n[i] += 1
        if grads:
            torch._foreach_add_(places, torch._foreach_norm(grads, torch.inf))

    def look_at(self, rows: slice, sums: DeviceSums) -> None:
        """In a step in which the headroom of some rows is looked at."""
        for i in range(rows.start, rows.stop):
            if i in self._others or i in self._first:
                grad = self._gradient(i)
                if isinstance(grad, Tensor):
                    sums.views["touched_n"][i].add_(grad.any())
                    self.looks_n[i] += 1
        self._first.difference_update(range(rows.start, rows.stop))

    def blind(self, rows: slice, measured: int | Array) -> Array:
        """[n] steps that were looked at in which nobody saw a row's gradient, though it could have been; `measured`: in which
        its samples were read. Of rows too large to be looked at in every step none: nothing more will be known."""
        blind_n = self.steps - np.maximum(self.looks_n[rows], measured)
        blind_n[blind_n <= _LATE * self.steps] = 0.0
        for i in self._others:
            if rows.start <= i < rows.stop:
                blind_n[i - rows.start] = 0.0
        return blind_n

    def _choose(self) -> None:
        """Those that are looked at in every step: the small ones first, so that the fewest are left out."""
        suspected = sorted(set().union(*self._told.values()), key=self._sizes.__getitem__)
        self._every, left = [], self._most
        for i in suspected:
            left -= self._sizes[i]
            if left < 0:
                break
            self._every.append(i)
        self._others, self._of = frozenset(suspected) - {*self._every}, None

    def _gradient(self, i: int) -> Tensor | bool | None:
        """A row's gradient; None where there is none, False where it cannot be looked at."""
        grad = self._params[i].grad
        if grad is None:
            return None
        grad = local(grad)
        return grad if grad.layout is torch.strided and not grad.is_complex() and grad.numel() else False
