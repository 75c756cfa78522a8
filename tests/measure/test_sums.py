"""Sums on the device against a slow comparison of the same data in FP64."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import update_watch as uw
from update_watch.evidence import Numbers, median_headroom
from update_watch.formats import BF16, FP32, Format
from update_watch.measure import cohort, device_rows
from update_watch.measure.sums.added_steps import AddedSteps, Look, Slot
from update_watch.measure.sums.device_sums import DeviceSums
from update_watch.measure.sums.layout import BEFORE, COUNT, CROSS, DOT, GROUPS, PARTS, SQUARE, WANT, Layout
from update_watch.measure.sums.measured_block import CohortFacts, StateFacts
from update_watch.measure.sums.packing import Reach, packed
from update_watch.measure.sums.step_sizes import Unseen
from update_watch.measure.sums.steps import Steps
from update_watch.measure.sums.window_sums import WindowSums
from update_watch.measure.transfer import Batch
from update_watch.measure.window_evidence import CohortWindow, SumsWindow, Window, read
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW

Array = npt.NDArray[np.float64]
A, N, K = 3, 4, 64


class Step(NamedTuple):
    """What a cohort hands to its sums in one step."""

    before_AnK: Tensor
    intended_AnK: Tensor  # the update, not the value
    after_AnK: Tensor
    grad_nK: Tensor
    mask_nK: Tensor | None
    full: bool


def steps(count: int, scale: float = 1e-3, masked: bool = False, seed: int = 0) -> list[Step]:
    """BF16 values, updates near half a gap; some updates and gradients are zero; the last state is near 1e-20."""
    rng = torch.Generator().manual_seed(seed)
    size_A = torch.tensor([1.0, 1e-2, 1e-20]).view(A, 1, 1)
    stored_AnK = (torch.randn(A, N, K, generator=rng) * size_A).bfloat16().float()
    drift_AnK = torch.randn(A, N, K, generator=rng)
    made = []
    for t in range(count):
        update_AnK = (drift_AnK + 0.5 * torch.randn(A, N, K, generator=rng)) * scale * size_A
        update_AnK *= torch.rand(A, N, K, generator=rng) > 0.2
        intended_AnK = (stored_AnK + update_AnK) - stored_AnK  # what FP32 arithmetic makes of it
        after_AnK = (stored_AnK + update_AnK).bfloat16().float()
        grad_nK = torch.randn(N, K, generator=rng) * (torch.rand(N, K, generator=rng) > 0.3)
        mask_nK = None
        if masked:
            mask_nK = torch.ones(N, K)
            mask_nK[1, 10:] = 0  # a small tensor
            if t % 3 == 1:
                mask_nK[2] = 0  # no gradient this time
        made.append(Step(stored_AnK, intended_AnK, after_AnK, grad_nK, mask_nK, t % 2 == 0))
        stored_AnK = after_AnK
    return made


def gone_through(
    made: list[Step], fmt: Format = BF16, has_clusters: bool = False, together: int = 1
) -> tuple[DeviceSums, int]:
    """The sums of so many steps at a time, and how many parts are in use."""
    sums = DeviceSums(A - 1, N, K, torch.device("cpu"), has_clusters=has_clusters)
    added, per_part = 0, 1
    for first in range(0, len(made), together):
        chosen = range(first, min(first + together, len(made)))
        parts = {}
        for t in chosen:
            if added // per_part == PARTS:
                sums.merge_parts(slice(0, N))
                parts, per_part = {t: part // 2 for t, part in parts.items()}, 2 * per_part
            parts[t] = added // per_part
            added += 1
        order = sorted(chosen, key=lambda t: not made[t].full)  # those that are compared in full first
        side_by_side = [torch.cat(arrays, -2) for arrays in zip(*(made[t][:3] for t in order), strict=True)]
        before_ARK, intended_ARK, after_ARK = side_by_side
        masks = [made[t].mask_nK for t in order]
        full = N * sum(made[t].full for t in order)
        slots = [Slot(slice(0, N), k * N, parts[t], t % GROUPS) for k, t in enumerate(order)]
        given = (
            before_ARK,
            before_ARK + intended_ARK,
            after_ARK[0],
            after_ARK[1:, :full] if full else None,
            torch.cat([made[t].grad_nK for t in order]),
            None if masks[0] is None else torch.cat([m for m in masks if m is not None]),
            None,
            slots,
            [Look(slice(0, N * len(order)), fmt, 0.0)],
            slots,
        )
        sums.add(AddedSteps(*given))
    return sums, -(-added // per_part)


def counted(made: list[Step], window: int | None = None, plain: bool = True) -> Steps:
    """The host's part: all rows are read whole."""
    live = np.array([[s.mask_nK is None or bool(s.mask_nK[row].any()) for row in range(N)] for s in made], dtype=float)
    groups = np.stack([live[g::GROUPS].sum(0) for g in range(GROUPS)])
    window_Gn = groups if window is None else np.full((GROUPS, N), window / GROUPS)
    parts = live
    while len(parts) > PARTS:
        parts = np.concatenate([parts, np.zeros((len(parts) % 2, N))]).reshape(-1, 2, N).sum(1)
    return Steps(
        parts, groups, window_Gn, np.zeros(N), np.ones(len(parts)), np.ones(N, bool), np.full(N, plain), np.zeros(N)
    )


def summed(made: list[Step], fmt: Format = BF16, has_clusters: bool = False, together: int = 1) -> WindowSums:
    sums, parts = gone_through(made, fmt, has_clusters, together)
    vector = packed(sums, parts, made[-1].after_AnK[0], None, [Reach(slice(0, N), fmt, 1.0)])
    assert vector.dim() == 1 and vector.dtype is torch.float64
    return WindowSums.unpack(vector.numpy(), sums.layout(parts))


NOTHING = Unseen(np.zeros(N), np.zeros(N), np.full(N, np.nan))  # no step that was not measured carries anything


def numbers_of(made: list[Step], accumulator: int, fmt: Format = BF16, part: int = 0) -> list[dict[str, float]]:
    """By row."""
    sums = summed(made, fmt)
    found = sums.numbers(counted(made), NOTHING) if accumulator == 0 else None
    if found is None:
        found = {name: values[accumulator - 1] for name, values in sums.state_numbers()[part].items()}
    return [{name: float(values[row]) for name, values in found.items()} for row in range(N)]


class Slow:
    """The same of one row, every element in FP64. Of states only the full steps."""

    def __init__(self, made: list[Step], accumulator: int, row: int) -> None:
        if accumulator:
            made = [s for s in made if s.full]

        def of(tensor: Tensor) -> Array:
            array: Array = tensor.double().numpy()
            return array

        def valid(s: Step) -> npt.NDArray[np.bool_]:
            return np.ones(K, bool) if s.mask_nK is None else of(s.mask_nK[row]) > 0

        self.valid = [valid(s) for s in made]
        at = accumulator, row
        self.before = [of(s.before_AnK[at])[v] for s, v in zip(made, self.valid, strict=True)]
        self.intended = [of(s.intended_AnK[at])[v] for s, v in zip(made, self.valid, strict=True)]
        self.applied = [of(s.after_AnK[at])[v] - b for s, v, b in zip(made, self.valid, self.before, strict=True)]
        self.grad = [of(s.grad_nK[row])[v] for s, v in zip(made, self.valid, strict=True)]
        self.sampled = float(sum(v.sum() for v in self.valid))
        # the way: states are thinned to every fourth sample
        thin = slice(None, None, 4 if accumulator else 1)
        total = np.zeros((2, K))
        for s, v in zip(made, self.valid, strict=True):
            total[0] += np.where(v, of(s.after_AnK[at]) - of(s.before_AnK[at]), 0)
            total[1] += np.where(v, of(s.intended_AnK[at]), 0)
        self.path = total[:, thin]

    def numbers(self, part: str = "") -> Numbers:
        b, d, a = (np.concatenate(x) for x in (self.before, self.intended, self.applied))
        if part:
            chosen = (b * d < 0) if part == "decay" else ~(b * d < 0)
            d, a = d[chosen], a[chosen]
        wanted = d != 0
        return Numbers(
            efficiency=float((a @ d) / (d @ d)),
            displacement_efficiency=float(self.path[0] @ self.path[1] / (self.path[1] @ self.path[1])),
            wanted_fraction=float(wanted.sum() / self.sampled),
            lost_fraction=float((wanted & (a == 0)).sum() / wanted.sum()),
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1e-1, 4e-3, 5e-4])
@pytest.mark.parametrize("accumulator", range(A))
def test_all_numbers_are_those_of_the_full_comparison(accumulator: int, scale: float, masked: bool) -> None:
    made = steps(12, scale, masked)
    for row, found in enumerate(numbers_of(made, accumulator)):
        expected = Slow(made, accumulator, row).numbers()
        for name in ("efficiency", "displacement_efficiency"):
            assert found[name] == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6)
        for name in ("wanted_fraction", "lost_fraction"):
            assert found[name] == pytest.approx(getattr(expected, name), rel=1e-6)
    for part, name in enumerate(("growth", "decay")) if accumulator else ():
        for row, found in enumerate(numbers_of(made, accumulator, part=1 + part)):
            expected = Slow(made, accumulator, row).numbers(name)
            assert found["efficiency"] == pytest.approx(expected.efficiency, rel=1e-4, abs=1e-6)
            assert found["wanted_fraction"] == pytest.approx(expected.wanted_fraction, rel=1e-6)
            assert found["lost_fraction"] == pytest.approx(expected.lost_fraction, rel=1e-6)


def test_long_windows_are_kept_in_parts_and_nothing_is_lost() -> None:
    made = steps(3 * PARTS + 5, 4e-3, masked=True)
    _, parts = gone_through(made)
    assert parts == -(-len(made) // 4)
    for row, found in enumerate(numbers_of(made, 0)):
        assert found["efficiency"] == pytest.approx(Slow(made, 0, row).numbers().efficiency, rel=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_steps_that_are_added_together_make_the_same_sums(masked: bool) -> None:
    made = steps(2 * PARTS + 7, 4e-3, masked)
    alone, together = (summed(made, FP32, True, count) for count in (1, 5))
    for field in dataclasses.fields(WindowSums):
        found, expected = getattr(together, field.name), getattr(alone, field.name)
        assert np.any(expected) or field.name == "decay_5n" or field.name == "touched_n", field.name
        exact = field.name not in ("arrived_GGn", "meant_GGn", "cells_3n", "state_way_2Sn")  # the way is FP32
        np.testing.assert_allclose(found, expected, rtol=1e-12 if exact else 1e-5, atol=0, err_msg=field.name)


def test_the_data_hold_what_is_to_be_told_apart() -> None:
    """Meta: lost and arrived, wanted and not, efficiency far from 0 and 1, net progress apart from efficiency."""
    numbers = Slow(steps(12, 4e-3), 0, 0).numbers()
    assert numbers.efficiency is not None and numbers.displacement_efficiency is not None
    assert 0.3 < numbers.efficiency < 1.5 and 0.1 < (numbers.lost_fraction or 0) < 0.9
    assert 0.7 < (numbers.wanted_fraction or 0) < 0.9
    small = Slow(steps(12, 5e-4), 0, 0).numbers()
    assert abs((small.efficiency or 0) - (small.displacement_efficiency or 0)) > 0.01


@pytest.mark.parametrize("masked", [False, True])
def test_root_mean_squares_and_gradients(masked: bool) -> None:
    made = steps(10, masked=masked)
    for row, found in enumerate(numbers_of(made, 0)):
        slow = Slow(made, 0, row)
        before, intended, applied, grad = (
            np.concatenate(x) for x in (slow.before, slow.intended, slow.applied, slow.grad)
        )
        rms = [float(np.sqrt(np.mean(np.square(x)))) for x in (before, intended, applied, grad)]
        assert found["stored"] == pytest.approx(rms[0], rel=1e-4)
        assert found["update_ratio"] == pytest.approx(rms[1] / rms[0], rel=1e-4)
        assert found["applied_ratio"] == pytest.approx(rms[2] / rms[0], rel=1e-4)
        assert found["gradient_rms"] == pytest.approx(rms[3], rel=1e-4)
        assert found["gradient_max"] == pytest.approx(np.abs(grad).max(), rel=1e-4)
        assert found["zero_gradient_fraction"] == pytest.approx(np.mean(grad == 0), abs=1e-6)
        assert found["changed_fraction"] == pytest.approx(np.mean(applied != 0), abs=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-6, 1e6, 1e15])
def test_ratios_do_not_depend_on_the_size_of_the_values(size: float) -> None:
    names = ("before_AnK", "intended_AnK", "after_AnK")
    made = [s._replace(**{name: getattr(s, name) * size for name in names}) for s in steps(6)]
    for accumulator in (0, 1):
        if size < 1e-25 and accumulator:
            continue  # 1e-2 * 1e-30 * gaps is near the end of FP32
        for plain, scaled in zip(numbers_of(steps(6), accumulator), numbers_of(made, accumulator), strict=True):
            for name, x in plain.items():
                if name in ("weight", "path_weight"):  # what ranks are joined by grows with the square
                    assert scaled[name] / size**2 == pytest.approx(x, rel=0.01), name
                elif name == "stored":
                    assert scaled[name] / size == pytest.approx(x, rel=0.01)
                elif not np.isnan(x):
                    assert scaled[name] == pytest.approx(x, rel=0.01, abs=1e-4), name


@pytest.mark.parametrize("first", [1e-20, 1e-15])
def test_a_first_step_that_is_tiny_does_not_spoil_the_others(first: float) -> None:
    """A zero-initialised tensor, a first gradient of 1e-20 and then real ones."""
    made = steps(8, 0.5)
    tiny = made[0]
    nothing = torch.zeros_like(tiny.before_AnK)
    move = (tiny.intended_AnK * first).bfloat16().float()
    made[0] = tiny._replace(before_AnK=nothing, intended_AnK=move, after_AnK=move)
    assert summed(made).is_finite().all()
    for row, found in enumerate(numbers_of(made, 0)):
        assert found["efficiency"] == pytest.approx(Slow(made, 0, row).numbers().efficiency, rel=1e-4)


def test_a_second_moment_of_1e_20_that_comes_in_late_is_measured_too() -> None:
    """Parameters without a gradient in the first step have no state yet."""
    made = steps(8)
    off = torch.ones(N, K)
    off[3] = 0
    first = made[0]._replace(mask_nK=off)
    for tensor in (first.before_AnK, first.intended_AnK, first.after_AnK):
        assert tensor[2, 3].any()
    expected = Slow([first, *made[1:]], 2, 3)
    found = numbers_of([first, *made[1:]], 2)[3]
    assert found["efficiency"] == pytest.approx(expected.numbers().efficiency, rel=1e-3)


def test_headroom_is_counted_in_its_octave() -> None:
    made = steps(4, 4e-3, masked=True)
    sums = summed(made)
    for row in range(N):
        slow = Slow(made, 0, row)
        w, d = np.concatenate(slow.before), np.concatenate(slow.intended)
        w, d = w[d != 0], d[d != 0]
        mantissa, exponent = np.frexp(np.abs(w))
        # 8 significant bits; towards zero from a power of two the gap is half
        gap = np.ldexp(1.0, exponent - 8) * np.where((mantissa == 0.5) & (w * d < 0), 0.5, 1)
        octaves = np.clip(np.floor(np.log2(np.abs(d) / (gap / 2))), HEADROOM_LOW, HEADROOM_LOW + HEADROOM_BINS - 1)
        expected = np.bincount((octaves - HEADROOM_LOW).astype(int), minlength=HEADROOM_BINS)
        # FP32 logarithms may put an update on the edge into the next octave
        for histogram in sums.headroom_2nB[:, row]:
            assert np.abs(histogram - expected).sum() <= 2
            assert histogram.sum() == len(d)
        quarters = np.floor(4 * np.log2(np.abs(d) / (gap / 2))).astype(int)
        by_quarter = np.bincount(quarters % 4, weights=d * d, minlength=4) / (d * d).sum()
        assert sums.places_nQ[row] / sums.places_nQ[row].sum() == pytest.approx(by_quarter, abs=0.02)
        by_octave = np.bincount((octaves - HEADROOM_LOW).astype(int), weights=d * d, minlength=HEADROOM_BINS)
        assert sums.movement_nB[row] == pytest.approx(by_octave, abs=0.02 * by_octave.sum())


def test_headroom_of_zero_weights_and_huge_updates_stays_inside_the_histogram() -> None:
    sums = DeviceSums(0, 1, 4, torch.device("cpu"))
    w = torch.tensor([[0.0, 1.0, 1e-38, 1.0]]).double()
    d = torch.tensor([[1e-3, 1e30, 0.0, 2**-40]]).double()
    rows, slots = slice(0, 1), [Slot(slice(0, 1), 0, 0, 0)]
    looks = [Look(rows, BF16, 0.0)]
    sums.add(AddedSteps(w[None], (w + d)[None], w, None, d, None, None, slots, looks, slots))
    vector = packed(sums, 1, w.float(), None, [Reach(rows, BF16, 1.0)])
    histogram = WindowSums.unpack(vector.numpy(), sums.layout(1)).headroom_2nB[0, 0]
    assert histogram[0] == 1 and histogram[-1] == 2 and histogram.sum() == 3


def test_median_headroom() -> None:
    histogram = np.zeros(HEADROOM_BINS)
    assert median_headroom(histogram.tolist()) is None
    histogram[[10, 11]] = 3, 3
    assert median_headroom(histogram.tolist()) == HEADROOM_LOW + 11
    histogram[12] = 4
    assert median_headroom(histogram.tolist()) == pytest.approx(HEADROOM_LOW + 11 + 2 / 3)


def as_window(made: list[Step], fmt: Format = BF16, **fields: float) -> Window:
    sums, parts = gone_through(made, fmt)
    batch = Batch()
    part = batch.add(packed(sums, parts, made[-1].after_AnK[0], None, [Reach(slice(0, N), fmt, 1.0)]))
    batch.send()
    sizes = [max(K if s.mask_nK is None else int(s.mask_nK[row].sum()) for s in made) for row in range(N)]
    given: dict[str, list[Any]] = {"name": [f"t{row}" for row in range(N)]}
    same = {"dtype": fmt.name, "numel": K, "steps": len(made), "reason": "", "accumulators": {}, **fields}
    given |= {name: [value] * N for name, value in same.items()}
    nowhere = np.zeros(0, dtype=np.intp)
    states = {
        "exp_avg": StateFacts(np.arange(N), ["bfloat16"] * N, [None] * N),
        "exp_avg_sq": StateFacts(nowhere, [], []),
    }
    facts = CohortFacts(given, sizes, states, [fields.get("lr")] * N)
    names = ("exp_avg", "exp_avg_sq")
    of_all = SumsWindow(((part, sums.layout(parts)),), names, lambda: facts)
    cohort = CohortWindow(of_all, lambda: counted(made), len(made), (0, 0), slice(0, N))
    return Window(len(made), len(made), (cohort,), (), {f"t{i}": N - i for i in range(N)}, 1.0)


def test_evidence_of_a_window_is_that_of_the_full_comparison() -> None:
    made = steps(9, 4e-3, masked=True)
    evidence = read(as_window(made))
    assert [t.name for t in evidence.tensors] == ["t3", "t2", "t1", "t0"]  # the model's order
    for t in evidence.tensors:
        row = int(t.name[1:])
        slow = Slow(made, 0, row)
        intended, applied = (np.concatenate(x) for x in (slow.intended, slow.applied))
        before = np.sqrt(np.mean(np.square(np.concatenate(slow.before))))
        assert t.finite and t.measured_steps == (6 if row == 2 else 9)
        assert t.changed_fraction == pytest.approx(np.mean(applied != 0), abs=1e-6)
        assert t.update_ratio == pytest.approx(np.sqrt(np.mean(intended**2)) / before, rel=1e-4)
        assert t.applied_ratio == pytest.approx(np.sqrt(np.mean(applied**2)) / before, rel=1e-4)
        assert t.zero_gradient_fraction == pytest.approx(np.mean(np.concatenate(slow.grad) == 0), abs=1e-6)
        assert t.headroom_histogram is not None and sum(t.headroom_histogram) == pytest.approx(1)
        assert list(t.accumulators) == ["exp_avg"]  # the other state's replay is not exact
        state = t.accumulators["exp_avg"].numbers
        assert state.efficiency == pytest.approx(Slow(made, 1, row).numbers().efficiency, rel=1e-4)


def test_displacement_evidence_is_the_share_of_sums_above_half_a_gap() -> None:
    made = steps(9, 4e-3)
    for t in read(as_window(made)).tensors:
        row = int(t.name[1:])
        total = Slow(made, 0, row).path[1]
        w = made[-1].after_AnK[0, row].double().numpy()
        gap = np.ldexp(1.0, np.frexp(np.abs(w))[1] - 8)
        assert t.displacement_evidence == pytest.approx(np.mean(np.abs(total) >= gap / 2), abs=2 / K)


def test_the_spread_of_gradients_is_that_of_their_rms_over_the_steps() -> None:
    made = steps(8)
    for t in read(as_window(made)).tensors:
        rms = [float(s.grad_nK[int(t.name[1:])].double().square().mean().sqrt()) for s in made]
        assert t.gradient_spread == pytest.approx(np.std(rms, ddof=1) / np.mean(rms), rel=1e-3)


@pytest.mark.parametrize(
    ("sizes", "came"),
    # the last: a learning rate that begins at 0
    [([8.0, 4.0, 2.0, 1.0], False), ([8.0, 4.0, 16.0, 8.0], True), ([0.0, 4.0, 4.0, 4.0], False)],
)
def test_momentum_that_grows_had_a_gradient_where_nobody_looked(sizes: list[float], came: bool) -> None:
    made = [
        s._replace(grad_nK=torch.zeros_like(s.grad_nK), intended_AnK=torch.full_like(s.intended_AnK, 1e-3 * size))
        for s, size in zip(steps(4), sizes, strict=True)
    ]
    for t in read(as_window(made)).tensors:
        assert t.zero_gradient_fraction is not None and (t.zero_gradient_fraction < 1) is came


@pytest.mark.parametrize("scale", [4e-3, 5e-4])
def test_at_the_critical_learning_rate_half_of_the_updates_are_lost(scale: float) -> None:
    made = steps(16, scale)
    for t in read(as_window(made, lr=1e-3)).tensors:
        assert t.critical_lr is not None
        slow = Slow(made, 0, int(t.name[1:]))
        w, d = np.concatenate(slow.before), np.concatenate(slow.intended)
        w, d = w[d != 0], d[d != 0] * t.critical_lr / 1e-3
        lost = BF16.absorbs(torch.tensor(w).float(), torch.tensor(d).float()).double().mean()
        assert float(lost) == pytest.approx(0.5, abs=0.08)


def test_fp32_weights_tell_what_bf16_would_lose() -> None:
    made = [s._replace(before_AnK=s.before_AnK * 1.0013) for s in steps(4, 2e-3)]  # no longer on the BF16 grid
    for t in read(as_window(made, FP32)).tensors:
        slow = Slow(made, 0, int(t.name[1:]))
        w, d = (torch.tensor(np.concatenate(x)).float() for x in (slow.before, slow.intended))
        lost = (w.bfloat16().double() + d.double()).float().bfloat16() == w.bfloat16()
        assert t.what_if is not None
        assert t.what_if["bfloat16"] == pytest.approx(float(lost[d != 0].double().mean()), abs=1e-5)
    assert all(t.what_if is None for t in read(as_window(made, BF16)).tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["before_AnK", "intended_AnK", "after_AnK"])
def test_one_nan_or_infinity_makes_its_row_not_finite_and_no_other(where: str, value: float) -> None:
    made = steps(6)
    spoilt = getattr(made[3], where).clone()
    spoilt[0, 1, 5] = value
    made[3] = made[3]._replace(**{where: spoilt})
    found = {t.name: t for t in read(as_window(made)).tensors}
    assert [found[f"t{i}"].finite for i in range(N)] == [True, False, True, True]
    assert found["t0"].numbers.efficiency is not None and found["t1"].numbers.efficiency is None


def test_nan_behind_the_mask_does_no_harm() -> None:
    made = [Step(*(x.clone() if isinstance(x, Tensor) else x for x in s)) for s in steps(6, masked=True)]
    for s in made:
        assert s.mask_nK is not None
        for tensor in (s.before_AnK, s.intended_AnK, s.after_AnK):
            tensor[:, s.mask_nK == 0] = float("nan")
        s.grad_nK[s.mask_nK == 0] = float("nan")
    assert all(t.finite and t.numbers.efficiency is not None for t in read(as_window(made)).tensors)


def test_where_nothing_is_wanted_nothing_is_known() -> None:
    made = [s._replace(intended_AnK=torch.zeros(A, N, K), after_AnK=s.before_AnK) for s in steps(3)]
    for t in read(as_window(made, lr=1e-3)).tensors:
        assert t.numbers.wanted_fraction == 0
        assert t.numbers.efficiency is t.numbers.lost_fraction is t.numbers.displacement_efficiency is None
        assert t.headroom_histogram is t.critical_lr is None
        assert t.finite and t.update_ratio == 0 and t.changed_fraction == 0


def test_a_vector_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the vector of sums has 10 values, \d+ expected"):
        WindowSums.unpack(np.zeros(10), Layout(1, 0, 1, False))


def test_the_ratio_of_a_few_cells_is_right_in_the_mean() -> None:
    """Heavy tails: of the cells that carry most, most arrives, and samples that met none of them count as much."""
    rows, cells = 4000, 64
    rng = np.random.default_rng(0)
    layout = Layout(1, 0, rows, False)
    want = rng.lognormal(0.0, 1.0, (rows, cells))
    dot = want * np.clip(0.3 * want, 0.0, 1.0)
    every = rng.lognormal(0.0, 1.0, 2_000_000)
    truth = (every * np.clip(0.3 * every, 0.0, 1.0)).sum() / every.sum()
    sums = WindowSums.unpack(np.zeros(layout.spans()["parts_PFn"].stop), layout)
    for kind, values in ((DOT, dot), (WANT, want), (CROSS, dot * want), (SQUARE, want * want)):
        sums.parts_PFn[0, kind] = values.sum(1)
    sums.parts_PFn[0, [COUNT, BEFORE]] = cells
    none, one = np.zeros(rows), np.ones((1, rows))
    groups_Gn = np.full((GROUPS, rows), 1 / GROUPS)
    steps = Steps(one, groups_Gn, 8 * groups_Gn, none, np.ones(1), none > 0, none == 0, none)
    found = sums.numbers(steps, Unseen(none + np.nan, none, none + np.nan))["efficiency"]
    biased = dot.sum(1) / want.sum(1)
    assert abs(found.mean() - truth) < 0.2 * abs(biased.mean() - truth)
    assert np.abs(found - truth).mean() < 1.05 * np.abs(biased - truth).mean()


@pytest.mark.parametrize("spread", [1.0, 1.5])
def test_two_standard_errors_of_an_update_ratio_cover_it_where_tails_are_heavy(spread: float) -> None:
    rows, cells = 2000, 16
    rng = np.random.default_rng(0)
    layout = Layout(PARTS, 0, rows, False)
    sums = WindowSums.unpack(np.zeros(layout.spans()["parts_PFn"].stop), layout)
    want = rng.lognormal(-(spread**2) / 2, spread, (PARTS, cells, rows))  # 1 in the mean
    want *= rng.lognormal(-0.125, 0.5, (PARTS, 1, rows))  # steps differ as well
    sums.parts_PFn[:, WANT], sums.parts_PFn[:, SQUARE] = want.sum(1), (want**2).sum(1)
    sums.parts_PFn[:, [COUNT, BEFORE]] = cells
    none, one, groups_Gn = np.zeros(rows), np.ones((PARTS, rows)), np.full((GROUPS, rows), PARTS / GROUPS)
    steps = Steps(one, groups_Gn, 8 * groups_Gn, none, np.ones(PARTS), none > 0, none == 0, none)
    found = sums.numbers(steps, Unseen(none + np.nan, none, none + np.nan))
    covered = np.abs(found["update_ratio"] - 1) <= 2 * found["update_ratio_error"]
    assert 0.93 <= covered.mean() <= 0.98


def test_a_window_of_fewer_parts_than_steps_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts become one where all are in use: what is told is the same within its errors."""
    found = []
    for parts in (None, 4):
        if parts is not None:
            monkeypatch.setattr(cohort, "parts_for", lambda _: 4)
            monkeypatch.setattr(device_rows, "parts_for", lambda _: 4)
        torch.manual_seed(0)
        named = [(f"w{i}", torch.nn.Parameter(torch.randn(64, 64).bfloat16())) for i in range(20)]
        optimizer = torch.optim.AdamW([p for _, p in named], lr=3e-4)
        with uw.watch(named, optimizer, window=96, budget=None) as watch:
            for _ in range(96):
                for _, p in named:
                    p.grad = torch.randn_like(p)
                optimizer.step()
        assert watch.last is not None
        found.append(watch.last.tensors)
    for one, other in zip(*found, strict=True):
        assert one.efficiency is not None and other.efficiency is not None and one.efficiency_error is not None
        assert abs(one.efficiency - other.efficiency) < 2 * one.efficiency_error
        assert other.efficiency_error is not None and 0.3 < one.efficiency_error / other.efficiency_error < 3
