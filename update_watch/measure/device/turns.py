"""How many tensors are measured in one step, and who takes turns.

Where a step's samples are gathered one tensor after another, up to 16 tensors are measured in every step, or as many as are
read whole and have no more than 8,192 elements together. More take turns, an eighth of them in a step (and no fewer than 8): the
cost of a step grows more slowly, and every tensor is still measured in an eighth of the steps. Where one launch gathers all of
them, every tensor is measured in every step, up to 512.

What a look costs a CPU is mostly its first tensor. So, where it can be told without a look that a step is like the others
(`gradient_pace`), half of the tensors are measured in two of as many steps as there would be turns (`panels`). Without that a
loss spike is missed with all of them: under plain SGD 238 of 1,320 verdicts of `bench/truth.py --only "sgd, 33"` were wrong.
Elsewhere it is somebody's turn in every step: how large its updates were is then known of those who sat it out
(`sums.missed_steps`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from update_watch.measure.device import multi_gather
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import local

_ALL = 16
_FEW = 8  # so many times the samples where the whole model has no more tensors than that: there is time for them
_ELEMENTS = 8192
_AT_LEAST = 8
MOST_TURNS = 8
_AT_ONCE = 512  # by one launch; the host still has to look at every address
_MOST_TURNS_OF_OPTIMIZERS = 16
# rows, and samples, of a step up to which tensors measured in every step are read in several rows
_MOST_ROWS, _MOST_READ = 32, 2**16
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


def shared_out(rows: Sequence[Row], turns: int) -> list[list[Row]]:
    """Each a fair part: every so manieth row. Of halves, of two rows of one shape one each: which, is drawn, since like places of a
    model's blocks come in turns of their own, and is always the same."""
    if turns != 2:
        return [list(rows[k::turns]) for k in range(turns)]
    coin, half_of, first_of = random.Random(0), [0] * len(rows), dict[torch.Size, int]()
    for i, row in enumerate(rows):
        first = first_of.pop(shape := local(row.param).shape, None)
        if first is None:
            first_of[shape], half_of[i] = i, coin.randrange(2)
        else:
            half_of[i] = 1 - half_of[first]
    return [[row for row, half in zip(rows, half_of, strict=True) if half == k] for k in (0, 1)]


def stretched(rows: list[Row], samples: int) -> list[Row]:
    """The rows, those of more elements than are sampled as several, as long as all together stay few: the small ones first,
    which are read whole; what is left goes to the others in equal parts. Where one launch reads all, each stays one row: it
    reads a tensor from its beginning.
    """
    left = min(_MOST_ROWS, _MOST_READ // samples) - len(rows)
    able = [row for row in rows if row.can_be_stretched and local(row.param).device.type == "cpu"]
    found = {id(row): [row] for row in rows}
    for i, row in enumerate(sorted(able, key=lambda row: local(row.param).numel())):
        whole = -(-local(row.param).numel() // samples)
        most = 1 + max(left, 0) // (len(able) - i)
        parts = row.stretches(samples, whole if whole <= 1 + left else most)
        found[id(row)] = parts
        left -= len(parts) - 1
    return [part for row in rows for part in found[id(row)]]
