"""Sums by NumPy, on the host, against torch's way on the same steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import update_watch as uw
from tests.support.made_up_steps import KINDS, added
from update_watch.measure.sums import kernel_sums
from update_watch.measure.sums.device_sums import DeviceSums
from update_watch.measure.sums.host_sums import HostSums

SHARED_OUT = 2**15  # elements: of more, torch gives each thread a part
MADE = ("aten::empty", "aten::zeros")  # memory, not computed


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("planted", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("name", KINDS)
def test_sums_are_those_of_torchs_way(name: str, planted: float | None, masked: bool) -> None:
    found, wanted = (added(KINDS[name], way, planted, masked, turns=2) for way in (HostSums, DeviceSums))
    assert all(bool(one.ne(0).any()) for one in wanted if one.numel())
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert kernel_sums.are_close(one, other), (i, (one - other).abs().max())


def test_counts_and_places_of_the_histogram_are_the_same_to_the_last() -> None:
    found, wanted = (added(KINDS["both-in-fp64"], way) for way in (HostSums, DeviceSums))
    whole = wanted[0].eq(wanted[0].round()) & wanted[0].ne(0) & wanted[0].lt(1e6)
    assert whole.sum() > 30 and torch.equal(found[0][whole], wanted[0][whole])


class Sizes(TorchDispatchMode):
    """The largest tensor that each operator makes, of those that threads may share."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (
            torch.get_num_threads() > 1
            and isinstance(made, torch.Tensor)
            and not func.is_view
            and func._schema.name not in MADE
        ):
            self.seen[func._schema.name] = max(self.seen[func._schema.name], made.numel())
        return made


@pytest.mark.parametrize("window", [32, 96])
def test_no_operator_of_a_step_is_so_large_that_threads_share_it(window: int, request: pytest.FixtureRequest) -> None:
    """Where other processes use the cores, torch waits for its threads for milliseconds."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    named = [(f"layer{i}", torch.nn.Parameter(torch.randn(96, 64).bfloat16())) for i in range(68)]
    optimizer = torch.optim.AdamW([p for _, p in named], lr=1e-3, fused=True)
    sizes = Sizes()
    with uw.watch(named, optimizer, window=window, budget=None) as watch:
        for step in range(100):
            for _, p in named:
                p.grad = torch.randn_like(p)
            with sizes if step > 2 else Sizes():
                optimizer.step()
        assert watch._tap.error is None
    assert sizes.seen and max(sizes.seen.values()) <= SHARED_OUT, sizes.seen.most_common(5)
