"""What each cure would give, held against elements that are really rounded so; and the cheapest set of cures."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from update_watch.cures import Cure
from update_watch.foresight.forecasts import Case
from update_watch.formats import BF16
from update_watch.report import (
    HEADROOM_BINS,
    HEADROOM_LOW,
    AccumulatorReport,
    Cause,
    Health,
    Report,
    TensorReport,
)

SIZE, LR = 20_000, 1e-3


def drawn(size: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights that BF16 holds, and updates."""
    torch.manual_seed(seed)
    weights = torch.randn(SIZE).clamp(-4, 4)
    return torch.where(weights.abs() < 2e-3, torch.ones(()), weights).bfloat16().float(), size * torch.randn(SIZE)


def efficiency(weights: torch.Tensor, updates: torch.Tensor, dtype: torch.dtype) -> float:
    """Of all elements, in FP64."""
    applied = (weights + updates).to(dtype).double() - weights.double()
    return float((applied * updates).sum() / updates.double().square().sum())


def measured(name: str, weights: torch.Tensor, updates: torch.Tensor, **fields: object) -> TensorReport:
    headroom = (updates.abs() / BF16.half_gap(weights, updates)).log2().floor().clamp(HEADROOM_LOW, 15) - HEADROOM_LOW
    movement = torch.zeros(HEADROOM_BINS, dtype=torch.float64).index_add_(0, headroom.long(), updates.double() ** 2)
    found = efficiency(weights, updates, torch.bfloat16)
    given: dict[str, object] = {
        "shape": (SIZE // 100, 100),
        "dtype": "bfloat16",
        "numel": SIZE,
        "efficiency": found,
        "movement_histogram": tuple((movement / movement.sum()).tolist()),
        "movement_lr": LR,
        "lr": LR,
        **fields,
    }
    return TensorReport(name, Health.stalled if found < 0.1 else Health.healthy, **given)  # type: ignore[arg-type]


def report(*tensors: TensorReport) -> Report:
    return Report(128, 128, Health.healthy, "", tensors)


def by_name(found: tuple[Case, ...]) -> dict[str, Case]:
    return {case.name: case for case in found}


@pytest.mark.parametrize("size", [3e-3, 3e-4, 3e-5])
def test_each_cure_gives_what_elements_rounded_so_get(size: float) -> None:
    weights, updates = drawn(size)
    found = by_name(report(measured("w", weights, updates)).what_if(floor=4 * LR))
    assert found["as it is"].tensors["w"] == pytest.approx(efficiency(weights, updates, torch.bfloat16))
    for name, truth in {
        "masters": efficiency(weights, updates, torch.float32),
        "float16": efficiency(weights, updates, torch.float16),
        # some of what the rate gives is taken by gradients that agree less
        "floor": efficiency(weights, 4**0.85 * updates, torch.bfloat16),
    }.items():
        assert found[name].tensors["w"] == pytest.approx(truth, abs=0.05)
    assert found["stochastic_rounding"].tensors["w"] == 1.0
    assert {name: case.bytes for name, case in found.items()} == {
        "as it is": 0,
        "masters": 4 * SIZE,
        "kahan": 2 * SIZE,
        "stochastic_rounding": 0,
        "float16": 0,
        "floor": 0,
    }


def test_fp32_states_make_updates_larger_by_the_state_factor_and_norms_alone_cost_their_own_bytes() -> None:
    weights, updates = drawn(3e-4)
    state = AccumulatorReport("exp_avg_sq", "bfloat16", Health.stalling, Cause.state_rounding, efficiency=0.1)
    matrix = measured("w", weights, updates, state_factor=0.25, accumulators={"exp_avg_sq": state})
    norm = measured("norm.weight", torch.ones(SIZE), drawn(1e-4)[1], shape=(SIZE,))
    found = by_name(report(matrix, norm).what_if())
    assert found["fp32_states"].tensors["w"] == pytest.approx(
        efficiency(weights, 4 * updates, torch.bfloat16), abs=0.05
    )
    assert found["fp32_states"].bytes == 2 * SIZE
    norms = found["fp32_norms"]
    assert norms.tensors == {"w": matrix.efficiency, "norm.weight": pytest.approx(1.0, abs=0.01)}
    assert (norms.bytes, norms.efficiency) == (4 * SIZE, pytest.approx((1 + (matrix.efficiency or 0)) / 2, abs=0.01))


def test_what_one_window_cannot_tell_has_ranges() -> None:
    weights, updates = drawn(3e-4)
    state = AccumulatorReport("exp_avg_sq", "bfloat16", Health.stalling, Cause.state_rounding, efficiency=0.1)
    fields = {"state_factor": 0.5, "accumulators": {"exp_avg_sq": state}, "options": ("betas",)}
    found = by_name(report(measured("w", weights, updates, **fields)).what_if(floor=4 * LR))
    assert {name for name, case in found.items() if case.ranges} == {"float16", "floor", "beta2"}
    for name in ("float16", "floor", "beta2"):
        case = found[name]
        low, high = case.ranges["w"]
        assert low <= min(case.tensors["w"], 1.0) <= high
        assert (case.low, case.high) == pytest.approx((low, high))
        assert case.in_doubt == ("w",)
    sure = dataclasses.replace(found["floor"], tensors={"w": 0.5}, ranges={"w": (0.46, 0.54)})
    assert sure.in_doubt == () and dataclasses.replace(sure, ranges={"w": (0.46, 0.56)}).in_doubt == ("w",)
    # updates of half the size and more, since a raised rate may make them smaller beside it
    assert found["floor"].ranges["w"][0] < efficiency(weights, 3 * updates, torch.bfloat16)
    low, high = found["beta2"].ranges["w"]
    assert low < efficiency(weights, updates, torch.bfloat16) < efficiency(weights, 2 * updates, torch.bfloat16) < high
    assert found["beta2"].title == "a beta2 of at most 0.9961"


def test_a_beta_is_only_told_of_a_state_that_does_not_follow() -> None:
    weights, updates = drawn(3e-4)
    well = AccumulatorReport("exp_avg_sq", "bfloat16", Health.healthy)
    for fields in (
        {"options": ("betas",), "accumulators": {"exp_avg_sq": well}, "state_factor": 1.02},
        {"options": ("momentum",), "accumulators": {"exp_avg_sq": well}, "state_factor": 0.5},
        {"options": ("betas",), "state_factor": 0.5},
    ):
        assert "beta2" not in by_name(report(measured("w", weights, updates, **fields)).what_if())


def test_what_is_not_known_or_cannot_be_lost_is_not_told() -> None:
    weights, updates = drawn(3e-4)
    full = measured("w", weights, updates, dtype="float32", efficiency=1.0)
    assert report(full, TensorReport("u", Health.unknown, dtype="bfloat16")).what_if() == ()
    carried = measured("w", weights, updates, scheme="carried:kahan_comp", efficiency=0.99)
    assert by_name(report(carried).what_if())["masters"].tensors == {"w": 0.99}
    with pytest.raises(ValueError, match="floor=0"):
        report(full).what_if(floor=0)
    with pytest.raises(ValueError, match="finite"):
        report(full).what_if(floor=float("inf"))


# --- the cheapest set ----------------------------------------------------------------------------------


def stalled(name: str, numel: int, shape: tuple[int, ...], **fields: object) -> TensorReport:
    weights, updates = torch.ones(SIZE), drawn(1e-5)[1]
    base = measured(name, weights, updates, cause=Cause.weight_rounding, numel=numel, shape=shape)
    return dataclasses.replace(base, **fields)  # type: ignore[arg-type]


BIG = TensorReport("w", Health.healthy, dtype="bfloat16", numel=1_000_000, shape=(1000, 1000), efficiency=1.0)
NORM = stalled("norm.weight", 1000, (1000,))


def test_the_cheapest_cure_of_each_trouble_is_chosen_with_its_bytes() -> None:
    free = report(BIG, NORM).plan()
    assert [(c.cure, c.bytes, c.tensors) for c in free.changes] == [(Cure.stochastic_rounding, 0, ("norm.weight",))]
    alone = report(BIG, NORM).plan(without=["stochastic_rounding"])
    assert [(c.cure, c.bytes) for c in alone.changes] == [(Cure.masters, 4000)]
    assert alone.changes[0].efficiency == 0.0 and alone.changes[0].cured == pytest.approx(1.0, abs=0.01)
    assert str(alone) == "Keep these alone in FP32 (+4 kB): norm.weight from efficiency 0.00 to 1.00."
    large = report(stalled("w", 1_000_000, (1000, 1000)), BIG).plan(without=["stochastic_rounding"])
    assert large.bytes == 4_000_000  # of the whole model


def test_one_change_may_cure_two_troubles_and_states_have_their_own() -> None:
    decay = AccumulatorReport("weight_decay", "bfloat16", Health.stalled, Cause.decay_rounding, efficiency=0.0)
    state = AccumulatorReport("exp_avg_sq", "bfloat16", Health.stalled, Cause.state_rounding, efficiency=0.02)
    sick = dataclasses.replace(BIG, name="v", accumulators={"weight_decay": decay, "exp_avg_sq": state})
    found = report(sick, NORM).plan()
    assert {c.cure: (c.causes, c.bytes) for c in found.changes} == {
        Cure.stochastic_rounding: ((Cause.decay_rounding, Cause.weight_rounding), 0),
        Cure.fp32_states: ((Cause.state_rounding,), 2_000_000),
    }
    assert found.bytes == 2_000_000 and "+2 MB in all." in str(found)
    assert "Keep the optimizer's state in FP32 (+2 MB): exp_avg_sq of v from efficiency 0.02 to 1.00." in str(found)


def test_nothing_lost_needs_nothing_and_what_is_ruled_out_is_said() -> None:
    assert str(report(BIG).plan()).startswith("Nothing has to be changed") and report(BIG).plan().changes == ()
    with pytest.raises(ValueError, match="leaves no cure for weight_rounding; allow one of masters"):
        report(NORM, BIG).plan(without=["masters", "kahan", "stochastic_rounding"])
    with pytest.raises(ValueError, match="nonsense.*must name some of masters"):
        report(BIG).plan(without=["nonsense"])
    assert report(NORM, BIG).plan(without="stochastic_rounding") == report(NORM, BIG).plan(["stochastic_rounding"])
