"""Evidence of several ranks added up, without any process but this one."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from update_watch.evidence import AccumulatorEvidence, Numbers, TensorEvidence, WindowEvidence
from update_watch.ranks.shared_plan import Plan, catalogue
from update_watch.report import HEADROOM_BINS


def tensor(name: str = "w", *, held: int | None = None, **fields: Any) -> TensorEvidence:
    settled = {
        "dtype": "bfloat16",
        "numel": 100,
        "shape": (10, 10),
        "names": (name,),
        "optimizer_group": "0/0",
        "steps": 8,
        "measured_steps": 8,
        "lr": 1e-3,
    }
    return TensorEvidence(name, **{**settled, **fields}, held=held)  # type: ignore[arg-type]


def joined(*ranks: list[TensorEvidence]) -> list[TensorEvidence]:
    """What every rank makes of it; all must make the same."""
    windows = [WindowEvidence(8, 8, tuple(tensors)) for tensors in ranks]
    catalogues = [json.loads(json.dumps(catalogue(window))) for window in windows]
    plans = [Plan(catalogues, rank) for rank in range(len(ranks))]
    total = np.sum([plan.encode(window) for plan, window in zip(plans, windows, strict=True)], axis=0)
    found = [plan.decode(total, window).tensors for plan, window in zip(plans, windows, strict=True)]
    assert all(one == found[0] for one in found)
    return list(found[0])


LEDGER: dict[str, Any] = {
    "net_efficiency": 0.4,
    "net_efficiency_error": 0.02,
    "undone_fraction": 0.5,
    "written_between": 1e-4,
    "moved": 2e-4,
    "gradient_rms": 0.03,
    "update_ratio_error": 1e-5,
    "state_factor_error": 0.01,
    "gradient_spread": 0.25,
    "copy_changed": 0.125,
    "copy_changed_window": 0.5,
    "travelled": 0.5,
    "written_steps": 5,
    "written_step": 7,
    "is_master": True,
    "is_put_back": True,
    "held_fraction": 0.25,
    "requires_grad": False,
    "gradient_looks": 6,
    "gradient_blind": 3,
    "note": "head.weight was replaced",
}


def test_one_rank_alone_gets_back_its_ledger() -> None:
    (found,) = joined([tensor(**LEDGER)])
    for name, value in LEDGER.items():
        assert getattr(found, name) == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name


def test_the_ledger_of_shards_weighs_by_what_they_hold_and_an_error_is_never_less_than_the_mean() -> None:
    few = tensor(held=25, moved=0.0, net_efficiency=0.0, net_efficiency_error=0.1, gradient_rms=0.2, written_step=3)
    many = tensor(held=75, moved=0.4, net_efficiency=1.0, net_efficiency_error=0.02, gradient_rms=0.0)
    (found,) = joined([few], [many])
    assert found.moved == pytest.approx(math.sqrt(0.75 * 0.4**2))
    assert found.gradient_rms == pytest.approx(math.sqrt(0.25 * 0.2**2))
    assert (found.net_efficiency, found.net_efficiency_error) == (pytest.approx(0.75), pytest.approx(0.04))
    assert found.written_step == 3
    still = dataclasses.replace(many, moved=0.0)
    assert joined([few], [still])[0].moved == 0.0  # not one bit of any shard


def test_one_rank_alone_gets_back_what_it_gave() -> None:
    histogram = (0.0,) * 10 + (0.25, 0.75) + (0.0,) * (HEADROOM_BINS - 12)
    numbers = Numbers(0.5, 0.01, 0.6, 0.9, 0.3, 1e-6, 1e-5)
    state = AccumulatorEvidence("exp_avg", "bfloat16", numbers, Numbers(0.9), Numbers(0.1), rate=0.1)
    counter = AccumulatorEvidence("step", "bfloat16", Numbers(), value=256.0)
    given = tensor(
        numbers=numbers,
        headroom_histogram=histogram,
        movement_histogram=histogram[::-1],
        movement_places=(0.0, 0.25, 0.0, 0.75),
        movement_lr=7e-4,
        update_ratio=1e-3,
        applied_ratio=5e-4,
        stored=0.02,
        lr_max=2e-3,
        weight_decay=0.01,
        zero_gradient_fraction=0.125,
        changed_fraction=0.25,
        displacement_evidence=0.5,
        gradless_steps=2,
        what_if={"bfloat16": 0.75},
        scheme="plain",
        low_states=2,
        options=("fused", "betas"),
        state_factor=1.25,
        state_factor_steps=8,
        accumulators={"exp_avg": state, "step": counter},
    )
    (found,) = joined([given])
    for name in (
        "lr",
        "lr_max",
        "weight_decay",
        "steps",
        "measured_steps",
        "gradless_steps",
        "scheme",
        "low_states",
        "options",
        "names",
        "shape",
    ):
        assert getattr(found, name) == getattr(given, name), name
    for name in ("update_ratio", "applied_ratio", "stored", "zero_gradient_fraction", "changed_fraction"):
        assert getattr(found, name) == pytest.approx(getattr(given, name), rel=1e-12), name
    for field in ("efficiency", "efficiency_error", "displacement_efficiency", "wanted_fraction", "lost_fraction"):
        assert getattr(found.numbers, field) == pytest.approx(getattr(numbers, field), rel=1e-12), field
        if field != "efficiency_error":
            kept = getattr(found.accumulators["exp_avg"].numbers, field)
            assert kept == pytest.approx(getattr(numbers, field), rel=1e-12), field
    assert found.headroom_histogram == pytest.approx(histogram)
    assert found.movement_histogram == pytest.approx(histogram[::-1])
    assert found.movement_places == pytest.approx((0.0, 0.25, 0.0, 0.75)) and found.movement_lr == pytest.approx(7e-4)
    assert found.critical_lr == pytest.approx(1e-3 * 2 ** -(-16 + 11 + 1 / 3))
    assert found.accumulators["exp_avg"].decay.efficiency == pytest.approx(0.1)
    assert found.accumulators["exp_avg"].rate == 0.1
    assert found.accumulators["step"].value == 256.0
    assert (found.state_factor, found.state_factor_steps, found.what_if) == (1.25, 8, {"bfloat16": 0.75})


def test_the_movement_of_ranks_weighs_by_how_much_there_was_of_it() -> None:
    low, high = ((0.0,) * at + (1.0,) + (0.0,) * (HEADROOM_BINS - 1 - at) for at in (12, 20))
    few = tensor(held=25, numbers=Numbers(1.0, weight=9.0), movement_histogram=low, movement_lr=1e-3)
    many = tensor(held=75, numbers=Numbers(1.0, weight=1.0), movement_histogram=high, movement_lr=1e-3)
    (found,) = joined([few], [many])
    assert found.movement_histogram is not None and found.movement_histogram[12] == pytest.approx(0.75)
    assert found.movement_histogram[20] == pytest.approx(0.25) and found.movement_lr == pytest.approx(1e-3)
    assert found.movement_places is None
    (still,) = joined([tensor(held=25)], [tensor(held=75)])
    assert (still.movement_histogram, still.movement_lr) == (None, None)


def test_efficiencies_weigh_by_what_was_intended_and_by_elements() -> None:
    a = tensor(held=75, numbers=Numbers(1.0, 0.02, 1.0, 1.0, 0.0, 4.0, 9.0))
    b = tensor(held=25, numbers=Numbers(0.0, 0.04, 0.5, 0.5, 1.0, 1.0, 1.0))
    (found,) = joined([a], [b])
    n = found.numbers
    assert n.efficiency == pytest.approx(75 * 4 / (75 * 4 + 25 * 1))
    assert n.efficiency_error == pytest.approx((75 * 4 * 0.02 + 25 * 0.04) / (75 * 4 + 25))
    assert n.displacement_efficiency == pytest.approx((75 * 9 + 25 * 0.5) / (75 * 9 + 25))
    assert n.wanted_fraction == pytest.approx(0.75 + 0.25 * 0.5)
    assert n.lost_fraction == pytest.approx(12.5 / (75 + 12.5))
    assert (found.numel, found.shape) == (100, (10, 10))


def test_ratios_are_of_root_mean_squares_over_all_elements() -> None:
    a = tensor(held=50, stored=1.0, update_ratio=0.1)
    b = tensor(held=50, stored=3.0, update_ratio=0.2)
    (found,) = joined([a], [b])
    assert found.update_ratio == pytest.approx(math.sqrt((0.01 + 0.36) / (1 + 9)))


def test_replicas_do_not_count_twice() -> None:
    alone = tensor(numbers=Numbers(0.5, 0.1, 0.5, 0.5, 0.5, 1.0, 1.0))
    other = tensor("v", numbers=Numbers(0.25, 0.1, 0.5, 0.5, 0.5, 1.0, 1.0))
    for found in (joined([alone, other]), joined([alone, other], [alone, other])):
        assert [(t.name, t.numel, t.numbers.efficiency) for t in found] == [("w", 100, 0.5), ("v", 100, 0.25)]


def test_an_empty_shard_weighs_nothing_and_does_not_make_it_unknown() -> None:
    full = tensor(held=100, numbers=Numbers(0.5, wanted_fraction=1.0, weight=1.0))
    empty = tensor(held=0, reason="no element of it is on this rank", measured_steps=0, gradless_steps=8)
    (found,) = joined([empty], [full])
    assert (found.reason, found.measured_steps, found.gradless_steps) == ("", 8, 0)
    assert found.numbers.efficiency == 0.5


def test_a_tensor_without_elements_still_has_steps_and_a_group() -> None:
    nothing = {"held": 0, "numel": 0, "shape": (0,), "measured_steps": 0}
    (found,) = joined([tensor(optimizer_group="", **nothing)], [tensor(**nothing)])  # type: ignore[arg-type]
    assert (found.steps, found.optimizer_group) == (8, "0/0")


def test_what_one_rank_cannot_replay_is_known_from_the_others() -> None:
    a = tensor(held=50, reason="its state was of another form", measured_steps=0)
    b = tensor(held=50, numbers=Numbers(0.5, wanted_fraction=1.0, weight=1.0))
    (found,) = joined([a], [b])
    assert (found.reason, found.numbers.efficiency) == ("", 0.5)


def test_what_nobody_measures_keeps_its_reason() -> None:
    (found,) = joined(*[[tensor(held=50, reason="its rule needs the whole tensor", measured_steps=0)]] * 2)
    assert found.reason == "its rule needs the whole tensor"


def test_a_gradient_on_one_rank_is_a_gradient() -> None:
    (found,) = joined([tensor(gradless_steps=8)], [tensor(gradless_steps=7)])
    assert found.gradless_steps < found.steps
    (found,) = joined([tensor(gradless_steps=8)], [tensor(gradless_steps=8)])
    assert found.gradless_steps == found.steps


def test_nan_on_one_rank_breaks_the_tensor_and_no_other_number() -> None:
    bad = tensor(finite=False, update_ratio=math.nan, stored=math.inf, numbers=Numbers(None))
    good = tensor(update_ratio=0.5, stored=2.0)
    (found,) = joined([bad], [good])
    assert not found.finite
    assert (found.update_ratio, found.stored) == (0.5, 2.0)


def test_a_setting_that_is_the_same_everywhere_stays_as_it_is() -> None:
    (found,) = joined(*[[tensor(lr=1e-3, weight_decay=0.1)]] * 7)  # seven times 0.001, over 7, is not 0.001
    assert (found.lr, found.weight_decay) == (1e-3, 0.1)


def test_a_parameter_that_one_rank_steps_is_not_outside_all_optimizers() -> None:
    """ZeRO-1: each rank's optimizer holds a share of the parameters."""
    outside = tensor(optimizer_group="", steps=0, measured_steps=0, lr=None)
    (found,) = joined([outside], [tensor(numbers=Numbers(0.5, wanted_fraction=1.0, weight=1.0))])
    assert (found.optimizer_group, found.steps, found.lr, found.numbers.efficiency) == ("0/0", 8, 1e-3, 0.5)


def test_stages_follow_each_other() -> None:
    found = joined([tensor("a"), tensor("b")], [tensor("c"), tensor("d")])
    assert [t.name for t in found] == ["a", "b", "c", "d"]


def test_one_name_of_two_shapes_is_two_tensors() -> None:
    found = joined([tensor("w", shape=(10, 10))], [tensor("w", shape=(20, 5))])
    assert [t.name for t in found] == ["w (bfloat16 10x10)", "w (bfloat16 20x5)"]


def test_flat_pieces_of_different_length_are_one_tensor() -> None:
    """FSDP1 gives each rank a piece of the flattened parameter."""
    a = tensor(shape=(70,), numel=70, numbers=Numbers(1.0, wanted_fraction=1.0, weight=1.0))
    b = tensor(shape=(30,), numel=30, numbers=Numbers(0.0, wanted_fraction=1.0, weight=1.0))
    (found,) = joined([a], [b])
    assert (found.numel, found.shape, found.numbers.efficiency) == (100, (100,), pytest.approx(0.7))


@pytest.mark.parametrize(("checksums", "differ"), [((5, 5, 5), False), ((5, 5, 6), True), ((4, 5, 6), True)])
def test_checksums_of_replicas_are_compared(checksums: tuple[int, ...], differ: bool) -> None:
    (found,) = joined(*[[tensor(part="", checksum=c)] for c in checksums])
    assert found.replicas_differ is differ


def test_checksums_of_different_parts_are_not_compared() -> None:
    parts = [[tensor(held=50, part=f"1:{rank % 2}", checksum=rank % 2)] for rank in range(4)]
    assert not joined(*parts)[0].replicas_differ
    parts[3] = [tensor(held=50, part="1:1", checksum=7)]
    assert joined(*parts)[0].replicas_differ


def test_differences_of_two_parts_do_not_cancel() -> None:
    ranks = [("1:0", 5), ("1:1", 6), ("1:0", 6), ("1:1", 5)]
    assert joined(*[[tensor(held=50, part=part, checksum=c)] for part, c in ranks])[0].replicas_differ


def test_a_checksum_that_is_missing_accuses_nobody() -> None:
    windows = [WindowEvidence(8, 8, (tensor(part="", checksum=c),)) for c in (5, 5)]
    plans = [Plan([catalogue(w) for w in windows], rank) for rank in (0, 1)]
    silent = WindowEvidence(8, 8, (tensor(),))
    total = plans[0].encode(windows[0]) + plans[1].encode(silent)
    assert not plans[0].decode(total, windows[0]).tensors[0].replicas_differ
