"""Averaged models: the low-precision one that never moves, its FP32 twin, and averages that cannot be judged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import update_watch as uw


def _train(dtype: torch.dtype, average_of: Any, update: Any, steps: int = 64, **settings: Any) -> uw.Report:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.RMSNorm(32)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    average, given = average_of(model)
    with uw.watch(model, optimizer, window=32, averages={"ema": given}, **settings) as watch:
        for step in range(steps):
            model(torch.randn(16, 32, dtype=dtype)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                update(average, model, step)
        report = watch.flush()
    assert report is not None
    return report


def _averaged(model: Any) -> Any:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    return average, average


def _lerp(average: Any, model: Any, step: int) -> None:
    for a, w in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(w.to(a.dtype), 0.001)


def _of(report: uw.Report) -> list[uw.AccumulatorReport]:
    return [t.accumulators["average:ema"] for t in report.tensors]


def test_a_bf16_average_at_decay_0999_is_stalled_with_its_cause() -> None:
    lost: dict[int, list[bool]] = {}  # by parameter, of all its elements that were to move, in the last window

    def update(average: Any, model: Any, step: int) -> None:
        before = [a.detach().double() for a in average.module.parameters()]
        average.update_parameters(model)
        for i, (a, b, w) in enumerate(zip(average.module.parameters(), before, model.parameters(), strict=True)):
            wanted = 0.001 * (w.detach().double() - b)
            if step >= 32:
                lost.setdefault(i, []).extend((a.detach().double() == b)[wanted != 0].tolist())

    report = _train(torch.bfloat16, _averaged, update, budget=None)
    assert {a.cause for a in _of(report)} == {uw.Cause.average_rounding}
    for i, (tensor, a) in enumerate(zip(report.tensors, _of(report), strict=True)):
        truth = sum(lost[i]) / len(lost[i])
        assert a.efficiency is not None and abs(a.efficiency) < 0.02 and truth > 0.95
        # of 256 elements, which are the same in all steps; smaller tensors are read whole
        noise = 3 * max(truth * (1 - truth), 1 / 256) ** 0.5 / 16 if tensor.numel > 256 else 0.002
        assert a.lost_fraction is not None and abs(a.lost_fraction - truth) <= noise


def test_its_fp32_twin_is_healthy_and_arrives_whole() -> None:
    report = _train(torch.float32, _averaged, lambda a, m, _: a.update_parameters(m))
    assert all(a.health is uw.Health.healthy and a.cause is None for a in _of(report))
    assert all(a.efficiency == pytest.approx(1.0, abs=0.002) for a in _of(report))


@pytest.mark.parametrize(("dtype", "rate", "is_lost"), [(torch.bfloat16, 1e-6, True), (torch.float32, 1e-6, False)])
def test_an_average_that_is_written_and_of_which_no_bit_moves_is_stalled_whatever_its_decay(
    dtype: torch.dtype, rate: float, is_lost: bool
) -> None:
    def copied(model: Any) -> Any:
        average = copy.deepcopy(model).to(dtype)
        return average, average  # without its decay

    def seldom(average: Any, model: Any, step: int) -> None:
        if step % 7 == 0:
            for a, w in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(w.to(a.dtype), rate)

    found = _of(_train(torch.float32, copied, seldom))
    assert {(a.health, a.cause) for a in found} == (
        {(uw.Health.stalled, uw.Cause.average_rounding)} if is_lost else {(uw.Health.healthy, None)}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_copy_that_the_first_update_makes_does_not_count(dtype: torch.dtype) -> None:
    """The first window holds it: 1 / (1 - decay) times what an average would have moved by."""
    report = _train(dtype, _averaged, lambda a, m, _: a.update_parameters(m), steps=32)
    assert report.step == 32
    for accumulator in _of(report):
        assert accumulator.efficiency == pytest.approx(1.0 if dtype is torch.float32 else 0.0, abs=0.02)


def test_a_plain_copy_is_judged_with_the_decay_given() -> None:
    def given(model: Any) -> Any:
        average = copy.deepcopy(model)
        return average, (average, 0.999)

    report = _train(torch.bfloat16, given, _lerp)
    assert {a.health for a in _of(report)} == {uw.Health.stalled}


def test_a_plain_copy_without_a_decay_is_unknown_and_says_what_to_give() -> None:
    def given(model: Any) -> Any:
        average = copy.deepcopy(model)
        return average, average

    found = [a for a in _of(_train(torch.bfloat16, given, _lerp)) if a.cause is None]  # some bits of these have moved
    assert found
    for accumulator in found:
        assert accumulator.health is uw.Health.unknown
        assert "averages={'ema': (model, decay)}" in accumulator.advice


def test_an_average_that_is_not_updated_is_not_accused() -> None:
    report = _train(torch.bfloat16, _averaged, lambda *_: None)
    assert {a.health for a in _of(report)} == {uw.Health.unknown}


def test_an_fp32_average_rounded_by_a_validation_swap_is_named() -> None:
    def fp32_copy(model: Any) -> Any:
        average = AveragedModel(copy.deepcopy(model).float(), multi_avg_fn=get_ema_multi_avg_fn(0.999))
        return average, average

    def update(average: Any, model: Any, step: int) -> None:
        _lerp(average.module, model, step)
        if step % 10 == 9:  # validation: the FP32 average goes through the BF16 weights and back
            for a in average.module.parameters():
                a.data.copy_(a.data.bfloat16())

    accumulators = _of(_train(torch.bfloat16, fp32_copy, update))
    assert {a.cause for a in accumulators} == {uw.Cause.average_rounding}
    assert all("swap for validation" in a.advice for a in accumulators)


def test_what_is_no_average_of_the_model_costs_the_average_and_not_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    for other in (torch.nn.Linear(7, 7), 3, [torch.zeros(2)]):
        caplog.clear()
        report = _train(torch.float32, lambda model, other=other: (None, other), lambda *_: None, steps=32)
        assert {t.health for t in report.tensors} == {uw.Health.healthy}
        assert {a.health for a in _of(report)} == {uw.Health.unknown}
        assert all(a.advice.startswith("Unknown, because ") for a in _of(report))
        assert "the average 'ema' is not watched" in caplog.text


def test_a_decay_that_is_none_is_refused() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="decay must be in"):
        uw.watch(model, optimizer, averages={"ema": (copy.deepcopy(model), 1.5)})


# --- whenever it is updated ----------------------------------------------------------------------------


def _given(decay: float) -> Any:
    def average_of(model: Any) -> Any:
        average = copy.deepcopy(model)
        return average, (average, decay)

    return average_of


@pytest.mark.parametrize("period", [1, 2, 3, 4, 7, 10, 50])
@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.slow
def test_updates_are_seen_whatever_their_period(period: int, phase: int) -> None:
    def update(average: Any, model: Any, step: int) -> None:
        if step % period == phase % period:
            _lerp(average, model, step)

    fp32 = _of(_train(torch.float32, _given(0.999), update, steps=128))
    assert all(a.efficiency == pytest.approx(1.0, abs=0.01) for a in fp32 if period < 30 or a.efficiency is not None)
    bf16 = _of(_train(torch.bfloat16, _given(0.999), update, steps=128))
    assert {a.health for a in bf16} <= ({uw.Health.stalled} if period < 30 else {uw.Health.stalled, uw.Health.unknown})


def _through_data(average: Any, model: Any, _: int, rate: float = 0.1) -> None:
    for a, w in zip(average.parameters(), model.parameters(), strict=True):
        a.data.mul_(1 - rate).add_(rate * w.data.to(a.dtype))


@pytest.mark.parametrize("period", [1, 2])
def test_updates_that_no_counter_sees_are_changes_of_values(period: int) -> None:
    def update(average: Any, model: Any, step: int) -> None:
        if step % period == 0:
            _through_data(average, model, step)

    accumulators = _of(_train(torch.float32, _given(0.9), update, steps=256))
    assert all(a.health is uw.Health.healthy for a in accumulators)
    assert all(a.efficiency == pytest.approx(1.0, abs=0.05) for a in accumulators)


def test_an_average_that_is_never_updated_is_told_after_three_windows_and_its_twin_that_is_seldom_is_not() -> None:
    never = _train(torch.float32, _given(0.999), lambda *_: None, steps=96)
    assert {(a.health, a.cause) for a in _of(never)} == {(uw.Health.idle, uw.Cause.average_not_updated)}
    assert all("96 steps in which its weights moved" in a.advice for a in _of(never))
    assert [a.level for a in never.alerts] == [uw.Level.warn]

    def seldom(average: Any, model: Any, step: int) -> None:
        if step == 40:
            _lerp(average, model, step)

    assert {a.cause for a in _of(_train(torch.float32, _given(0.999), seldom, steps=192))} == {None}


def test_an_average_whose_updates_fall_between_two_windows_is_seen() -> None:
    """SWA once an epoch, and epochs as long as windows: after the last step of one, before the first of the next."""

    def update(average: Any, model: Any, step: int) -> None:
        if step % 32 == 31:
            _lerp(average, model, step)

    fp32, bf16 = (_train(dtype, _given(0.999), update, steps=160) for dtype in (torch.float32, torch.bfloat16))
    assert {a.health for a in _of(fp32)} == {uw.Health.healthy}
    assert {a.cause for a in _of(bf16)} == {uw.Cause.average_rounding}


def test_an_average_of_many_tensors_that_is_seldom_updated_is_known_in_all_of_them() -> None:
    """Fewer updates in all of the run than there are chunks of them to look at."""
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(20)])
    optimizer, average = torch.optim.SGD(model.parameters(), lr=0.1), copy.deepcopy(model)
    with uw.watch(model, optimizer, window=32, averages={"ema": (average, 0.999)}) as watch:
        for step in range(4 * 32):
            model(torch.randn(16, 8)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 49:
                with torch.no_grad():
                    _lerp(average, model, step)
        report = watch.flush()
    assert report is not None
    assert {a.health for a in _of(report)} == {uw.Health.healthy}


# --- at whichever rate ----------------------------------------------------------------------------------


def _at_rate(rate: Any) -> Any:
    def update(average: Any, model: Any, step: int) -> None:
        for a, w in zip(average.parameters(), model.parameters(), strict=True):
            a.lerp_(w.to(a.dtype), rate(step))

    return update


def test_a_decay_that_ramps_up_is_no_efficiency_of_hundreds() -> None:
    """min(0.9999, (1 + n) / (10 + n)): diffusers, timm, Karras, ultralytics."""
    ramp = _at_rate(lambda n: 1 - min(0.9999, (1 + n) / (10 + n)))
    fp32 = _of(_train(torch.float32, _given(0.9999), ramp, steps=64))
    assert all(a.health is uw.Health.healthy and a.efficiency == pytest.approx(1.0, abs=0.01) for a in fp32)
    bf16 = _of(_train(torch.bfloat16, _given(0.9999), ramp, steps=64))
    assert all(a.efficiency is not None and a.efficiency < 1.5 for a in bf16)


def test_an_average_that_copies_where_it_should_average_has_another_decay_than_was_said() -> None:
    """decay and 1 - decay have changed places."""
    copied = _of(_train(torch.float32, _given(0.99), _at_rate(lambda _: 0.99)))
    assert {a.health for a in copied} == {uw.Health.unknown}
    assert all("99.00 times what its decay says" in a.advice for a in copied)


def test_an_average_that_runs_away_is_named_in_fp32() -> None:
    away = _of(_train(torch.float32, _given(0.999), _at_rate(lambda _: -0.001)))
    assert {(a.health, a.cause) for a in away} == {(uw.Health.stalled, uw.Cause.average_diverges)}
    assert all(a.efficiency == pytest.approx(-1.0, abs=0.01) for a in away)


def test_an_average_that_moves_slower_than_said_is_no_rounding() -> None:
    slow = _of(_train(torch.float32, _given(0.9), _at_rate(lambda _: 0.03)))
    assert {(a.health, a.cause) for a in slow} == {(uw.Health.stalling, uw.Cause.average_not_updated)}
    assert all(a.efficiency == pytest.approx(0.3, abs=0.01) for a in slow)


def test_equal_averages_are_judged_by_their_number() -> None:
    def swa(model: Any) -> Any:
        average = AveragedModel(model)
        return average, average

    report = _train(torch.float32, swa, lambda a, m, _: a.update_parameters(m), steps=96)
    assert all(a.health is uw.Health.healthy and a.efficiency == pytest.approx(1.0, abs=0.02) for a in _of(report))


def test_equal_averages_begin_late_and_nobody_is_warned_till_then() -> None:
    def swa(model: Any) -> Any:
        average = AveragedModel(model)
        return average, average

    never = _train(torch.float32, swa, lambda *_: None, steps=160)
    assert {(a.health, a.cause) for a in _of(never)} == {(uw.Health.unknown, None)} and not never.alerts
    assert all("begins late, and no update of it was seen so far" in a.advice for a in _of(never))
    begun = _train(torch.float32, swa, lambda a, m, step: step > 100 and a.update_parameters(m), steps=160)
    assert {(a.health, a.cause) for a in _of(begun)} == {(uw.Health.healthy, None)}


# --- as public code keeps them ----------------------------------------------------------------------------


class _ShadowParams:
    """As diffusers' EMAModel and torch-ema: a list in the order of the parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.decay = 0.9
        self.shadow_params = [p.detach().clone() for p in model.parameters()]

    def step(self, model: torch.nn.Module) -> None:
        for s, p in zip(self.shadow_params, model.parameters(), strict=True):
            s.sub_((1 - self.decay) * (s - p.detach()))


class _Shadow(_ShadowParams):
    """As many tutorials: a mapping that holds new tensors after every update."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.decay = 0.9
        self.shadow = {n: p.detach().clone() for n, p in model.named_parameters()}

    def step(self, model: torch.nn.Module) -> None:
        for n, p in model.named_parameters():
            self.shadow[n] = self.decay * self.shadow[n] + (1 - self.decay) * p.detach()


class _Buffers(torch.nn.Module):
    """As LitEma of latent diffusion: buffers, whose names have no dots."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.beta = 0.9
        for n, p in model.named_parameters():
            self.register_buffer(n.replace(".", ""), p.detach().clone())

    def step(self, model: torch.nn.Module) -> None:
        held = dict(self.named_buffers())
        for n, p in model.named_parameters():
            held[n.replace(".", "")].lerp_(p.detach(), 1 - self.beta)


class _Wrapped(torch.nn.Module):
    """As timm's ModelEma and ema-pytorch: a module in a module; here with a prefix of its own as well."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.decay = 0.9
        self.ema_model = torch.nn.ModuleDict({"online": copy.deepcopy(model)})

    def step(self, model: torch.nn.Module) -> None:
        for a, p in zip(self.ema_model.parameters(), model.parameters(), strict=True):
            a.copy_(a * self.decay + (1 - self.decay) * p.detach())


@pytest.mark.parametrize("kind", [_ShadowParams, _Shadow, _Buffers, _Wrapped])
def test_objects_of_public_code_are_read(kind: Any) -> None:
    def average_of(model: Any) -> Any:
        average = kind(model)
        return average, average

    report = _train(torch.float32, average_of, lambda a, m, _: a.step(m), steps=64)
    assert all(a.health is uw.Health.healthy and a.efficiency == pytest.approx(1.0, abs=0.02) for a in _of(report))


def test_a_list_and_a_mapping_are_averages_too() -> None:
    for kind, read in ((_ShadowParams, "shadow_params"), (_Shadow, "shadow")):

        def average_of(model: Any, kind: Any = kind, read: str = read) -> Any:
            average = kind(model)
            return average, (getattr(average, read), 0.9)

        report = _train(torch.float32, average_of, lambda a, m, _: a.step(m), steps=64)
        assert all(a.efficiency == pytest.approx(1.0, abs=0.02) for a in _of(report))
