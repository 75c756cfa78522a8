"""Does weight decay arrive? Its part of the update is found by replaying a step with it and without it.

Done in the stored format, where an optimizer that rounds decay on its own loses all of it, and one that joins it with the
gradient's part keeps it on average; and in FP32, which says what was meant. Rare: a few steps of a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from update_watch import formats
from update_watch.replay.twin import GroupSettings, Run, Twin


def decay_sums(
    twin: Twin,
    group: int,
    dtype: torch.dtype,
    run: Run,
    state_dtypes: dict[str, torch.dtype],
    rows: int,
    settings: GroupSettings | None = None,
) -> Tensor:
    """[5, rows]: <applied, intended>, <intended, intended>, wanted, lost, expected changes of the decay alone, per row.

    `run`: FP32 samples of `rows` parameters before the step; it is not overwritten. Values are in units of the
    largest intended decay of a row.
    """
    results: dict[tuple[torch.dtype, bool], Tensor] = {}
    for kind in (torch.float32, dtype):
        for with_decay in (True, False):
            copy = Run(
                group,
                run.param.to(kind, copy=True),
                None if run.grad is None else run.grad.to(kind, copy=True),
                {name: _copied(value, name, kind, state_dtypes) for name, value in run.state.items()},
            )
            changes: dict[str, Any] | None = None if with_decay else {"weight_decay": 0.0}
            results[kind, with_decay] = twin.replay([copy], changes, settings)[0].param.float().view(rows, -1)
    intended = results[torch.float32, True] - results[torch.float32, False]
    applied = results[dtype, True] - results[dtype, False]
    largest = intended.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest.reciprocal(), torch.ones_like(largest))
    d, a = intended * unit, applied * unit
    wanted = d.ne(0).float()
    # a decay below one step of the format should show as a change of that share of the elements
    fmt = formats.of(dtype)
    assert fmt is not None
    start = run.param.float().view(rows, -1)
    expected = (intended.abs() / (2 * fmt.half_gap(start, intended))).clamp_max(1.0)
    sums = ((a * d), (d * d), wanted, wanted * a.eq(0), expected)
    return torch.stack([part.sum(-1) for part in sums])


def _copied(value: Any, name: str, kind: torch.dtype, state_dtypes: dict[str, torch.dtype]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if name in state_dtypes and kind is not torch.float32:
        return value.to(state_dtypes[name], copy=True)
    return value.clone()
