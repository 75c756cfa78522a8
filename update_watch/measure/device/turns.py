"""How many tensors are measured in one step, and who takes turns.

Where a step's samples are gathered one tensor after another, up to 16 tensors are measured in every step, or as many as are
read whole and have no more than 8,192 elements together. More take turns, an eighth of them in a step (and no fewer than 8): the
cost of a step grows more slowly, and every tensor is still measured in an eighth of the steps. Where one launch gathers all of
them, every tensor is measured in every step, up to 512.

It is somebody's turn in every step: how large its updates were is then known of those who sat it out (`sums.missed_steps`).
To look at all in one step of eight would cost a CPU a third less, and misses a loss spike with all of them: under plain SGD 238 of
1,320 verdicts of `bench/truth.py --only "sgd, 33"` were wrong then, now none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from update_watch.measure.device import multi_gather

_ALL = 16
_FEW = 8  # so many times the samples where the whole model has no more tensors than that: there is time for them
_ELEMENTS = 8192
_AT_LEAST = 8
MOST_TURNS = 8
_AT_ONCE = 512  # by one launch; the host still has to look at every address
_MOST_TURNS_OF_OPTIMIZERS = 16
_SHADOWED = 4  # optimizers whose states are compared with FP32 ones


def samples_for(asked: int, tensors: int, largest: int) -> int:
    """Elements looked at per tensor of a model of so many, of which the largest of an optimizer has so many; an even number."""
    return min(asked * (_FEW if tensors <= _ALL else 1), max(largest + largest % 2, 2))


def turns_of(sizes: Sequence[int], samples: int, device: torch.device) -> int:
    """In how many steps the tensors of one optimizer on `device`, of these sizes, are measured once."""
    tensors = len(sizes)
    if multi_gather.is_available(device):
        return math.ceil(tensors / _AT_ONCE)
    if tensors <= _ALL or (max(sizes) <= samples and sum(sizes) <= _ELEMENTS):
        return 1
    return min(MOST_TURNS, math.ceil(tensors / _AT_LEAST))


def turns_of_optimizers(optimizers: int, tensors: int) -> tuple[int, int]:
    """In how many of its steps each of so many optimizers, of so many tensors together, is measured once; and every how
    manieth has its states compared with FP32 ones.

    With one optimizer per parameter, stepped in the backward pass, hundreds of optimizers make one step.
    """
    few = tensors <= _ALL or optimizers <= _AT_LEAST
    turns = 1 if few else min(_MOST_TURNS_OF_OPTIMIZERS, math.ceil(tensors / _AT_LEAST))
    return turns, math.ceil(optimizers / _SHADOWED)
