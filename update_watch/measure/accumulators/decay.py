"""Does weight decay arrive? Its part of the update is found by replaying a step with it and without it.

Done in the stored format, where an optimizer that rounds decay on its own loses all of it, and one that joins it with the
gradient's part keeps it on average; and in FP32, which says what was meant. Rare: a few steps of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from update_watch import formats
from update_watch.replay.twin import GroupSettings, Run, Twin


class Decayed(NamedTuple):
    """FP32 samples of some parameters before a step, as one run, and how they are stored."""

    run: Run  # not overwritten
    dtype: torch.dtype  # of the weights
    state_dtypes: dict[str, torch.dtype]
    rows: int


def decay_sums(twin: Twin, steps: Sequence[Decayed], settings: GroupSettings | None = None) -> Tensor:
    """[5, rows]: <applied, intended>, <intended, intended>, wanted, lost, expected changes of the decay alone, per row.

    Of all rows of all `steps`, whose weights are stored in one format. Values are in units of the largest intended decay of
    a row.
    """
    dtype, samples = steps[0].dtype, steps[0].run.param.numel() // steps[0].rows
    results: dict[tuple[torch.dtype, bool], Tensor] = {}
    for kind in (torch.float32, dtype):
        for with_decay in (True, False):
            copies = [
                Run(
                    step.run.group,
                    step.run.param.to(kind, copy=True),
                    None if step.run.grad is None else step.run.grad.to(kind, copy=True),
                    {name: _copied(value, name, kind, step.state_dtypes) for name, value in step.run.state.items()},
                )
                for step in steps
            ]
            changes: dict[str, Any] | None = None if with_decay else {"weight_decay": 0.0}
            found = twin.replay(copies, changes, settings)
            results[kind, with_decay] = torch.cat([run.param.view(-1, samples) for run in found]).float()
    intended = results[torch.float32, True] - results[torch.float32, False]
    applied = results[dtype, True] - results[dtype, False]
    largest = intended.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest.reciprocal(), 1.0)
    d, a = intended * unit, applied * unit
    wanted = d.ne(0).float()
    # a decay below one step of the format should show as a change of that share of the elements
    fmt = formats.of(dtype)
    assert fmt is not None
    start = torch.cat([step.run.param.view(-1, samples) for step in steps]).float()
    expected = (intended.abs() / (2 * fmt.half_gap(start, intended))).clamp_max(1.0)
    return torch.stack([a * d, d * d, wanted, wanted * a.eq(0), expected]).sum(-1)


def _copied(value: Any, name: str, kind: torch.dtype, state_dtypes: dict[str, torch.dtype]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if name in state_dtypes:  # read in FP64 where other rows are of FP32
        return value.to(kind if kind is torch.float32 else state_dtypes[name], copy=True)
    return value.clone()
