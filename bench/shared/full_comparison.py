"""All elements of all tensors in FP64, beside a training: what a sampled number is held against.

Elementwise rules are applied to all tensors laid end to end, so that hundreds of small tensors cost as little as one large.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.shared.exact_rules import ELEMENTWISE, WHOLE_TENSOR


@dataclasses.dataclass(frozen=True)
class Exact:
    """One tensor over some steps; sums, which add, and the numbers that come of them."""

    dot: float = 0.0  # <applied, intended>
    want: float = 0.0  # <intended, intended>
    size: float = 0.0  # <before, before>
    wanted: float = 0.0  # elements that FP32 would have moved, over steps
    lost: float = 0.0  # of those, the ones whose stored value did not change
    nonzero: float = 0.0  # elements with a gradient, over steps
    path: float = 0.0  # <sum of applied, sum of intended> of the window
    meant: float = 0.0  # <sum of intended, sum of intended> of the window

    def __add__(self, other: Exact) -> Exact:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Exact(*(a + b for a, b in zip(mine, others, strict=True)))

    @property
    def efficiency(self) -> float | None:
        return self.dot / self.want if self.want > 0 else None

    @property
    def lost_fraction(self) -> float | None:
        return self.lost / self.wanted if self.wanted else None

    @property
    def displacement_efficiency(self) -> float | None:
        """Of one window; of several, the mean weighted by what was meant in each."""
        return self.path / self.meant if self.meant > 0 else None

    @property
    def update_ratio(self) -> float | None:
        return math.sqrt(self.want / self.size) if self.size > 0 else None


class FullComparison:
    """Surround every step of the optimizers: `with comparison.step(): ...`; a window is closed by `close_window()`.

    `rules` names the rule of each optimizer. Every parameter must have a gradient in every step.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], optimizers: Sequence[Any], rules: Sequence[str]
    ) -> None:
        names = {id(p): name for name, p in named}
        self._parts = [
            _Part([p for group in o.param_groups for p in group["params"]], o, rule)
            for o, rule in zip(optimizers, rules, strict=True)
        ]
        self._names = [[names[id(p)] for p in part.params] for part in self._parts]

    @contextmanager
    def step(self) -> Iterator[None]:
        for part in self._parts:
            part.before()
        yield
        for part in self._parts:
            part.after()

    def close_window(self) -> dict[str, Exact]:
        """By name, of the steps since the last call."""
        found = {}
        for part, names in zip(self._parts, self._names, strict=True):
            found.update(zip(names, part.close(), strict=True))
        return found


class _Part:
    """One optimizer's parameters, laid end to end."""

    def __init__(self, params: list[nn.Parameter], optimizer: Any, rule: str) -> None:
        self.params, self._optimizer, self._rule = params, optimizer, rule
        self._lengths = [p.numel() for p in params]
        count = torch.tensor(self._lengths)
        self._owner = torch.repeat_interleave(torch.arange(len(params)), count)
        self._clear()

    def _clear(self) -> None:
        total = sum(self._lengths)
        self._sums = torch.zeros(6, len(self.params), dtype=torch.float64)
        self._meant = torch.zeros(total, dtype=torch.float64)
        self._moved = torch.zeros(total, dtype=torch.float64)

    def before(self) -> None:
        self._before = _flat(self.params)
        grads = [p.grad for p in self.params]
        if any(grad is None for grad in grads):
            raise ValueError("FullComparison: a parameter has no gradient; give it one of zeros")
        self._gradient = _flat([grad for grad in grads if grad is not None])
        self._intended = self._rule_of_all()

    def _rule_of_all(self) -> Tensor:
        states = [self._optimizer.state.get(p, {}) for p in self.params]
        (group,) = self._optimizer.param_groups
        if self._rule in ELEMENTWISE:
            joined = {
                name: value if value.dim() == 0 else _flat([state[name] for state in states])
                for name, value in states[0].items()
                if isinstance(value, Tensor)
            }
            return ELEMENTWISE[self._rule](self._before, self._gradient, joined, group)
        rule, parts = WHOLE_TENSOR[self._rule], []
        for p, w, g, state in zip(
            self.params, self._before.split(self._lengths), self._gradient.split(self._lengths), states, strict=True
        ):
            parts.append(rule(w.view(p.shape), g.view(p.shape), state, group).flatten())
        return torch.cat(parts)

    def after(self) -> None:
        applied, d = _flat(self.params) - self._before, self._intended
        # what would not move even in FP32 is not lost by the format
        wanted = (self._before + d).float() != self._before
        products = (
            applied * d,
            d * d,
            self._before.square(),
            wanted.double(),
            (wanted & (applied == 0)).double(),
            (self._gradient != 0).double(),
        )
        for row, product in zip(self._sums, products, strict=True):
            row.index_add_(0, self._owner, product)
        self._meant += d
        self._moved += applied

    def close(self) -> list[Exact]:
        ends = torch.zeros(2, len(self.params), dtype=torch.float64)
        ends[0].index_add_(0, self._owner, self._moved * self._meant)
        ends[1].index_add_(0, self._owner, self._meant.square())
        found = [Exact(*column) for column in torch.cat([self._sums, ends]).T.tolist()]
        self._clear()
        return found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """End to end, in FP64; copied."""
    return torch.cat([t.detach().double().flatten() for t in tensors])
