"""What a raised learning rate does beside the rate, held against gradients that agree so much and weights that really walk."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from update_watch.foresight.raised_rate import Raised, agreement, raised
from update_watch.formats import BF16
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, Health, TensorReport

SIZE, LR, STEPS = 4096, 1e-3, 64


def of_optimizer(kind: str, signal: float) -> TensorReport:
    """The last 64 of 256 steps on gradients of which so much is the same in every step, the rest noise, as a window saw them."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(SIZE))
    optimizer: torch.optim.Optimizer
    if kind == "betas":
        optimizer = torch.optim.AdamW([weight], lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD([weight], lr=LR, momentum=0.9)
    same, sizes, gradients = torch.randn(SIZE).sign(), [], []
    for _ in range(256):
        weight.grad = 3e-3 * (signal * same + math.sqrt(1 - signal**2) * torch.randn(SIZE))
        before = weight.detach().clone()
        optimizer.step()
        sizes.append((weight.detach() - before).square().mean())
        gradients.append(weight.grad.square().mean())
    rms = float(torch.stack(sizes[-STEPS:]).mean().sqrt())
    return TensorReport(
        *("w", Health.healthy),
        dtype="bfloat16",
        numel=SIZE,
        options=("foreach", kind),
        update_ratio=rms,
        weight_rms=1.0,
        gradient_rms=float(torch.stack(gradients[-STEPS:]).mean().sqrt()),
        lr=LR,
        movement_lr=LR,
        movement_histogram=tuple(1.0 if HEADROOM_LOW + i == -1 else 0.0 for i in range(HEADROOM_BINS)),
    )


@pytest.mark.parametrize("kind", ["betas", "momentum"])
def test_agreement_is_zero_of_gradients_without_memory_and_the_whole_range_of_such_that_all_agree(kind: str) -> None:
    whole = {"betas": math.log2(math.sqrt(1.9 / 0.1)), "momentum": math.log2(10 * math.sqrt(1 - 0.81))}[kind]
    # m / sqrt(v) of noise: v remembers few steps at a beta2 of 0.95, so it is a little above 0
    assert agreement(of_optimizer(kind, 0.0)) == pytest.approx(0.0, abs=0.15)
    assert agreement(of_optimizer(kind, 1.0)) == pytest.approx(whole, abs=0.05)
    half = agreement(of_optimizer(kind, 0.5))
    assert half is not None and 0.5 < half < 0.9 * whole


def test_of_another_rule_or_of_sizes_it_cannot_have_no_agreement_is_told() -> None:
    t = of_optimizer("betas", 0.5)
    assert agreement(dataclasses.replace(t, options=())) is None
    assert agreement(dataclasses.replace(t, weight_rms=None)) is None
    for others in (("momentum",), ("foreach", "momentum", "alpha")):  # Muon's, RMSprop's
        assert agreement(dataclasses.replace(of_optimizer("momentum", 0.5), options=others)) is None
    assert agreement(dataclasses.replace(t, weight_rms=50.0)) is None  # a rate that is not all that scales it


def grown(t: TensorReport, window: int = STEPS, octaves: float = 2.0) -> Raised:
    found = raised(t, octaves, window)
    assert found is not None
    return found


def edge(signal: float, **fields: object) -> TensorReport:
    """Its movement is spread over the octaves at which efficiency falls."""
    shares = [0.25 if -3 <= HEADROOM_LOW + i <= 0 else 0.0 for i in range(HEADROOM_BINS)]
    given: dict[str, object] = {"movement_histogram": tuple(shares), **fields}
    return dataclasses.replace(of_optimizer("betas", signal), **given)  # type: ignore[arg-type]


def test_more_is_taken_where_gradients_agree_and_in_longer_windows() -> None:
    alone = edge(0.0).efficiency_at(4 * LR)
    assert alone is not None
    none, some = grown(edge(0.0)), grown(edge(0.5))
    assert some.efficiency < none.efficiency < alone
    assert grown(edge(0.5), window=8).efficiency > some.efficiency + 0.03
    # most of it has happened in some hundred steps, and no more comes after
    longer = grown(edge(0.5), window=512).efficiency
    assert some.efficiency - 0.1 < longer < some.efficiency - 0.01
    assert grown(edge(0.5), window=10_000).efficiency == pytest.approx(longer, abs=0.02)
    for one in (none, some):
        assert one.low < one.efficiency < one.high


def test_where_nearly_all_agree_or_elements_are_few_the_range_is_wider() -> None:
    def width(found: Raised) -> float:
        return found.high - found.low

    usual = width(grown(edge(0.5)))
    assert width(grown(edge(0.9))) > 2 * usual
    assert width(grown(edge(0.5, numel=32))) > 2 * usual
    assert width(grown(edge(0.5), octaves=8.0)) < 0.05 < usual  # far beyond where efficiency falls all is sure
    assert raised(edge(0.5, movement_histogram=None), 2.0, STEPS) is None


@pytest.mark.parametrize("keeps", [0.97, 0.995])
def test_weights_under_updates_of_one_size_walk_until_they_are_too_large_to(keeps: float) -> None:
    """Signs that stay as they are with this probability, on weights that really are in BF16."""
    torch.manual_seed(0)
    size = 5e-5

    def trained(rate: float) -> tuple[float, torch.Tensor, torch.Tensor]:
        weights = ((torch.rand(SIZE * 4) - 0.5) / 4).bfloat16().float()
        sign = torch.where(torch.rand_like(weights) < 0.5, 1.0, -1.0)
        dot = want = 0.0
        first = weights.clone(), rate * sign
        for _ in range(STEPS):
            sign = torch.where(torch.rand_like(sign) < keeps, sign, -sign)
            after = (weights + rate * sign).bfloat16().float()
            dot += float(((after - weights).double() * rate * sign.double()).sum())
            want += rate * rate * len(sign)
            weights = after
        return dot / want, *first

    _, weights, updates = trained(size)
    headroom = (updates.abs() / BF16.half_gap(weights, updates)).log2()
    bins = headroom.floor().clamp(HEADROOM_LOW, HEADROOM_LOW + HEADROOM_BINS - 1) - HEADROOM_LOW
    shares = torch.bincount(bins.long(), minlength=HEADROOM_BINS) / len(bins)
    place = [0.0] * 4
    place[int(float(headroom[0] % 1.0) * 4)] = 1.0
    rms = float(weights.square().mean().sqrt())
    t = TensorReport(
        *("w", Health.healthy),
        dtype="bfloat16",
        numel=len(weights),
        lr=size,
        movement_lr=size,
        movement_histogram=tuple(shares.tolist()),
        movement_places=tuple(place),
        update_ratio=size / rms,
        weight_rms=rms,
        wanted_fraction=1.0,
        options=("betas",),
    )
    assert isinstance(t.places, float)
    truth, at_begin = trained(4 * size)[0], t.efficiency_at(4 * size)
    found = grown(t)
    assert at_begin is not None and truth < at_begin - 0.02  # it is more than the rate
    assert found.efficiency < at_begin - 0.02
    # a rate that has fallen by much, in a long window: all have walked, and no further than one octave
    far = grown(t, window=10_000, octaves=3.0)
    assert far.low <= far.efficiency <= far.high and far.efficiency == pytest.approx(
        t.efficiency_at(4 * size), abs=0.01
    )
    assert abs(found.efficiency - truth) < 0.05 and found.low <= truth <= found.high
    # updates that are large beside the weights may make them grow within the window
    larger = grown(dataclasses.replace(t, update_ratio=50 * size / rms, weight_rms=rms / 50))
    assert larger.efficiency == pytest.approx(found.efficiency) and larger.high - larger.low > 1.2 * (
        found.high - found.low
    )
