"""Whatever goes wrong in a step, on the user's side, in other people's hooks or in ours, training is not disturbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from tests.support.tap_recorder import LR, Recorder, backward, hooks, make_closure
from update_watch.measure.hooks.tap import StepTap

# --- steps that go wrong on the user's side ------------------------------------------------------


def test_closure_exception_passes_through_and_the_next_step_is_seen(
    recorder: Recorder, param: torch.nn.Parameter
) -> None:
    opt = SGD([param], lr=LR)
    recorder.tap.attach(opt)
    error = RuntimeError("mine")

    def failing() -> Tensor:
        raise error

    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            opt.step(failing)  # type: ignore[arg-type]
        assert caught.value is error
    opt.step(make_closure(param, opt))  # type: ignore[arg-type]
    recorder.assert_sgd(1)
    assert recorder.tap.error is None


def test_stale_record_of_a_step_that_raised_is_not_joined_to_the_next(
    recorder: Recorder, param: torch.nn.Parameter
) -> None:
    class Sometimes(SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("out of memory")
            param.data.sub_(LR * param.grad)  # type: ignore[operator]

    opt = Sometimes([param], lr=LR)
    recorder.tap.attach(opt)
    backward(param)
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step()
    opt.fails = False
    param.data.mul_(2)
    backward(param)
    opt.step()
    recorder.assert_sgd(1)


def test_a_closure_that_the_rule_never_calls_is_a_missed_step(recorder: Recorder, param: torch.nn.Parameter) -> None:
    class Ignoring(SGD):
        def step(self, closure: Any = None) -> Any:
            return None

    opt = Ignoring([param], lr=LR)
    recorder.tap.attach(opt)
    opt.step(lambda: 0.0)
    assert (len(recorder.steps), recorder.tap.missed, recorder.errors) == (0, 1, [])


def test_second_argument_that_is_no_closure_is_left_alone(recorder: Recorder, param: torch.nn.Parameter) -> None:
    class WithGradients(SGD):
        def step(self, gradients: Any = None) -> Any:
            param.data.sub_(LR * gradients[0])
            return gradients

    opt = WithGradients([param], lr=LR)
    recorder.tap.attach(opt)
    backward(param)
    gradients = [param.grad]
    assert opt.step(gradients) is gradients
    recorder.assert_sgd(1)


# --- other people's hooks --------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["theirs-first", "ours-first"])
def test_a_users_hook_that_replaces_the_closure_keeps_working(
    recorder: Recorder, param: torch.nn.Parameter, first: bool
) -> None:
    opt = SGD([param], lr=LR)
    calls = []

    def replace(opt: Optimizer, args: Any, kwargs: Any) -> Any:
        theirs = args[1]

        def wrapped() -> Any:
            calls.append("theirs")
            return theirs()

        return (args[0], wrapped), kwargs

    if first:
        opt.register_step_pre_hook(replace)
    recorder.tap.attach(opt)
    if not first:
        opt.register_step_pre_hook(replace)
    loss = opt.step(make_closure(param, opt))  # type: ignore[arg-type]
    assert loss is not None and calls == ["theirs"]
    recorder.assert_sgd(1)


def test_a_users_hook_that_removes_the_closure_makes_a_missed_step(
    recorder: Recorder, param: torch.nn.Parameter
) -> None:
    opt = SGD([param], lr=LR)
    recorder.tap.attach(opt)
    opt.register_step_pre_hook(lambda opt, args, kwargs: (args[:1], {}))
    backward(param)
    opt.step(make_closure(param, opt))  # type: ignore[arg-type]
    assert (len(recorder.steps), recorder.tap.missed) == (0, 1)


# --- our own failures -------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", [False, True], ids=["alone", "between-other-hooks"])
@pytest.mark.parametrize("with_closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_our_exception_never_reaches_training(
    param: torch.nn.Parameter, where: str, with_closure: bool, neighbours: bool
) -> None:
    error = ValueError("ours")
    errors: list[Exception] = []
    ran: list[str] = []

    def before(opt: Optimizer) -> None:
        ran.append("before")
        if where == "before":
            raise error

    def after(opt: Optimizer, snapshot: None) -> None:
        ran.append("after")
        if where == "after":
            raise error

    opt, twin_param = SGD([param], lr=LR), torch.nn.Parameter(param.detach().clone())
    twin = SGD([twin_param], lr=LR)
    tap = StepTap(before, after, errors.append)
    theirs: list[str] = []
    if neighbours:
        opt.register_step_pre_hook(lambda *_: theirs.append("pre"))
        opt.register_step_post_hook(lambda *_: theirs.append("post"))
    tap.attach(opt)
    if neighbours:
        opt.register_step_pre_hook(lambda *_: theirs.append("pre"))
        opt.register_step_post_hook(lambda *_: theirs.append("post"))
    for _ in range(3):
        for p, o in ((param, opt), (twin_param, twin)):
            backward(p)
            o.step(make_closure(p, o) if with_closure else None)  # type: ignore[arg-type]
    assert errors == [error] and tap.error is error
    assert ran == (["before"] if where == "before" else ["before", "after"])
    assert torch.equal(param, twin_param)
    assert theirs == (["pre", "pre", "post", "post"] * 3 if neighbours else [])
    assert tap.attached == ()
    tap.detach()
    assert hooks(opt) == ((2, 2) if neighbours else (0, 0))


def test_a_tap_that_failed_is_not_attached_again(param: torch.nn.Parameter) -> None:
    errors: list[Exception] = []
    tap = StepTap(lambda opt: 1 / 0, lambda opt, _: None, errors.append)
    opt = SGD([param], lr=LR)
    for _ in range(3):
        tap.attach(opt)
        opt.step()
    assert len(errors) == 1 and isinstance(errors[0], ZeroDivisionError)
    assert hooks(opt) == (0, 0)


def test_on_error_that_raises_is_logged_and_swallowed(
    param: torch.nn.Parameter, caplog: pytest.LogCaptureFixture
) -> None:
    tap = StepTap(lambda opt: 1 / 0, lambda opt, _: None, lambda error: 1 / 0)
    opt = SGD([param], lr=LR)
    tap.attach(opt)
    opt.step()
    assert "on_error failed" in caplog.text


def test_without_on_error_the_failure_is_logged(param: torch.nn.Parameter, caplog: pytest.LogCaptureFixture) -> None:
    tap = StepTap(lambda opt: 1 / 0, lambda opt, _: None)
    opt = SGD([param], lr=LR)
    tap.attach(opt)
    opt.step()
    assert "division by zero" in caplog.text


def test_an_interrupt_in_a_hook_still_interrupts(param: torch.nn.Parameter) -> None:
    def interrupt(opt: Optimizer) -> None:
        raise KeyboardInterrupt

    tap = StepTap(interrupt, lambda opt, _: None)
    opt = SGD([param], lr=LR)
    tap.attach(opt)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    assert tap.error is None
