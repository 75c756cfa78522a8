"""A window's sums made ready to leave the device; on the CPU that is done by the thread that reads them.

Legend as in `device_sums`; J cells of a set of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from update_watch.formats import Format
from update_watch.measure.sums.device_sums import DeviceSums
from update_watch.measure.sums.layout import GROUPS


class Reach(NamedTuple):
    """Neighbouring rows of one format, and the window's steps by those in which they were measured."""

    rows: slice
    format: Format
    scale: float


def packed(
    sums: DeviceSums,
    parts: int,
    stored_nK: Tensor | None,
    kept_weights_nJ: Tensor | None,
    reaches: Sequence[Reach],
) -> Tensor:
    """All sums in one vector on the device, of so many parts; `window_sums.WindowSums` reads it on the host.

    `stored`: the kept samples' last values, FP32, to tell by `reaches` which summed updates exceed half a gap.
    `kept_weights`: of the kept set; None: 1.
    """
    views = sums.views
    if sums.kept:
        weights_nK = _kept_weights(sums, kept_weights_nJ)
        way_G2nK = sums.way_G2nK.to(sums.dtype)
        weighted_GnK = way_G2nK[:, 0] if weights_nK is None else way_G2nK[:, 0] * weights_nK
        for g in range(GROUPS):
            torch.sum(way_G2nK[g].unsqueeze(1) * weighted_GnK, -1, out=sums.products_2GGn[:, g])
        total_2nK = way_G2nK.sum(0)
        xy_2nK = weighted_GnK.sum(0) * total_2nK
        y_nC, x_nC = torch.unflatten(xy_2nK, -1, (_cells(sums, kept_weights_nJ), -1)).sum(-1)
        torch.sum(torch.stack([x_nC * x_nC, x_nC * y_nC, y_nC * y_nC]), -1, out=views["cells_3n"])
        if stored_nK is not None:
            for rows, fmt, scale in reaches:
                far_nK = total_2nK[0, rows].float() * scale
                reached_nK = far_nK.abs() >= fmt.half_gap(stored_nK[rows], far_nK)
                views["evidence_n"][rows] = (reached_nK & far_nK.ne(0)).sum(-1)
        state_way_2SnK = sums.state_way_2SnK.to(sums.dtype)
        torch.sum(state_way_2SnK * state_way_2SnK[1], -1, out=views["state_way_2Sn"])
    if sums.elements_2nK is not None:
        dot_nK, want_nK = sums.elements_2nK
        torch.sum(sums.elements_2nK * dot_nK, -1, out=views["elements_3n"][:2])
        torch.sum(want_nK.square(), -1, out=views["elements_3n"][2])
    return sums.vector[: sums.layout(parts).spans()["parts_PFn"].stop]


def _kept_weights(sums: DeviceSums, weights_nJ: Tensor | None) -> Tensor | None:
    """[n, K] of the kept samples."""
    if weights_nJ is None:
        return None
    both = 1 if sums.whole_n1 is None else 2  # of rows read whole both halves are kept
    cells = weights_nJ.repeat(1, both)
    kept = sums.kept
    weights_nK = cells.unsqueeze(-1).expand(*cells.shape, kept // cells.shape[1]).reshape(sums.rows, kept)
    if sums.whole_n1 is not None:
        # the moving half of rows that are sampled is at other positions in every step
        weights_nK[:, kept // 2 :].mul_(sums.whole_n1.to(weights_nK.dtype))
    return weights_nK


def _cells(sums: DeviceSums, weights_nJ: Tensor | None) -> int:
    """Cells of neighbours among the kept samples."""
    if weights_nJ is None:
        return sums.samples
    return weights_nJ.shape[1] * (1 if sums.whole_n1 is None else 2)
