"""Wrappers are looked through to the optimizer that steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD

from tests.support.tap_recorder import LR
from update_watch.measure.identity.partitions import chain
from update_watch.wrappers import unwrap

# --- unwrap ---------------------------------------------------------------------------------------


@pytest.fixture
def param() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(5))


class _Wrapper:
    def __init__(self, attribute: str, inner: Any) -> None:
        setattr(self, attribute, inner)


def test_unwrap_looks_through_wrappers_of_wrappers(param: torch.nn.Parameter) -> None:
    opt = SGD([param], lr=LR)
    assert unwrap(opt) is opt
    assert unwrap(_Wrapper("_optimizer", opt)) is opt
    assert unwrap(_Wrapper("optimizer", _Wrapper("_optimizer", opt))) is opt


def test_unwrap_keeps_an_optimizer_that_contains_another(param: torch.nn.Parameter) -> None:
    opt = SGD([param], lr=LR)
    opt.optimizer = SGD([param], lr=LR)  # type: ignore[attr-defined]
    assert unwrap(opt) is opt


@pytest.mark.parametrize(
    "thing", [None, 3, "adam", _Wrapper("optimizer", None), object()], ids=lambda thing: type(thing).__name__
)
def test_unwrap_names_what_it_was_given_and_the_remedy(thing: Any) -> None:
    with pytest.raises(TypeError, match=rf"{type(thing).__name__} has no torch optimizer .* give a torch.optim.Opt"):
        unwrap(thing)


def test_unwrap_of_a_circle_raises() -> None:
    circle = _Wrapper("optimizer", None)
    circle.optimizer = circle  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="no torch optimizer"):
        unwrap(circle)


def test_unwrap_of_accelerates_and_lightnings_wrappers(param: torch.nn.Parameter) -> None:
    accelerate = pytest.importorskip("accelerate.optimizer")
    opt = SGD([param], lr=LR)
    wrapped = object.__new__(accelerate.AcceleratedOptimizer)
    wrapped.__dict__["optimizer"] = opt
    assert unwrap(wrapped) is opt


def test_a_container_that_is_no_optimizer_is_the_optimizers_that_it_holds(param: torch.nn.Parameter) -> None:
    a, b, c = (SGD([param], lr=LR) for _ in range(3))
    assert chain(_Wrapper("base", a)) == [a]  # ScheduleFreeWrapper
    several = _Wrapper("optimizers", [a, b, a])
    several.by_name = {"c": c, "rate": 0.1}  # type: ignore[attr-defined]
    assert chain(several) == [a, b, c]
    wrapped = _Wrapper("optimizer", a)
    wrapped.others = [b]  # type: ignore[attr-defined]
    nothing = object()
    assert chain(wrapped) == [wrapped] and chain(a) == [a] and chain(nothing) == [nothing]
