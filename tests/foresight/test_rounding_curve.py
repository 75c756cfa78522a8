"""Efficiency at another learning rate: by hand, against every value of a format, and against training at that rate."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import update_watch as uw
from bench.shared.full_comparison import FullComparison
from update_watch.foresight.rounding_curve import arriving_share, efficiency_of, octaves_for, place_of
from update_watch.formats import BF16
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, Health, TensorReport


def _at(**shares: float) -> tuple[float, ...]:
    """A histogram of shares by octave, written m2 for -2."""
    octaves = {int(name.replace("m", "-").lstrip("o")): share for name, share in shares.items()}
    return tuple(octaves.get(HEADROOM_LOW + i, 0.0) for i in range(HEADROOM_BINS))


def test_what_arrives_of_an_update_is_rounded_to_even() -> None:
    assert [arriving_share(u) for u in (0.4, 0.5, 0.6, 1.0, 1.5, 2.5)] == pytest.approx(
        [0.0, 0.0, 1 / 0.6, 1.0, 2 / 1.5, 2 / 2.5]
    )


@pytest.mark.parametrize("gaps", [0.3, 0.6, 0.9, 1.4, 3.3])
def test_the_share_is_that_of_every_bf16_value(gaps: float) -> None:
    # within one binade: at its ends the spacing changes
    w = torch.arange(2**7 + 8, 2**8 - 8).double() / 2**7
    half = BF16.half_gap(w.float(), torch.ones_like(w).float()).double()
    d = gaps * 2 * half
    stored = BF16.round((w + d).float()).double()
    assert float(((stored - w) / d).mean()) == pytest.approx(arriving_share(gaps), abs=1e-6)


def test_octaves_move_with_the_rate() -> None:
    movement = _at(o4=1.0)
    assert efficiency_of(movement, HEADROOM_LOW) == pytest.approx(1.0, abs=0.02)
    assert efficiency_of(movement, HEADROOM_LOW - 5) == 0.0  # all of them below half a gap
    assert efficiency_of(movement, HEADROOM_LOW + 20) == 1.0
    half = _at(o6=0.5, m3=0.5)
    assert efficiency_of(half, HEADROOM_LOW) == pytest.approx(0.5, abs=0.01)
    assert efficiency_of((0.0,) * HEADROOM_BINS, HEADROOM_LOW) is None
    # rounding up overshoots just above the edge: mean of 1 / u over u from 0.5 to 1
    assert efficiency_of(_at(o0=1.0), HEADROOM_LOW) == pytest.approx(1 / math.log(2), abs=0.01)


def test_the_rate_for_an_efficiency_gives_that_efficiency() -> None:
    movement = _at(o2=0.3, o5=0.7)
    octaves = octaves_for(movement, HEADROOM_LOW, 0.8)
    assert octaves is not None
    for more in (0.0, 0.5, 3.0):
        assert (efficiency_of(movement, HEADROOM_LOW + octaves + more) or 0) >= 0.8
    assert (efficiency_of(movement, HEADROOM_LOW + octaves - 0.25) or 0) < 0.8


def test_a_tensor_says_what_it_would_be_at_another_rate() -> None:
    tensor = TensorReport("w", Health.healthy, movement_histogram=_at(o4=1.0), movement_lr=1e-3, scheme="plain")
    assert tensor.efficiency_at(1e-3) == pytest.approx(1.0, abs=0.02)
    assert tensor.efficiency_at(1e-3 / 64) == 0.0
    rate = tensor.learning_rate_for(0.8)
    assert rate is not None and 1e-3 / 32 < rate < 1e-3 / 8
    carried = dataclasses.replace(tensor, scheme="carried:kahan_comp")
    assert carried.efficiency_at(1e-9) == 1.0 and carried.learning_rate_for(0.8) == 0.0
    unknown = TensorReport("w", Health.unknown)
    assert unknown.efficiency_at(1e-3) is None and unknown.learning_rate_for(0.8) is None
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be a number above 0"):
            tensor.efficiency_at(wrong)
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            tensor.learning_rate_for(wrong)


@pytest.mark.parametrize("factor", [0.2, 0.05, 0.02])
def test_a_forecast_is_what_training_at_that_rate_does(factor: float) -> None:
    """The same gradients at both rates: weights near 1 and near 0.01, few large ones carry most of the movement."""
    torch.manual_seed(0)
    scale = torch.cat([torch.full((3000,), 1.0), torch.full((1000,), 0.01)])
    start = (torch.randn(4000) * scale).bfloat16()
    gradients = [torch.randn(4000).mul_(torch.rand(4000) ** 3).bfloat16() for _ in range(32)]

    def trained(lr: float) -> tuple[float | None, TensorReport]:
        p = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([p], lr=lr)
        comparison = FullComparison([("p", p)], [optimizer], ["sgd"])
        with uw.watch([("p", p)], optimizer, window=1000, samples=4096) as watch:
            for g in gradients:
                p.grad = g.clone()
                with comparison.step():
                    optimizer.step()
                with torch.no_grad():
                    p.copy_(start)
            report = watch.flush()
        assert report is not None
        return comparison.close_window()["p"].efficiency, report.tensors[0]

    _, now = trained(0.02)
    then, _ = trained(0.02 * factor)
    said = now.efficiency_at(0.02 * factor)
    assert then is not None and said is not None
    assert said == pytest.approx(then, abs=0.05)
    assert then < 0.97  # something is lost there, or nothing is shown


def test_updates_of_one_size_are_kept_or_lost_all_at_once_as_their_place_in_the_octave_says() -> None:
    """A rule that takes the sign: |update| = lr, gaps are powers of two, here 1/4: headroom log2(8 lr)."""
    movement = _at(o0=1.0)  # lr 1/8 to 1/4, half a gap to one
    for place, size in enumerate((1.0, 1.25, 1.5, 1.8)):  # halves of a gap, in the quarters of the octave
        places = [float(i == place) for i in range(4)]
        now = efficiency_of(movement, HEADROOM_LOW, places)
        # each is rounded up to a whole gap, 2 halves
        assert now == pytest.approx(2 / size, rel=0.2)
        tensor = TensorReport(
            "w",
            Health.healthy,
            movement_histogram=_at(o0=1.0),
            movement_lr=size / 8,
            movement_places=tuple(places),
            scheme="plain",
        )
        assert tensor.efficiency_at(0.08) == pytest.approx(0.0, abs=0.15) and (tensor.efficiency_at(0.2) or 0) > 1.0


def test_updates_of_one_size_lie_at_one_place_which_their_rms_tells() -> None:
    lr, shares = 2**-12.2, (0.0, 0.0, 0.02, 0.98)
    place = place_of(shares, lr / 0.02 * math.sqrt(0.25), 0.02, 0.25, lr, lr)
    assert place == pytest.approx(math.log2(lr) % 1)
    # exactly what rounding leaves of so many gaps, where parts of an octave give a mean over a quarter of it
    movement, gaps = (1.0,), 0.5 * 2 ** (1 + math.log2(lr) % 1)
    assert efficiency_of(movement, 1, place) == pytest.approx(round(gaps) / gaps)
    assert efficiency_of(movement, 1, shares) != pytest.approx(round(gaps) / gaps, abs=0.02)
    # of another size than the shares tell, of several sizes, or not known: the shares
    for sizes in ((lr * 1.4, 1.0, 1.0, lr, lr), (None, 1.0, 1.0, lr, lr), (math.inf, 1.0, 1.0, lr, lr)):
        assert place_of(shares, *sizes) == shares
    assert place_of((0.25,) * 4, lr, 1.0, 1.0, lr, lr) == (0.25,) * 4


def test_a_place_beside_the_octave_stays_in_the_octave_of_its_part() -> None:
    size = 2**-12.01  # a hair below the octave whose first part has been counted
    assert place_of((0.9, 0.0, 0.0, 0.1), size, 1.0, 1.0, 1.0, 1.0) == pytest.approx(-0.01)
