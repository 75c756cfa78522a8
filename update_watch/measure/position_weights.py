"""What samples weigh, on the device: 1 / m of `positions`, for all rows that are measured together, from one number.

Where few cells carry all (an embedding of which a step uses few rows, words by their frequency under a rule that does not
normalise), cells are drawn by the size of their gradient and states, and weigh as much less as they are met more often:
sampling with unequal chances (Hansen and Hurwitz, Annals of Mathematical Statistics 14, 1943), one random number for all
draws of a step.

Legend: n rows (parameters), J cells of one set of samples, T turns, M cells to draw from, D draws.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from update_watch.measure.device import multi_gather
from update_watch.measure.positions import GOLDEN, SHARES, Positions, share
from update_watch.measure.sampling import Sampler

# turns worked out at once, by a dozen operators for all of them; where operators are launches, more of so many weights
_AHEAD, _AHEAD_AT_MOST, _AHEAD_ON_HOST, _WEIGHTS = 16, 64, 4, 2**19


_TO_DRAW_FROM = 2**18  # elements: squaring them takes a fifth of a millisecond
_NEWEST, _NEWEST_SQUARE = 0.1, 1e-3  # of the newest gradient in Adam's moments, at its usual betas
_SOME = 4  # every so manieth neighbour
_TINY = 1e-30
_BY_UPDATES = 0.8  # of what is not drawn evenly; the rest for what moves gradients and states
_EVENLY = 0.5  # of the draws: what a gradient of this step does not move is met as well, and no weight exceeds 2


class PositionWeights:
    """Weights of rows with two sets of samples, of which one is kept for a window. Rows read whole weigh 1 everywhere.

    `cell`: neighbours of one weight; K / 2 = J * cell.
    """

    def __init__(self, samplers: Sequence[Sampler], phase: int, device: torch.device, cell: int | None = None) -> None:
        """`cell`: where it is to be that of more rows; see `cell_of`."""
        half = samplers[0].samples // 2
        plans = [s.positions or Positions(half, 1, half, 1, 1) for s in samplers]  # of one offset: m is 1
        self.cell = cell_of(samplers) if cell is None else cell
        self._phase, self._device = phase, device
        facts = zip(*((max(p.block // self.cell, 1), p.blocks, p.room, p.step) for p in plans), strict=True)
        cell_J: Any
        columns: list[Any]
        if device.type == "cpu":  # by NumPy, whose operators cost less
            cell_J, columns = np.arange(half // self.cell), [np.array(own, np.int64)[:, None] for own in facts]
        else:
            cell_J, columns = torch.arange(half // self.cell, device=device), [column(own, device) for own in facts]
        per_block_n1, blocks_n1, room_n1, step_n1 = columns
        left_nJ = (cell_J // per_block_n1).clip(max=blocks_n1 - 1)  # blocks to the left
        right_nJ = blocks_n1 - 1 - left_nJ
        if device.type == "cpu":
            small = np.min_scalar_type(int(blocks_n1.max()))  # they are kept
            left_nJ, right_nJ = left_nJ.astype(small), right_nJ.astype(small)
        self._facts = room_n1, step_n1, left_nJ, right_nJ
        self._turns = _AHEAD
        if device.type == "cpu":
            self._turns = _AHEAD_ON_HOST
        elif multi_gather.is_available(device):
            self._turns = min(max(_WEIGHTS // left_nJ.numel(), _AHEAD), _AHEAD_AT_MOST)
        self._first = 0
        self._ahead_TnJ: Any = None

    def at(self, turn: int) -> Tensor:
        """[n, J] FP32: weights of a set at the positions of a turn."""
        if self._ahead_TnJ is None or not 0 <= turn - self._first < self._turns:
            self._first = turn
            self._ahead_TnJ = self._on_host(turn) if self._device.type == "cpu" else self._on_device(turn)
        weights: Tensor = torch.as_tensor(self._ahead_TnJ[turn - self._first])
        return weights

    def _on_device(self, first: int) -> Tensor:
        room_n1, step_n1, left_nJ, right_nJ = self._facts
        # no number of the host's becomes a tensor: the shares of `positions` are made on the device
        turn_T11 = torch.arange(first, first + self._turns, device=self._device).view(-1, 1, 1)
        share_T11 = turn_T11.mul_(GOLDEN).add_(self._phase).bitwise_and_(SHARES - 1)
        offset_Tn1 = (room_n1 * share_T11).bitwise_right_shift_(32)
        behind_Tn1 = (room_n1 - 1 - offset_Tn1).div_(step_n1, rounding_mode="floor")
        before_Tn1 = offset_Tn1.div_(step_n1, rounding_mode="floor")
        ways_TnJ = torch.minimum(before_Tn1, right_nJ).add_(torch.minimum(behind_Tn1, left_nJ)).add_(1)
        return ways_TnJ.to(torch.float32).reciprocal_()

    def _on_host(self, first: int) -> npt.NDArray[np.float32]:
        room_n1, step_n1, left_nJ, right_nJ = self._facts
        share_T11 = np.array([share(self._phase, first + t) for t in range(self._turns)], np.int64)[:, None, None]
        offset_Tn1 = room_n1 * share_T11 >> 32
        ways_TnJ = 1 + np.minimum(offset_Tn1 // step_n1, right_nJ)
        ways_TnJ += np.minimum((room_n1 - 1 - offset_Tn1) // step_n1, left_nJ)
        weights_TnJ: npt.NDArray[np.float32] = np.reciprocal(ways_TnJ.astype(np.float32))
        return weights_TnJ


class Normalised(NamedTuple):
    """What makes the updates of a rule that divides by a second moment, all in the parameter's layout."""

    grad: Tensor
    square: Tensor  # second moment
    mean: Tensor | None  # first moment; None: the gradient is divided

    def squares(self, sampler: Sampler, first: int, step: int) -> Tensor:
        """[M] by cells, of updates as the step is about to make them: near enough to draw by."""
        # neighbours are mostly of one row, whose second moments are alike: some of them tell
        grad, square = (sampler.cells(one, first, step)[:, ::_SOME].float() for one in self[:2])
        # where this gradient is the first for long, it makes most of both; in FP32 these are the training's own: nothing in place
        square = square.addcmul(grad, grad, value=_NEWEST_SQUARE)
        way = grad
        if self.mean is not None:
            way = sampler.cells(self.mean, first, step)[:, ::_SOME].float().abs().add(grad.abs(), alpha=_NEWEST)
        return way.square().div_(square.clamp_(min=_TINY)).sum(-1).nan_to_num_(0.0, 0.0, 0.0).double()


def draw(
    samplers: Sequence[Sampler],
    sized: Sequence[Tensor],
    sets: int,
    rng: random.Random,
    normalised: Normalised | None = None,
) -> Sequence[Tensor]:
    """Let the samplers of one parameter read cells drawn by the squares of some tensors of its layout, so many sets each;
    most of all by those of its updates, where a rule divides by a second moment: rows that were seldom touched move most then.

    Returns their weights, [D] FP32 for each sampler.
    """
    positions, (_, blocks, block) = samplers[0].positions, samplers[0].view_shape
    assert positions is not None
    cells, draws = len(samplers[0].cells(sized[0])), sets * blocks
    step = max(-(-cells * block // _TO_DRAW_FROM), 1)
    first = rng.randrange(step)
    sizes = [samplers[0].cells(one, first, step).double().square_().sum(-1).nan_to_num_(0.0, 0.0) for one in sized]
    even, left = 1 / len(sizes[0]), 1 - _EVENLY
    parts = [left / len(sizes)] * len(sizes)
    if normalised is not None:
        sizes.append(normalised.squares(samplers[0], first, step))
        parts = [part * (1 - _BY_UPDATES) for part in parts] + [left * _BY_UPDATES]
    share_M = torch.full_like(sizes[0], _EVENLY * even)
    for size_M, part in zip(sizes, parts, strict=True):
        total = size_M.sum()
        share_M.add_(torch.where(total > 0, size_M / total, even), alpha=part)
    at_D = torch.arange(draws * len(samplers), device=share_M.device, dtype=share_M.dtype)
    at_D = at_D.add_(rng.random()).div_(len(at_D))
    chosen_D = torch.searchsorted(share_M.cumsum(0), at_D).clamp_(max=len(share_M) - 1)
    for sampler, own_D in zip(samplers, torch.unflatten(chosen_D, 0, (-1, draws)), strict=True):
        sampler.drawn = own_D * step + first
    return torch.unflatten((step / cells / share_M[chosen_D]).float(), 0, (-1, draws)).unbind()


def cell_of(samplers: Sequence[Sampler]) -> int:
    """Neighbours of one weight, for all of these rows; 0 where all are read whole."""
    return math.gcd(*(s.positions.block for s in samplers if s.positions is not None))


def column(values: Sequence[int], device: torch.device) -> Tensor:
    """[n, 1] whole numbers on a device, made without a copy from the host: equal neighbours are filled in at once."""
    column_n1 = torch.zeros(len(values), 1, dtype=torch.int64, device=device)
    start = 0
    for value, alike in itertools.groupby(values):
        stop = start + len(list(alike))
        column_n1[start:stop].fill_(value)
        start = stop
    return column_n1
