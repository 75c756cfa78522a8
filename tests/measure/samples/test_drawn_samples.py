"""Samples drawn where a gradient is: each cell counts as often as it should, and few touched rows are enough for a verdict."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor

import update_watch as uw
from update_watch.measure import position_weights
from update_watch.measure.position_weights import Normalised, draw
from update_watch.measure.sampling import Sampler
from update_watch.report import Health, TensorReport

V, D, STEPS = 4096, 32, 64


def few_rows(share: float = 0.01, seed: int = 0) -> Tensor:
    """A gradient of which few rows are not 0, of sizes that differ by far."""
    drawn = torch.Generator().manual_seed(seed)
    grad = torch.zeros(V, D)
    rows = torch.randint(0, V, (max(int(share * V), 1),), generator=drawn)
    sizes = torch.randn(len(rows), 1, generator=drawn).mul(0.7).exp()
    grad[rows] = torch.randn(len(rows), D, generator=drawn) * sizes
    return grad.bfloat16()


@pytest.mark.parametrize("most", [2**20, 2**13], ids=["of all cells", "of some"])
def test_a_drawn_sample_weighs_as_much_less_as_it_is_met_more_often(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position_weights, "_TO_DRAW_FROM", most)
    grad, sampler, rng = few_rows(), Sampler(torch.zeros(V, D), 256, 2), random.Random(0)
    values = torch.arange(V, dtype=torch.float64).view(V, 1).expand(V, D).contiguous()
    squares = grad.double().square()
    counted = valued = touched = 0.0
    turns = 1500
    for _ in range(turns):
        (weights_D,) = draw([sampler], [grad], 2, rng)
        assert weights_D.shape == (16,) and 0 < weights_D.min() and weights_D.max() <= 2.0 * 1.01
        cells_DB = sampler.view(values).view(16, 16)
        counted += float(weights_D.sum()) / 16
        valued += float((weights_D * cells_DB.mean(1)).sum()) / 16
        touched += float((weights_D * sampler.view(squares).view(16, 16).mean(1)).sum()) / 16
    assert counted / turns == pytest.approx(1.0, abs=0.02)
    assert valued / turns == pytest.approx(float(values.mean()), rel=0.04)
    assert touched / turns == pytest.approx(float(squares.mean()), rel=0.02 if most > V * D else 0.1)


@pytest.mark.parametrize("odd", [0.0, float("nan"), float("inf")])
def test_of_a_gradient_that_says_nothing_samples_are_drawn_evenly(odd: float) -> None:
    sampler = Sampler(torch.zeros(V, D), 256, 2)
    (weights_D,) = draw([sampler], [torch.full((V, D), odd)], 2, random.Random(0))
    assert torch.allclose(weights_D, torch.ones(16)) and sampler.drawn is not None
    assert len(sampler.drawn.unique()) == 16 and int(sampler.drawn.max()) < V * D // 16


@pytest.mark.parametrize("has_mean", [True, False], ids=["adam", "rmsprop"])
def test_where_a_rule_divides_by_a_second_moment_cells_are_drawn_by_its_updates(has_mean: bool) -> None:
    """Seldom words: small gradients, smaller second moments, and the largest updates."""
    drawn, rng = torch.Generator().manual_seed(0), random.Random(0)
    often = torch.logspace(0, -4, V).unsqueeze(1).expand(V, D)  # by frequency
    is_touched = torch.rand(V, 1, generator=drawn) < often
    square = (often * 1e-4).contiguous().bfloat16()
    grad = (torch.randn(V, D, generator=drawn) * is_touched * 1e-2).bfloat16()
    mean = (0.1 * torch.randn(V, D, generator=drawn) * 1e-2 * often).bfloat16()
    way = mean.float() + 0.1 * grad.float() if has_mean else grad.float()
    updates = way.double().square().div(square.double() + 1e-3 * grad.double().square())
    sampler, truth = Sampler(torch.zeros(V, D), 256, 2), float(updates.mean())
    sized = [grad, *([mean] if has_mean else []), square]

    def told(normalised: Normalised | None) -> Tensor:
        found = []
        for _ in range(400):
            (weights_D,) = draw([sampler], sized, 2, rng, normalised)
            found.append((weights_D * sampler.view(updates).view(16, 16).mean(1)).mean())
        return torch.stack(found) / truth

    by_updates = told(Normalised(grad, square, mean if has_mean else None))
    assert float(by_updates.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(by_updates.std()) < 0.7 * float(told(None).std())


def test_drawing_leaves_what_it_reads_as_it_was() -> None:
    """In FP32 nothing is converted: an operation in place would be one on the training's own."""
    read = [torch.randn(V, D) for _ in range(3)]
    kept = [one.clone() for one in read]
    draw([Sampler(torch.zeros(V, D), 256, 2)], read, 2, random.Random(0), Normalised(*read))
    assert all(torch.equal(one, other) for one, other in zip(read, kept, strict=True))


@pytest.mark.parametrize("odd", [0.0, float("nan"), float("inf")])
def test_second_moments_that_say_nothing_change_nothing(odd: float) -> None:
    sampler = Sampler(torch.zeros(V, D), 256, 2)
    nothing = Normalised(torch.full((V, D), odd), torch.zeros(V, D), torch.full((V, D), odd))
    (weights_D,) = draw([sampler], [torch.zeros(V, D)], 2, random.Random(0), nothing)
    assert torch.allclose(weights_D, torch.ones(16))


def test_drawn_samples_are_the_same_elements_in_any_layout_until_the_next_place() -> None:
    values, rng = torch.arange(V * D, dtype=torch.float64).view(V, D), random.Random(0)
    sampler = Sampler(values, 256, 2)
    draw([sampler], [few_rows()], 2, rng)
    seen = sampler.view(values)
    assert torch.equal(sampler.view(values.t().contiguous().t()), seen)
    assert float((few_rows().flatten()[seen.flatten().long()] != 0).double().mean()) > 0.2  # of all elements 0.01
    sampler.redraw(rng)
    assert sampler.drawn is None and not torch.equal(sampler.view(values), seen)


def train(momentum: float, lr: float, is_watched: bool = True) -> tuple[list[TensorReport], list[float], Tensor, bool]:
    """An embedding of which a step uses few rows, among others in turns: its reports, the truth of each window, its weights
    at the end, and whether samples of it were drawn."""
    torch.manual_seed(0)
    embedding = torch.nn.Parameter((0.05 * torch.randn(V, D)).bfloat16())
    others = [torch.nn.Parameter(torch.randn(16, 32).bfloat16()) for _ in range(20)]
    params = [embedding, *others]
    optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum)
    watch = uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=STEPS, budget=None)
    if not is_watched:
        watch.close()
    reports, truth, was_drawn, way = [], [], False, torch.zeros(V, D)
    for window in range(3):
        dot = want = 0.0
        for step in range(STEPS):
            for p in others:
                p.grad = torch.randn_like(p)
            embedding.grad = few_rows(seed=1 + STEPS * window + step)
            way = momentum * way + embedding.grad.float()
            before, intended = embedding.detach().double(), -lr * way.double()
            optimizer.step()
            dot += float(((embedding.detach().double() - before) * intended).sum())
            want += float(intended.square().sum())
            for one in watch._model.watched.values() if is_watched else ():
                for cohort in one.cohorts:
                    was_drawn |= any(sampler.drawn is not None for sampler in cohort.samplers)
        truth.append(dot / want)
        report = watch.flush() if is_watched else None
        reports += [] if report is None else [t for t in report.tensors if t.name == "p0"]
    watch.close()
    return reports, truth, embedding.detach(), was_drawn


@pytest.mark.parametrize(
    ("momentum", "lr", "health"),
    [
        (0.0, 3e-4, Health.healthy),
        (0.0, 1e-6, Health.stalled),
        (0.9, 3e-4, Health.healthy),
        (0.9, 1e-6, Health.stalled),
    ],
)
def test_an_embedding_of_which_steps_use_few_rows_is_judged(momentum: float, lr: float, health: Health) -> None:
    reports, truth, weights, was_drawn = train(momentum, lr)
    assert was_drawn
    errors = [report.efficiency_error or 1.0 for report in reports]
    assert momentum or errors[0] > 3 * max(errors[1:])  # what was met by chance says next to nothing
    for report, true in zip(reports[1:], truth[1:], strict=True):
        assert report.health is health
        assert report.efficiency is not None and report.efficiency_error is not None
        assert abs(report.efficiency - true) < 2.5 * report.efficiency_error < 0.15
    assert torch.equal(train(momentum, lr, is_watched=False)[2], weights)


def test_what_is_told_once_is_forgotten_where_gradients_come_everywhere() -> None:
    sampler_rows = copy.copy(few_rows())
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(V, D).bfloat16()) for _ in range(18)]
    optimizer = torch.optim.SGD(params, lr=1e-2)
    with uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=16, budget=None) as watch:
        (watched,) = watch._model.watched.values()
        for window in range(3):
            for _ in range(16):
                for p in params:
                    p.grad = sampler_rows if window == 0 else torch.randn(V, D).bfloat16()
                optimizer.step()
            watch.flush()
            told = [cohort._drawn for cohort in watched.cohorts]
            assert all(told) if window == 0 else not any(told)


def few_large_rows(step: int) -> Tensor:
    """A gradient of which few rows hold nearly all, others at each step, and some of them again and again."""
    drawn = torch.Generator().manual_seed(step)
    grad = 0.01 * torch.randn(V, D, generator=drawn)
    rows = torch.cat([torch.arange(8), torch.randint(0, V, (8,), generator=drawn)])
    grad[rows] += torch.randn(16, D, generator=drawn)
    return grad.bfloat16()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_of_few_tensors_those_that_few_rows_carry_are_known_at_once(momentum: float) -> None:
    """Beside an even one, which is drawn from in its first window only."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter((0.05 * torch.randn(V, D)).bfloat16()) for _ in range(2)]
    lr = 3e-4
    optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum)
    few, even = params
    way = torch.zeros(V, D)
    with uw.watch([("few", few), ("even", even)], optimizer, window=32, budget=None, samples=64) as watch:
        ((cohort,),) = (one.cohorts for one in watch._model.watched.values())
        assert [cohort.rows[i].names for i in cohort._drawn] == [("few",), ("even",)]
        for window in range(2):
            dot = want = 0.0
            for step in range(32):
                few.grad, even.grad = few_large_rows(32 * window + step), torch.randn(V, D).bfloat16()
                way = momentum * way + few.grad.float()
                before, intended = few.detach().double(), -lr * way.double()
                optimizer.step()
                dot += float(((few.detach().double() - before) * intended).sum())
                want += float(intended.square().sum())
            report = watch.flush()
            assert report is not None
            assert [cohort.rows[i].names for i in cohort._drawn] == [("few",)]
            (tensor,) = (t for t in report.tensors if t.name == "few")
            assert tensor.efficiency is not None and tensor.efficiency_error is not None and 0.1 < dot / want < 0.999
            assert abs(tensor.efficiency - dot / want) < min(0.015, 2.5 * tensor.efficiency_error)


@pytest.mark.parametrize("moves_first", [False, True])
def test_a_set_that_is_kept_stays_beside_those_that_are_drawn(moves_first: bool) -> None:
    values = torch.arange(V * D, dtype=torch.float64).view(V, D)
    samplers = [Sampler(values, 256, 2, slice(start, start + V * D // 2)) for start in (0, V * D // 2)]
    shares = (2**31, 2**30) if moves_first else (2**30, 2**31)
    kept = []
    for sampler in samplers:
        sampler.place(shares[0], shares[0])
        kept.append(sampler.view(values)[0].clone())
        sampler.place(*shares)
    weights = draw(samplers, [few_rows(), torch.zeros(V, D)], 1, random.Random(0))
    assert [len(one) for one in weights] == [8, 8]
    for sampler, own in zip(samplers, kept, strict=True):
        sets = sampler.view(values)
        assert torch.equal(sets[int(moves_first)], own)
        assert sampler.drawn is not None
        assert torch.equal(sets[1 - int(moves_first)], values.view(-1, 16)[sampler.drawn])
        assert torch.equal(sampler.view(values.t().contiguous().t()), sets)


@pytest.mark.parametrize(("window", "are_told"), [(8, False), (256, True)])
def test_a_few_cells_do_not_tell_that_few_carry_a_tensor(window: int, are_told: bool) -> None:
    """In windows of eight steps each tensor is measured in one of them."""
    drawn = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(64, 64, generator=drawn).bfloat16()) for _ in range(18)]
    optimizer = torch.optim.SGD(params, lr=1e-2)
    with uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=window, budget=None) as watch:
        for _ in range(window):
            for p in params:
                sizes = torch.randn(64, 4, 1, generator=drawn).mul(3.0).exp().expand(64, 4, 16).reshape(64, 64)
                p.grad = (torch.randn(64, 64, generator=drawn) * sizes * 1e-3).bfloat16()
            optimizer.step()
        watch.flush()
        assert any(cohort._drawn for one in watch._model.watched.values() for cohort in one.cohorts) == are_told


def test_seldom_words_under_adam_are_drawn_by_their_updates() -> None:
    """By gradient and moments they are hardly met, though they make most of what moves: errors of 0.1 and more."""
    drawn = torch.Generator().manual_seed(0)
    embedding = torch.nn.Parameter((0.05 * torch.randn(V, D, generator=drawn)).bfloat16())
    params = [embedding, *(torch.nn.Parameter(torch.randn(16, 32, generator=drawn).bfloat16()) for _ in range(20))]
    optimizer = torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0)
    for p in params:  # in FP32: what is lost is the weights' alone
        optimizer.state[p] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    often = torch.logspace(-0.3, -4, V)
    off = []
    with uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=STEPS, budget=None) as watch:
        for window in range(4):
            dot = want = 0.0
            for _ in range(STEPS):
                is_touched = torch.rand(V, 1, generator=drawn) < often.unsqueeze(1)
                for p in params:
                    p.grad = torch.randn(p.shape, generator=drawn).bfloat16()
                embedding.grad = (torch.randn(V, D, generator=drawn) * is_touched).bfloat16()
                before = embedding.detach().double()
                optimizer.step()
                state = optimizer.state[embedding]
                t = float(state["step"])
                mean, square = state["exp_avg"].double() / (1 - 0.9**t), state["exp_avg_sq"].double() / (1 - 0.999**t)
                intended = -2e-4 * mean / (square.sqrt() + 1e-8)
                dot += float(((embedding.detach().double() - before) * intended).sum())
                want += float(intended.square().sum())
            report = watch.flush()
            if window > 1 and report is not None:  # from the second on they are drawn
                (told,) = [t for t in report.tensors if t.name == "p0"]
                assert told.efficiency is not None
                off.append(told.efficiency - dot / want)
    assert max(map(abs, off)) < 0.05
