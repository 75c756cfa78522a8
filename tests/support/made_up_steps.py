"""Steps of made-up numbers, added up by one way of summing or another."""

from __future__ import annotations

import torch
from torch import Tensor

from update_watch.formats import ALL, BF16, FP32
from update_watch.measure.sums.added_steps import AddedSteps, Look, Slot
from update_watch.measure.sums.device_sums import DeviceSums
from update_watch.measure.sums.kernel_sums import KernelSums, Kind
from update_watch.measure.sums.layout import GROUPS, PARTS
from update_watch.measure.sums.packing import Reach, packed
from update_watch.measure.sums.window_sums import WindowSums

CPU = torch.device("cpu")
STATES, N, K = 2, 3, 18

KINDS = {
    "all-whole": Kind(STATES, K, 0, torch.float32, False, True, True),
    "sampled": Kind(STATES, K, 3, torch.float32, False, False, True),  # cells of 3 neighbours
    "both-in-fp64": Kind(1, 16, 2, torch.float64, True, True, True),
    "no-states-no-way": Kind(0, 16, 8, torch.float32, True, False, False),
}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def added(
    kind: Kind, way: type[DeviceSums], planted: float | None = None, masked: bool = True, turns: int = 1
) -> list[Tensor]:
    """A few steps in turns: of rows 0 and 1, of row 2 and once more of both; the first two in full."""
    whole_n1 = torch.tensor([[True], [False], [False]]) if kind.has_whole else None
    sums = kind.sums(way, N, whole_n1, CPU)
    places = [(slice(0, 2), 0, 0), (slice(2, 3), PARTS - 1, 1), (slice(0, 2), 0, GROUPS - 1)]
    for turn in range(turns):
        slots, rows = [], 0
        for place, part, group in places:
            slots.append(Slot(place, rows, part, group))
            rows = slots[-1].stop
        shape = 1 + kind.states, rows, kind.samples
        before_ARK = noise(*shape, seed=turn).to(kind.dtype)
        before_ARK[0, [0, *range(2, rows)]] = before_ARK[0, [0, *range(2, rows)]].bfloat16().to(kind.dtype)
        before_ARK[:, :, 3] = 0.0
        before_ARK[:, :, 4] = 2.0  # the gap towards 0 is smaller
        intended_ARK = before_ARK + 3e-3 * noise(*shape, seed=10 + turn).to(kind.dtype)
        intended_ARK[:, :, 5:8] = before_ARK[:, :, 5:8]  # nothing is wanted
        intended_ARK[0, :, 8] = 3e4
        after_RK = intended_ARK[0].bfloat16().to(kind.dtype)
        states_SRK = intended_ARK[1:, :3].bfloat16().to(kind.dtype) if kind.states else None
        gradient_RK = noise(rows, kind.samples, seed=20 + turn).to(kind.dtype)
        gradient_RK[:, ::3] = 0.0
        mask_RK = torch.ones(rows, kind.samples) if masked else None
        if mask_RK is not None:
            mask_RK[1, 9:] = 0.0  # a small tensor
            mask_RK[4] = 0.0  # no gradient
            intended_ARK[:, 4] = torch.nan  # what is behind a mask may be anything
        if planted is not None:
            intended_ARK[0, 0, 2] = gradient_RK[2, 1] = planted
        weights_R2J = 1 / (1 + noise(rows, 2, kind.cells, seed=30 + turn).abs()) if kind.cells else None
        looks = [Look(slice(0, 1), BF16, 0.75 * turn), Look(slice(1, 2), FP32, 0.0)]
        looks += [Look(slice(2, 3), ALL[1 + 2 * turn], -1.5)]
        whole_R1 = None
        if whole_n1 is not None:
            whole_R1 = torch.cat([whole_n1[slot.rows] for slot in slots])
        given = before_ARK, intended_ARK, after_RK, states_SRK, gradient_RK, mask_RK, weights_R2J
        sums.add(AddedSteps(*given, slots, looks, slots[:2], whole_R1))
    stored_nK = noise(N, sums.kept, seed=40).bfloat16().float()
    kept_weights_nJ = 1 / (1 + noise(N, kind.cells, seed=41).abs()) if kind.cells else None
    reaches = [Reach(slice(0, 1), BF16, 2.0), Reach(slice(1, 2), ALL[1], 1.5)]  # the third one was not measured
    window = PARTS, stored_nK if masked else None, kept_weights_nJ, reaches
    vector = sums.packed(*window) if isinstance(sums, KernelSums) else packed(sums, *window)
    arrays = vars(WindowSums.unpack(vector.numpy(), sums.layout(PARTS))).values()
    whole = torch.cat([torch.from_numpy(array).flatten() for array in arrays if array is not None])
    found = [whole, sums.way_G2nK, sums.state_way_2SnK]
    return found if sums.elements_2nK is None else [*found, sums.elements_2nK]
