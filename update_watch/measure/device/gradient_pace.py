"""How large a step's gradients are beside those of the steps before, read from the host's memory before the rule runs.

Where nobody is measured in most steps, their updates are taken to be as large as those of the last one that was. That fails
where a single batch has gradients of another size (a loss spike): under plain SGD the step is as much larger. So a few elements
of a few gradients are read in every step. Only on the host, where that waits for nothing.

Legend: M tensors, E elements of each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from update_watch.measure.device import host_memory
from update_watch.measure.sampling import is_dense, local

_TENSORS, _RUNS, _RUN = 8, 8, 4  # elements are read in runs of neighbours
_FIRST = 8  # steps until it is known what is usual
_NEWEST = 1 / 8  # weight of the newest step in that,
_MOST = 4.0  # which counts as no more octaves above it: one of infinite gradients would hide all others
_UNLIKE = 1.0  # octaves above the usual,
# and so many more after each step that was asked for, which are given back in other steps. So at most a tenth is asked for, and of
# steps that are all unlike each other the largest: the others are met often enough in the steps that are drawn
_RISE, _FALL = 0.5, 0.5 / 9

_HALF = np.uint16  # the upper half of a number: sign, exponent, and what is left of the mantissa
# of a format: halves of a number, the octaves' lowest bit in the upper one
_FORMATS = {torch.bfloat16: (1, 7), torch.float16: (1, 10), torch.float32: (2, 7)}
_MAGNITUDE = _HALF(0x7FFF)


class GradientPace:
    """Of up to M tensors of one format, a fair part of an optimizer's."""

    def __init__(self, params: Sequence[Tensor], rng: random.Random) -> None:
        """`params`: strided ones of one format on the host, of no fewer elements than are read."""
        shards = [local(param) for param in params]
        self._params = [(param, shard.stride(), shard.numel()) for param, shard in zip(params, shards, strict=True)]
        self._dtype = shards[0].dtype
        size = self._dtype.itemsize
        begins = [
            [int((run + rng.random()) * (shard.numel() - _RUN) / _RUNS) * size for run in range(_RUNS)]
            for shard in shards
        ]
        self._places = host_memory.at(np.array(begins, np.int64))  # of each run, from a tensor's beginning
        self._size = _RUN * size
        self._is_sharded = any(shard is not param for shard, param in zip(shards, params, strict=True))
        self._halves, bits = _FORMATS[self._dtype]
        self._octave = float(1 << bits)
        self._usual: dict[int, float] = {}  # of each tensor the usual median, as its bits
        self._unlike = _UNLIKE
        self._steps = 0

    @classmethod
    def of(cls, params: Sequence[Tensor], rng: random.Random) -> GradientPace | None:
        """None where they cannot be read from the host's memory."""
        if not host_memory.is_available():
            return None
        alike: dict[torch.dtype, list[Tensor]] = {}
        for param in params:
            shard = local(param)
            if (
                shard.dtype in _FORMATS
                and host_memory.can_read(shard)
                and shard.numel() >= _RUNS * _RUN
                and is_dense(shard)
            ):
                alike.setdefault(shard.dtype, []).append(param)
        able = max(alike.values(), key=len, default=[])
        count = min(len(able), _TENSORS)
        return cls([able[k * len(able) // count] for k in range(count)], rng) if count else None

    def is_unlike(self) -> bool:
        """In every step, once its gradients are final: whether they are much larger than usual, or it is not known yet what is.

        The logarithm of a number is the line between its bits and itself, to 0.09 octaves; medians ask for no sums. Of each
        tensor by what is usual for it: tensors differ by more than steps do, and not all have a gradient in each.
        """
        self._steps += 1
        there, grads, addresses = [], [], []
        for i, (param, stride, numel) in enumerate(self._params):
            grad = param.grad
            if grad is not None and self._is_sharded:
                grad = local(grad)
            if grad is None or grad.dtype is not self._dtype:
                continue
            # of another length it may be shorter
            if grad.stride() == stride and grad.numel() == numel and host_memory.can_read(grad):
                there.append(i)
                grads.append(grad)  # held until it has been read
                addresses.append(grad.data_ptr())
        if not there:
            return False
        places = self._places if len(there) == len(self._params) else self._places[there]
        read = host_memory.read(np.array(addresses, np.int64)[:, None] + places, self._size)
        bits_ME = read.view(_HALF)[:, self._halves - 1 :: self._halves] & _MAGNITUDE
        bits_ME.partition(_RUNS * _RUN // 2, 1)
        above, most, usual = [], _MOST * self._octave, self._usual
        # a few numbers: by arrays it would take twice as long
        for i, now in zip(there, bits_ME[:, _RUNS * _RUN // 2].tolist(), strict=True):
            if not now:
                continue  # most of its elements are 0
            before = usual.setdefault(i, now)
            above.append(min(now - before, 2 * most))  # what has blown up is so in all later steps
            usual[i] = before + _NEWEST * min(now - before, most)
        self._unlike = max(self._unlike - _FALL, _UNLIKE)
        if not above or self._steps <= _FIRST:
            return bool(above)
        above.sort()
        if above[len(above) // 2] <= self._unlike * self._octave:
            return False
        self._unlike += _RISE + _FALL
        return True
