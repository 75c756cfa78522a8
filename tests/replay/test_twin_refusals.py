"""What a twin cannot copy at every step is refused by name where it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.support.replay.twin_samples import Plain, parameter, replayed
from update_watch.replay.absent import Absent, AbsentError, ReplayError
from update_watch.replay.optimizer_copy import copy_of
from update_watch.replay.twin import Run, Twin


def _not_to_be_copied(param: Tensor) -> dict[str, Any]:
    held = torch.ones(3)
    return {
        "one of its parameters outside param_groups": [param],
        "something per parameter outside optimizer.state": {param: 1},
        "something per parameter": {id(param): torch.zeros(8)},
        "something per parameter outside": [torch.zeros_like(param)],
        "too large to copy at every step": torch.ones(5000),
        "closes over a Tensor": lambda: held,
        "a list of 5000 items": list(range(5000)),
        "an iterator": (_ for _ in ()),
        "cannot be copied": threading.Lock(),
    }


USES: dict[str, Callable[[Any], Any]] = {
    "one of its parameters outside param_groups": lambda thing: thing[0] + 1,
    "something per parameter outside optimizer.state": lambda thing: thing.get(1),
    "something per parameter": lambda thing: [*thing.values()],
    "something per parameter outside": lambda thing: thing[0].add(1),
    "too large to copy at every step": lambda thing: torch.sum(thing),
    "closes over a Tensor": lambda thing: thing(),
    "a list of 5000 items": lambda thing: [*thing],
    "an iterator": next,
    "cannot be copied": lambda thing: thing.acquire(),
}


@pytest.mark.parametrize("reason", USES)
def test_what_cannot_be_copied_at_every_step_is_refused_by_name_where_it_is_used(reason: str) -> None:
    class Using(Plain):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if self.uses:
                USES[reason](self.thing)
            super().step()

    param = parameter(8)
    thing = _not_to_be_copied(param)[reason]
    torch.testing.assert_close(
        replayed(Using([param], thing=thing, uses=False), param), param.detach() - 0.1 * param.grad
    )
    with pytest.raises(ReplayError, match=f"its step uses Using.thing, which .*{reason}"):
        replayed(Using([param], thing=thing, uses=True), param)


def test_a_stand_in_says_nothing_of_itself_and_only_compares() -> None:
    model = torch.nn.Linear(2, 3)
    absent = Absent(model)
    assert absent is not None and absent != model
    assert absent.weight.shape == (3, 2) and absent.weight.is_meta and isinstance(absent.weight, torch.nn.Parameter)
    uses: tuple[Callable[[Any], Any], ...] = (
        bool,
        len,
        list,
        lambda a: a.forward,
        lambda a: a[0],
        lambda a: torch.add(a, 1),
        lambda a: a + 1,
        lambda a: isinstance(a, torch.nn.Linear),
        torch.is_tensor,
    )
    for use in uses:
        with pytest.raises(AbsentError, match="its step uses a Linear"):
            use(absent)


def test_a_model_may_be_kept_but_not_used_in_the_step() -> None:
    class Using(Plain):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if self.uses:
                list(self.model.parameters())
            super().step()

    param = parameter(8)
    model = torch.nn.Linear(2, 2)
    torch.testing.assert_close(
        replayed(Using([param], model=model, uses=False), param), param.detach() - 0.1 * param.grad
    )
    with pytest.raises(ReplayError, match="its step uses a Linear \\('parameters'\\)"):
        replayed(Using([param], model=model, uses=True), param)


def test_a_rule_that_fails_is_named_with_its_error() -> None:
    class Failing(Plain):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise KeyError("buffer")

    param = parameter(8)
    with pytest.raises(ReplayError, match="Failing fails on FP32 copies: KeyError\\('buffer'\\)"):
        replayed(Failing([param]), param)


def test_a_wrapper_that_shares_its_groups_is_refused() -> None:
    class Wrapper(Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            self.inner = inner
            self.defaults, self.state = inner.defaults, inner.state

        @property
        def param_groups(self) -> Any:  # type: ignore[override]
            return self.inner.param_groups

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.inner.step()

    with pytest.raises(ReplayError, match="Wrapper cannot be built from its attributes"):
        copy_of(Wrapper(torch.optim.SGD([parameter(8)], lr=0.1)))


def test_an_eps_that_asks_for_the_format_is_that_of_the_stored_weight() -> None:
    weight = torch.linspace(0.5, 1.0, 64).reshape(8, 8).bfloat16()
    grad = torch.linspace(1e-5, 2e-5, 64).reshape(8, 8).bfloat16()  # far below the eps of BF16, far above that of FP32

    def moved(eps: float | None) -> Tensor:
        optimizer = torch.optim.Adafactor([torch.nn.Parameter(weight.clone())], lr=0.1, eps=(eps, 1e-3))
        return Twin(optimizer).replay_whole(0, weight, grad, {}).param - weight.float()

    assert torch.equal(moved(None), moved(torch.finfo(torch.bfloat16).eps))
    assert moved(None).norm() < 0.1 * moved(torch.finfo(torch.float32).eps).norm()


def test_dice_thrown_for_the_stored_format_alone_do_not_count_where_none_are_thrown() -> None:
    """A look at what a BF16 copy does, as at its weight decay, must not cost the replays in FP32 after it."""

    class RoundsAtRandom(Plain):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            for param in self.param_groups[0]["params"]:
                if param.dtype is torch.bfloat16:
                    param.add_(torch.rand_like(param), alpha=1e-3)

    param = parameter(8)
    twin = Twin(RoundsAtRandom([param]))

    def replay(dtype: torch.dtype) -> Tensor:
        return twin.replay([Run(0, param.detach().to(dtype, copy=True), param.grad.to(dtype, copy=True), {})])[0].param

    with pytest.raises(ReplayError, match="draws random numbers"):
        replay(torch.bfloat16)
    torch.testing.assert_close(replay(torch.float32), param.detach() - 0.1 * param.grad)
    with pytest.raises(ReplayError, match="draws random numbers"):
        replay(torch.bfloat16)
