"""Which tensors are measured in every step of a CPU, and how wide their samples are."""

from __future__ import annotations

import pytest
import torch

import update_watch as uw
from update_watch.measure.device.turns import samples_for, turns_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("sizes", "turns"),
    [
        ([10**6] * 16, 1),
        ([10**6] * 17, 3),
        ([64] * 100, 1),  # read whole, and few elements together
        ([256] * 32, 1),
        ([256] * 33, 5),  # too many of them
        ([64] * 30 + [257], 4),  # one has to be sampled
        ([10] * 3000, 8),
    ],
)
def test_up_to_sixteen_or_small_ones_take_no_turns(sizes: list[int], turns: int) -> None:
    assert turns_of(sizes, 256, CPU) == turns


@pytest.mark.parametrize(
    ("tensors", "largest", "samples"),
    [(17, 10**6, 256), (16, 10**6, 2048), (100, 64, 64), (5, 65, 66), (3, 0, 2)],
)
def test_no_row_is_wider_than_the_largest_tensor(tensors: int, largest: int, samples: int) -> None:
    assert samples_for(256, tensors, largest) == samples


def test_many_small_tensors_are_measured_in_every_step_and_exactly() -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(3 + 5 * (i % 12)) * 1e-3).bfloat16()) for i in range(60)]
    optimizer = torch.optim.SGD(params, lr=1.0)
    want, before = [0.0] * 60, [0.0] * 60
    with uw.watch([(f"t{i}", p) for i, p in enumerate(params)], optimizer, window=16, budget=None) as watch:
        for _ in range(16):
            for i, p in enumerate(params):
                p.grad = (torch.randn(p.shape) * 5e-4).bfloat16()
                want[i] += float(p.grad.double().square().sum())
                before[i] += float(p.detach().double().square().sum())
            optimizer.step()
        report = watch.flush()
    assert report is not None
    for i, t in enumerate(report.tensors):
        assert t.update_ratio == pytest.approx((want[i] / before[i]) ** 0.5, rel=1e-6) and t.efficiency_error == 0
