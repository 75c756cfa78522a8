"""The state factor against full copies of the states in FP64, element by element, over hundreds of steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import optimi
import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import update_watch as uw
from update_watch.measure.accumulators import state_factor as shadow
from update_watch.measure.accumulators.reference_states import FullStates
from update_watch.report import Cause, Health, Report, TensorReport

WINDOW = 64
Make = Callable[[list[Tensor]], Optimizer]
Scale = Callable[[int], float]


def parameters(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=rng).to(dtype)) for n in sizes]


def falling(step: int) -> float:
    """Gradients of a run that settles: what the second moment has seen is to be forgotten."""
    return 1.0 if step < 64 else 0.02


def steady(step: int) -> float:
    return 1.0


class Adam64:
    """Adam in FP64 on all elements: from states of its own, and from those that are stored."""

    def __init__(self, params: list[Tensor], betas: tuple[float, float], decay: float, coupled: bool) -> None:
        self.params, self.betas, self.decay, self.coupled = params, betas, decay, coupled
        self.states: dict[int, tuple[Tensor, Tensor, float]] = {}
        self.sums = torch.zeros(len(params), 2, dtype=torch.float64)

    def step(self, optimizer: Optimizer) -> None:
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            stored: Any = optimizer.state.get(p)
            zero = torch.zeros_like(p, dtype=torch.float64)
            kept = (
                (stored["exp_avg"].double(), stored["exp_avg_sq"].double(), float(stored["step"]))
                if stored
                else (zero, zero, 0.0)
            )
            own, self.states[i] = self._update(p, *self.states.get(i, (zero, zero, 0.0)))
            given, _ = self._update(p, *kept)
            self.sums[i] += torch.stack([(given * own).sum(), (own * own).sum()])

    def _update(self, p: Tensor, m: Tensor, v: Tensor, t: float) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        assert p.grad is not None
        w, g = p.detach().double(), p.grad.double()
        if self.coupled:
            g = g + self.decay * w
        (b1, b2), t = self.betas, t + 1
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        d = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-8)
        return d if self.coupled else d + self.decay * w, (m, v, t)

    def factors(self) -> list[float]:
        """Since asked last."""
        found = [float(a / b) for a, b in self.sums]
        self.sums.zero_()
        return found


def run(
    make: Make,
    params: list[Tensor],
    steps: int,
    scale: Scale = falling,
    truth: Adam64 | None = None,
    before: Callable[[int, Optimizer], Any] = lambda i, o: None,
    window: int = WINDOW,
) -> tuple[list[Report], list[list[float]], uw.Watch]:
    """Train; reports and true factors by window. Gradients change sign, so weights stay about where they are."""
    optimizer = make(params)
    rng = torch.Generator().manual_seed(1)
    reports: list[Report] = []
    factors: list[list[float]] = []
    with uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=window) as watch:
        for i in range(steps):
            for p in params:
                p.grad = (scale(i) * torch.randn(p.shape, generator=rng)).to(p.dtype)
            before(i, optimizer)
            if truth is not None:
                truth.step(optimizer)
            optimizer.step()
            if (i + 1) % window == 0:
                report = watch.flush()
                assert report is not None
                reports.append(report)
                factors.append(truth.factors() if truth is not None else [])
        copies = [watched.shadow._copy for watched in watch._model.watched.values()]
    watch.copies = copies  # type: ignore[attr-defined]
    return reports, factors, watch


def shown(reports: list[Report]) -> list[list[float | None]]:
    return [[t.state_factor for t in report.tensors] for report in reports]


IMPLEMENTATIONS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[] if name == "foreach" else [pytest.mark.slow])
        for name, options in IMPLEMENTATIONS.items()
    ],
)
def test_the_factor_is_that_of_all_elements_against_full_fp64_states(options: dict[str, bool]) -> None:
    params = parameters(48, 2048)
    truth = Adam64(params, (0.9, 0.999), 0.01, coupled=False)
    reports, expected, _ = run(
        lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.999), **options), params, 8 * WINDOW, truth=truth
    )
    for found, true in zip(shown(reports), expected, strict=True):
        # 48 elements are all looked at, at every sixteenth step; of 2048 a sample
        assert found == [pytest.approx(true[0], abs=0.03), pytest.approx(true[1], abs=0.05)]
    assert expected[-1][1] < 0.9  # the second moment does not fall as it should


def test_decay_inside_the_gradient_reaches_the_states() -> None:
    """Half of what the states see is decay here; weights that were read once would show in them."""
    params = parameters(64, 2048)
    truth = Adam64(params, (0.9, 0.99), 2.0, coupled=True)
    make = lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.9, 0.99), weight_decay=2.0)  # noqa: E731
    reports, expected, _ = run(make, params, 3 * WINDOW, steady, truth)
    for found, true in zip(shown(reports), expected, strict=True):
        assert found == [pytest.approx(t, abs=0.02) for t in true]


def test_settings_are_those_of_each_step_although_steps_wait() -> None:
    """The decay rate of the first moment changes from step to step: one taken too late leaves other states."""
    params = parameters(64, 2048)

    def change(step: int, optimizer: Optimizer) -> None:
        betas = (0.5, 0.9) if step % 2 else (0.95, 0.99)
        optimizer.param_groups[0]["betas"] = truth.betas = betas

    truth = Adam64(params, (0.9, 0.9), 0.0, coupled=False)
    make = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0)  # noqa: E731
    reports, _, _ = run(make, params, 2 * WINDOW, steady, truth, before=change)
    assert shown(reports) == [[pytest.approx(1, abs=0.01)] * 2] * 2


HEALTHY: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.9)),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.95), fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.9), amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.9),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3, betas=(0.9, 0.9)),
    "tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), betas=(0.9, 0.9)),
    "lion": lambda p: pytorch_optimizer.Lion(p, lr=1e-4, betas=(0.9, 0.9)),
    "kahan": lambda p: optimi.AdamW(p, lr=1e-4, betas=(0.9, 0.9), kahan_sum=True),
}


@pytest.mark.parametrize("make", HEALTHY.values(), ids=HEALTHY.keys())
@pytest.mark.slow
def test_states_that_take_all_they_should_have_a_factor_of_one(make: Make) -> None:
    reports, _, watch = run(make, parameters(64, 2048), 4 * WINDOW)
    assert shown(reports) == [[pytest.approx(1, abs=0.02)] * 2] * 4
    assert watch.copies[0].steps == 4 * WINDOW - 1  # type: ignore[attr-defined]  # all but the first
    causes = {a.cause for r in reports for t in r.tensors for a in (t, *t.accumulators.values())}
    assert Cause.state_rounding not in causes


def test_fp32_states_need_no_copy() -> None:
    make = lambda p: torch.optim.AdamW(p, lr=1e-3)  # noqa: E731
    reports, _, watch = run(make, parameters(64, 2048, dtype=torch.float32), WINDOW)
    assert shown(reports) == [[None, None]]
    assert watch.copies == [None]  # type: ignore[attr-defined]


def test_a_copy_that_begins_late_begins_with_the_states_as_they_are() -> None:
    """What they had lost by then is not known; what they lose from then on is."""
    params = parameters(64, 2048)
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.99))
    rng = torch.Generator().manual_seed(2)
    for _ in range(200):
        for p in params:
            p.grad = torch.randn(p.shape, generator=rng).to(p.dtype)
        optimizer.step()
    reports, _, watch = run(lambda _: optimizer, params, WINDOW, steady)
    assert shown(reports) == [[pytest.approx(1, abs=0.02)] * 2]
    assert watch.copies[0].steps == WINDOW - 1  # type: ignore[attr-defined]


def test_states_are_asked_for_their_format_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def ask(row: Any, state: Any) -> list[str]:
        asked.append(row)
        return []

    monkeypatch.setattr(shadow, "short_states", ask)
    run(lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), parameters(64), 12 * 8, window=8)
    assert len(asked) == 4  # in windows 0, 1, 3 and 7


def test_states_that_follow_the_weight_are_left_out() -> None:
    """Kept in FP32, an average of the weights would leave a weight that stalls behind, which is not the state's fault."""

    def make(p: list[Tensor]) -> Optimizer:
        optimizer = schedulefree.AdamWScheduleFree(p, lr=1e-3)
        optimizer.train()
        return optimizer

    reports, _, watch = run(make, parameters(64, 2048), WINDOW)
    assert shown(reports) == [[None, None]]
    assert watch.copies == [None]  # type: ignore[attr-defined]


class ShortCounter(Optimizer):
    """Adam that counts its steps in BF16, as some do."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.bfloat16)
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                state["step"] += 1
                grad = p.grad.float()
                state["exp_avg"].lerp_(grad, 0.1)
                state["exp_avg_sq"].mul_(0.999).addcmul_(grad, grad, value=0.001)
                t = state["step"].float()
                correction = (1 - 0.9**t) / (1 - 0.999**t).sqrt()
                p.sub_((group["lr"] * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-12) / correction).to(p.dtype))


@pytest.mark.slow
def test_a_counter_that_stops_is_seen_in_the_updates() -> None:
    """At 256 of 1000 steps sqrt(1 - 0.999^t) is 0.476 and not 0.795."""
    reports, _, _ = run(ShortCounter, parameters(64, 2048), 15 * WINDOW, steady)
    found = shown(reports)
    assert found[2] == [pytest.approx(1, abs=1e-3)] * 2
    steps = range(14 * WINDOW + 15, 15 * WINDOW, 16)
    expected = sum(((1 - 0.999**256) / (1 - 0.999**t)) ** 0.5 for t in steps) / len(steps)
    assert found[14] == [pytest.approx(expected, abs=0.01)] * 2


class Kahan(Optimizer):
    """Momentum with a remainder in every format, FP32 too."""

    def __init__(self, params: Any, lr: float = 1e-5) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"], state["remainder"] = torch.zeros_like(p), torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 0.5)
                update = state["remainder"] - group["lr"] * state["momentum"]
                before = p.clone()
                p.add_(update)
                state["remainder"].copy_(update - (p - before))


def test_a_remainder_of_the_weight_is_no_part_of_the_update() -> None:
    """Updates a hundredth of half a gap: what is carried is far larger than they are."""
    reports, _, _ = run(Kahan, parameters(64, 2048), 2 * WINDOW, steady)
    assert "remainder" in reports[0].tensors[1].accumulators
    assert shown(reports) == [[pytest.approx(1, abs=0.02)] * 2] * 2


def test_a_stall_of_the_state_is_said_of_the_tensor_with_its_factor_and_its_cure() -> None:
    """Updates far above half an ulp: the weights take all, and all of it is too small."""
    params = parameters(2048)

    def shrink(step: int, optimizer: Optimizer) -> None:
        if step in (0, WINDOW):
            params[0].data.zero_()

    make = lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.998), weight_decay=0.0)  # noqa: E731
    reports, _, _ = run(make, params, 10 * WINDOW, before=shrink)
    t: TensorReport = reports[-1].tensors[0]
    assert t.efficiency is not None and t.efficiency > 0.9
    assert (t.health, t.cause) == (Health.stalling, Cause.state_rounding)
    assert t.state_factor is not None and t.state_factor < 0.6
    said = f"and the updates are {t.state_factor:.2f} of what FP32 state would give"
    assert said in t.advice and "keep the optimizer state in FP32" in t.advice
    assert said in t.accumulators["exp_avg_sq"].advice


def test_a_stalled_state_says_how_little_it_has_done_so_far() -> None:
    make = lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.999))  # noqa: E731
    reports, _, _ = run(make, parameters(64, 2048), 5 * WINDOW)
    state = reports[-1].tensors[1].accumulators["exp_avg_sq"]
    assert state.cause is Cause.state_rounding
    assert "so it can grow but not shrink (so far the updates are " in state.advice and "retune" not in state.advice


def test_steps_a_scaler_skips_are_skipped_by_the_copy() -> None:
    def scaler(step: int, optimizer: Any) -> None:
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(step % 5 == 1)), torch.tensor(4.0)
        for p in optimizer.param_groups[0]["params"]:
            p.grad *= 4.0
            if step % 5 == 1:
                p.grad.fill_(float("inf"))

    make = lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.9), fused=True)  # noqa: E731
    reports, _, watch = run(make, parameters(64, 2048), 2 * WINDOW, steady, before=scaler)
    assert shown(reports) == [[pytest.approx(1, abs=0.01)] * 2] * 2
    assert watch.copies[0].steps == 2 * WINDOW - 1  # type: ignore[attr-defined]


def test_tensors_whose_gradients_come_and_go_leave_the_others_right() -> None:
    params = parameters(2048, 2048, 2048, 48)
    truth = Adam64(params, (0.9, 0.999), 0.01, coupled=False)

    def drop(step: int, optimizer: Optimizer) -> None:
        if step % 3 == 2:
            params[1].grad = None
        if step % 7 == 6:  # no gradient at all: nothing is done
            for p in params:
                p.grad = None

    make = lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.999), fused=True)  # noqa: E731
    reports, expected, _ = run(make, params, 8 * WINDOW, truth=truth, before=drop)
    for found, true in zip(shown(reports), expected, strict=True):
        assert found[1] is None
        assert [found[i] for i in (0, 2, 3)] == [pytest.approx(true[i], abs=0.05) for i in (0, 2, 3)]
    assert expected[-1][0] < 0.9


@pytest.mark.parametrize("is_loaded", [True, False], ids=["load_state_dict", "in place"])
def test_a_state_that_somebody_writes_to_begins_a_new_copy(is_loaded: bool) -> None:
    def restore(step: int, optimizer: Optimizer) -> None:
        if step == WINDOW + 20:
            if is_loaded:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for state in optimizer.state.values():
                state["exp_avg_sq"].mul_(9)

    params = parameters(64, 2048)
    make = lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.9))  # noqa: E731
    reports, _, watch = run(make, params, 2 * WINDOW, steady, before=restore)
    assert shown(reports) == [[pytest.approx(1, abs=0.02)] * 2] * 2
    assert watch.copies[0].steps == WINDOW - 21  # type: ignore[attr-defined]


def test_a_parameter_added_later_does_not_end_the_copy() -> None:
    params, late = parameters(64, 2048), parameters(512)

    def add(step: int, optimizer: Optimizer) -> None:
        if step == WINDOW + 20:
            optimizer.add_param_group({"params": late})

    make = lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.9))  # noqa: E731
    _, _, watch = run(make, params, 2 * WINDOW, steady, before=add)
    assert watch.copies[0].steps == 2 * WINDOW - 1  # type: ignore[attr-defined]


def test_a_rule_that_fails_on_copies_costs_the_factor_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FullStates) -> None:
        raise RuntimeError("a rule that does not run")

    monkeypatch.setattr(FullStates, "advance", fail)
    make = lambda p: torch.optim.AdamW(p, lr=1e-3)  # noqa: E731
    reports, _, _ = run(make, parameters(64, 2048), 2 * WINDOW)
    assert shown(reports) == [[None, None]] * 2
    assert all(t.efficiency is not None for r in reports for t in r.tensors)


class Count(TorchDispatchMode):
    """Operators that do something: views are free."""

    VIEWS = ("as_strided", "view", "select", "slice", "unsqueeze", "detach", "alias", "transpose", "expand")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name not in self.VIEWS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
def test_a_step_costs_few_operators_however_many_tensors_there_are(options: dict[str, bool]) -> None:
    params = parameters(*[256] * 40)
    groups = [{"params": params[:30]}, {"params": params[30:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, **options)
    with uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=10**6) as watch:
        running = next(iter(watch._model.watched.values())).shadow
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert running._copy is not None and len(running._copy.rows) == 8 and len(running._copy._spans) == 2
        counted = []
        for _ in range(32):
            with torch.no_grad(), Count() as count:
                running.before()
            counted.append(len(count.seen))
            running._copy.mark()
    assert max(counted[:15]) <= 3  # gradients are taken and wait
    assert sum(counted) / len(counted) <= 30


def test_weights_and_states_are_bit_identical_with_a_copy() -> None:
    def train(watched: bool) -> list[Tensor]:
        params = parameters(64, 2048)
        optimizer = torch.optim.Adam(params, lr=1e-2, weight_decay=0.5)
        watch = uw.watch([("a", params[0]), ("b", params[1])], optimizer, window=8) if watched else None
        rng = torch.Generator().manual_seed(1)
        for _ in range(40):
            for p in params:
                p.grad = torch.randn(p.shape, generator=rng).to(p.dtype)
            optimizer.step()
        if watch is not None:
            held = next(iter(watch._model.watched.values())).shadow._copy
            assert held is not None and held.steps == 39
            watch.close()
        states = [v for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        return [p.detach() for p in params] + states

    assert all(map(torch.equal, train(False), train(True)))
