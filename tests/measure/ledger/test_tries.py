"""What writes did to elements that steps had moved: the sums against a plain loop over the same steps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from update_watch.measure.ledger.blocks import ELEMENTS
from update_watch.measure.ledger.sheet_sums import COLUMNS, SheetSums

N, STEPS = 3, 23
TRIES = ("tries", "rewritten", "put_back", "passed")


def steps(seed: int) -> Tensor:
    """[STEPS, 2, N, E] of a grid, of a part that is held, and of noise; written after some steps."""
    drawn = torch.Generator().manual_seed(seed)
    held = torch.randn(N, ELEMENTS, generator=drawn)
    read = torch.empty(STEPS, 2, N, ELEMENTS)
    first = held.clone()
    for t in range(STEPS):
        if int(torch.randint(3, (1,), generator=drawn)):
            held[0] = (held[0] * 16).round() / 16
            held[1, :8] = first[1, :8]
            held[2, 3] = 0.0
            held[2, 7:10] += 0.2 * torch.randn(3, generator=drawn)
        read[t, 0] = held
        held = held + 0.05 * torch.randn(N, ELEMENTS, generator=drawn)
        held[0, 5] = read[t, 0, 0, 5]  # no step moves it
        read[t, 1] = held
    return read


def counted(read: Tensor, gaps: Sequence[int]) -> list[list[int]]:
    """[4][N] by one element after the other."""
    found = [[0] * N for _ in TRIES]
    for row in range(N):
        put: list[float] | None = None
        for t in range(1, STEPS):
            now, ended = read[t, 0, row].tolist(), read[t - 1, 1, row].tolist()
            if t in gaps or now == ended:
                continue
            for e in range(ELEMENTS) if put is not None else ():
                is_low, is_high = now[e] == min(now) and now[e] > ended[e], now[e] == max(now) and now[e] < ended[e]
                is_at_bound = now[e] != ended[e] and (now[e] == 0 or is_low or is_high)
                if put is None or ended[e] == put[e] or is_at_bound:
                    continue
                found[0][row] += 1
                found[1][row] += now[e] != ended[e]
                found[2][row] += now[e] == put[e]
                found[3][row] += abs(now[e] - ended[e]) > abs(ended[e] - put[e])
            put = now
    return found


@pytest.mark.parametrize("cuts", [(), (8, 16), (1, 2, 9)], ids=str)
@pytest.mark.parametrize("gap", [None, 10])
def test_each_write_is_compared_with_the_one_before_it(cuts: tuple[int, ...], gap: int | None) -> None:
    read = steps(len(cuts))
    sums = SheetSums(N, False, torch.float32, slice(0, N), torch.device("cpu"))
    ends = [0, *cuts, STEPS]
    for start, stop in zip(ends, ends[1:], strict=False):
        inside = gap is not None and start <= gap < stop
        sums.add([read[start:stop]], (gap - start,) if gap is not None and inside else ())
    packed = dict(zip(COLUMNS, sums.packed().view(len(COLUMNS), N).tolist(), strict=True))
    expected = counted(read, () if gap is None else (gap,))
    assert [packed[name] for name in TRIES] == expected
    assert all(any(of_one) for of_one in expected)


def test_a_new_span_counts_anew() -> None:
    sums = SheetSums(N, False, torch.float32, slice(0, N), torch.device("cpu"))
    sums.add([steps(0)], ())
    sums.open_window()
    assert dict(zip(COLUMNS, sums.packed().view(len(COLUMNS), N).tolist(), strict=True))["tries"][0] > 0
    sums.open_span()
    assert dict(zip(COLUMNS, sums.packed().view(len(COLUMNS), N).tolist(), strict=True))["tries"] == [0.0] * N
