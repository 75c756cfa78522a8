"""Stands in a copied optimizer for what cannot be copied, or not at every step; a rule that uses it is refused.

Much of what an optimizer keeps is never looked at in its step: the model, a used-up iterator over its parameters, a map from
tensors to names. Only a look says which.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ReplayError(RuntimeError):
    """The rule cannot be run on copies; the message says why."""


class AbsentError(ReplayError):
    """The rule asks for something that a copy does not have."""


class CopySteppedError(ReplayError):
    """The rule moves a state that began as the weight, and never the weight."""


class Absent:
    """Something in its place, which is not None and says nothing else of itself: asking for its class is a use too.

    It must not pass for an object of the original's class: torch takes what passes for a tensor for one, and reads its memory.
    `problem`: what it holds, for the message.
    """

    def __init__(self, original: Any, problem: str = "") -> None:
        self.__dict__.update(_kind=type(original), _problem=problem, _model=None)
        if isinstance(original, torch.nn.Module):
            self.__dict__["_model"] = weakref.ref(original)  # not to be kept alive from here

    def __getattribute__(self, name: str) -> Any:
        if name in ("__dict__", "_kind", "_problem", "_model", "__deepcopy__", "__reduce_ex__"):
            return object.__getattribute__(self, name)
        model = object.__getattribute__(self, "_model")
        held = getattr(model() if model is not None else None, name, None)
        if isinstance(held, Tensor):
            # to be compared with the optimizer's parameters, as bitsandbytes does; it has a shape, and no values
            return torch.nn.Parameter(torch.empty_like(held, device="meta"), requires_grad=False)
        return _refuse(self, name)

    def __deepcopy__(self, _: Any) -> Any:
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse(self, name)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [value for value in (*args, *(kwargs or {}).values()) if type(value) is cls]
        if not found:
            raise AbsentError("its step computes with something that a replay cannot have")
        return _refuse(found[0], getattr(func, "__name__", "torch"))


def asks_for_closure(step: Callable[..., Any]) -> bool:
    """Whether a step that fails without a closure calls the one it is given, and does not fail in the same way then."""
    calls: list[None] = []

    def closure() -> Tensor:
        calls.append(None)
        return torch.zeros(())

    without = _problem_of(step)
    return bool(without) and _problem_of(step, closure) != without and bool(calls)


def _problem_of(step: Callable[..., Any], *given: Any) -> str:
    try:
        step(*given)
    except Exception as error:
        return repr(error)
    return ""


def _refuse(absent: Absent, name: str) -> Any:
    kind: type = object.__getattribute__(absent, "_kind")
    problem: str = object.__getattribute__(absent, "_problem")
    if problem:
        raise AbsentError(f"its step uses {problem}")
    raise AbsentError(f"its step uses a {kind.__name__} ('{name}') that a replay cannot have")


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: Absent, *_: Any, **__: Any) -> Any:
        return _refuse(self, name)

    return method


# looked up on the class, past `__getattribute__`
for _name in (
    "call bool len iter next getitem setitem delitem contains lt le gt ge add radd sub rsub mul rmul truediv rtruediv"
    " floordiv mod pow rpow neg abs iadd isub imul itruediv and or xor invert float int index enter exit copy repr str"
).split():
    setattr(Absent, f"__{_name}__", _refusing(f"__{_name}__"))
