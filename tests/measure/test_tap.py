"""The tap sees each step once, with this step's gradients and the weights around it, and never disturbs training.

Most cases check values: with SGD, `after == before - lr * grad` holds bit for bit only if the snapshot was taken at
the right moment and joined to the right step.
"""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from tests.support.tap_recorder import LR, Recorder, backward, hooks, make_closure
from update_watch.measure.hooks.tap import StepTap

# --- what a step shows ----------------------------------------------------------------------------


def test_plain_step_shows_weights_and_gradients_around_the_update(
    recorder: Recorder, param: torch.nn.Parameter
) -> None:
    opt = SGD([param], lr=LR)
    recorder.tap.attach(opt)
    for _ in range(3):
        backward(param)
        opt.step()
    recorder.assert_sgd(3)
    assert recorder.tap.missed == 0


@pytest.mark.parametrize("keyword", [True, False], ids=["keyword", "positional"])
def test_closure_gradients_are_those_of_this_step(recorder: Recorder, param: torch.nn.Parameter, keyword: bool) -> None:
    opt = SGD([param], lr=LR)
    recorder.tap.attach(opt)
    closure = make_closure(param, opt)
    param.grad = torch.full_like(param, 77.0)  # stale: what the pre-hook would see
    for _ in range(3):
        expected = (param.detach() ** 3).sum()
        loss = opt.step(closure=closure) if keyword else opt.step(closure)  # type: ignore[call-overload]
        assert loss is not None and torch.equal(loss, expected)
    recorder.assert_sgd(3)
    assert all(grad is not None and grad.max() < 77.0 for _, grad, _ in recorder.steps)


def test_closure_called_many_times_is_seen_at_its_first_return(recorder: Recorder, param: torch.nn.Parameter) -> None:
    opt = torch.optim.LBFGS([param], lr=0.1, max_iter=4)
    recorder.tap.attach(opt)
    calls = []
    closure = make_closure(param, opt)

    def counted() -> Tensor:
        calls.append(param.detach().clone())
        return closure()

    opt.step(counted)  # type: ignore[arg-type]
    assert len(calls) == 4
    assert len(recorder.steps) == 1
    before, grad, after = recorder.steps[0]
    assert torch.equal(before, calls[0]) and grad is not None and torch.equal(grad, 3 * calls[0] ** 2)
    assert torch.equal(after, param.detach())


def test_nested_and_double_firing_is_one_step(recorder: Recorder, param: torch.nn.Parameter) -> None:
    class Child(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    SGD([torch.nn.Parameter(torch.ones(1))], lr=LR)  # patches the parent's step, so that the child fires twice
    opt = Child([param], lr=LR)
    firings: list[int] = []
    opt.register_step_pre_hook(lambda *_: firings.append(1))
    recorder.tap.attach(opt)
    for closure in (None, make_closure(param, opt)):
        backward(param)
        opt.step(closure)
    assert len(firings) == 4
    recorder.assert_sgd(2)


def test_an_optimizer_stepping_inside_anothers_step_is_a_step_of_its_own(recorder: Recorder) -> None:
    inner_param, outer_param = (torch.nn.Parameter(torch.linspace(1.0, 2.0, 5)) for _ in range(2))
    inner = SGD([inner_param], lr=LR)

    class Outer(SGD):
        def step(self, closure: Any = None) -> Any:
            inner.step()
            outer_param.data.sub_(LR * outer_param.grad)  # type: ignore[operator]

    outer = Outer([outer_param], lr=LR)
    recorder.tap.attach(outer)
    recorder.tap.attach(inner)
    backward(inner_param), backward(outer_param)
    outer.step()
    recorder.assert_sgd(2)
    assert [opt is inner for opt in recorder.tap.attached] == [False, True]


def test_several_optimizers_keep_their_steps_apart(recorder: Recorder) -> None:
    params = [torch.nn.Parameter(torch.linspace(1.0, 2.0, 5) * k) for k in (1, 2)]
    opts = [SGD([p], lr=LR) for p in params]
    for opt in opts:
        recorder.tap.attach(opt)
    starts = [p.detach().clone() for p in params]
    for p in params:
        backward(p)
    for opt in opts:
        opt.step()
    recorder.assert_sgd(2)
    assert all(torch.equal(step[0], start) for step, start in zip(recorder.steps, starts, strict=True))


def test_a_replaced_optimizer_is_seen_once_attached_and_the_old_one_no_more_once_detached(
    recorder: Recorder, param: torch.nn.Parameter
) -> None:
    old, new = SGD([param], lr=LR), SGD([param], lr=LR)
    recorder.tap.attach(old)
    backward(param)
    old.step()
    recorder.tap.detach(old)
    recorder.tap.attach(new)
    for opt in (old, new):
        backward(param)
        opt.step()
    recorder.assert_sgd(2)
    assert hooks(old) == (0, 0)


def test_scheduler_patched_step_is_seen(recorder: Recorder, param: torch.nn.Parameter) -> None:
    opt = SGD([param], lr=LR)
    scheduler = torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)
    recorder.tap.attach(opt)
    for _ in range(2):
        backward(param)
        opt.step()
        scheduler.step()
    recorder.assert_sgd(2)


@pytest.mark.parametrize("with_closure", [False, True], ids=["plain", "closure"])
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, on import of the compiler
def test_compiled_step_is_seen_without_a_warning(
    recorder: Recorder, param: torch.nn.Parameter, with_closure: bool, recwarn: pytest.WarningsRecorder
) -> None:
    opt = SGD([param], lr=LR)
    recorder.tap.attach(opt)
    if with_closure:
        closure = make_closure(param, opt)
        step = torch.compile(lambda: opt.step(closure), backend="eager")  # type: ignore[arg-type]
    else:
        step = torch.compile(opt.step, backend="eager")
    for _ in range(3):
        backward(param)
        step()
    recorder.assert_sgd(3)
    assert recorder.tap.missed == 0
    assert not [w for w in recwarn.list if "_getframe" in str(w.message)]


@pytest.mark.parametrize("fails", [False, True], ids=["well", "failing"])
def test_before_and_after_run_outside_of_the_steps_precision_context(param: torch.nn.Parameter, fails: bool) -> None:
    seen = []

    def look(opt: Optimizer, snapshot: Any = None) -> None:
        seen.append((torch.is_grad_enabled(), torch.zeros(1).dtype, (param[:, None] @ param[None]).dtype))
        if fails:
            raise ValueError

    tap = StepTap(look, look, lambda error: None)
    opt = SGD([param], lr=LR)
    tap.attach(opt)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            opt.step(make_closure(param, opt))  # type: ignore[arg-type]
            assert torch.is_grad_enabled() and torch.zeros(1).dtype is torch.bfloat16
            assert (param.detach()[:, None] @ param.detach()[None]).dtype is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == [(False, torch.float32, torch.float32)] * (1 if fails else 2)


def test_snapshot_none_is_a_snapshot(param: torch.nn.Parameter) -> None:
    seen: list[Any] = []
    tap = StepTap(lambda opt: None, lambda opt, snapshot: seen.append(snapshot))
    opt = SGD([param], lr=LR)
    tap.attach(opt)
    opt.step()
    assert seen == [None] and tap.missed == 0


def test_scalers_found_inf_is_readable_in_after(param: torch.nn.Parameter) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # type: ignore[attr-defined]
    opt = torch.optim.Adam([param], lr=LR, fused=True)
    seen: list[tuple[float, float]] = []
    tap = StepTap(
        lambda opt: param.clone(),
        lambda opt, before: seen.append((float(opt.found_inf), float((param - before).abs().max()))),
    )
    tap.attach(opt)
    for factor in (1.0, float("inf")):
        opt.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(opt)
        scaler.update()
    assert seen[0][0] == 0.0 and seen[0][1] > 0.0
    assert seen[1] == (1.0, 0.0)
    assert not hasattr(opt, "found_inf")


# --- attaching and detaching -------------------------------------------------------------------------


def test_a_thousand_attach_detach_cycles_leave_no_hook_and_no_reference(recorder: Recorder) -> None:
    param = torch.nn.Parameter(torch.linspace(1.0, 2.0, 5))
    opt = SGD([param], lr=LR)
    for _ in range(1000):
        recorder.tap.attach(opt)
        recorder.tap.attach(opt)
        assert hooks(opt) == (1, 1)
        recorder.tap.detach()
        recorder.tap.detach()
        assert hooks(opt) == (0, 0)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    assert not recorder.tap._hooked and not recorder.tap._live and not recorder.tap._leftover


def test_detached_steps_are_unseen_and_attaching_again_sees_them(recorder: Recorder, param: torch.nn.Parameter) -> None:
    opt = SGD([param], lr=LR)
    for attached in (True, False, True):
        recorder.tap.attach(opt) if attached else recorder.tap.detach()
        backward(param)
        opt.step()
    recorder.assert_sgd(2)


def test_disabled_steps_are_unseen(recorder: Recorder, param: torch.nn.Parameter) -> None:
    opt = SGD([param], lr=LR)
    recorder.tap.attach(opt)
    for enabled in (True, False, True):
        recorder.tap.enabled = enabled
        backward(param)
        opt.step()
    recorder.assert_sgd(2)
    assert recorder.tap.missed == 0


@pytest.mark.parametrize("where", ["pre", "post", "before", "after"])
def test_detach_inside_a_step_does_not_disturb_it(where: str, param: torch.nn.Parameter) -> None:
    """Removing a hook while torch iterates over the hooks raises; ours may ask for it at any moment."""
    tap = StepTap(
        lambda opt: tap.detach() if where == "before" else None,
        lambda opt, _: tap.detach() if where == "after" else None,
    )
    opt = SGD([param], lr=LR)
    tap.attach(opt)
    ran: list[str] = []
    opt.register_step_pre_hook(lambda *_: ran.append("pre"))
    opt.register_step_post_hook(lambda *_: ran.append("post"))
    if where in ("pre", "post"):  # from another thread, in the middle of the step
        register = opt.register_step_pre_hook if where == "pre" else opt.register_step_post_hook
        register(lambda *_: (thread := threading.Thread(target=tap.detach)).start() or thread.join())  # type: ignore[func-returns-value]
        register(lambda *_: ran.append("last"))
    backward(param)
    opt.step()
    assert ran[:1] == ["pre"] and "post" in ran and ("last" in ran) == (where in ("pre", "post"))
    tap.detach()
    assert tap._leftover == [] and tap.attached == ()


def test_copies_of_an_optimizer_are_not_watched(recorder: Recorder, param: torch.nn.Parameter) -> None:
    import copy

    opt = SGD([param], lr=LR)
    recorder.tap.attach(opt)
    twin = copy.deepcopy(opt)
    twin.param_groups[0]["params"][0].grad = torch.ones(5)
    twin.step()
    assert recorder.steps == []


def test_parameters_on_a_device_without_autocast_are_seen() -> None:
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    opt = SGD([param], lr=LR)
    seen: list[Any] = []
    tap = StepTap(lambda opt: param.shape, lambda opt, shape: seen.append(shape))
    tap.attach(opt)
    param.grad = torch.ones_like(param)
    opt.step()
    assert tap.error is None and seen == [(3,)]
