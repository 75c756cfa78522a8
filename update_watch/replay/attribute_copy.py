"""Copies of what an optimizer keeps beside its parameters, so that a replay can write to them.

One `Copier` per replay: things that are the same object in the optimizer are the same object in the copy, and what
points back to the optimizer points to the twin. What cannot be copied, or must not be copied at every step (models,
process groups, buffers as large as the model), is refused by a `ReplayError` that names it.
"""

from __future__ import annotations

import copy
import types
from collections import deque
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class ReplayError(RuntimeError):
    """The rule cannot be run on copies; the message says why."""


class _Absent:
    """Stands in the twin for something that cannot be copied; using it in a step is refused."""

    def __init__(self, original: Any) -> None:
        self.__dict__["_kind"] = type(original).__name__

    def __deepcopy__(self, _: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        raise ReplayError(f"its step uses a {self._kind} ('{name}') that a replay cannot have")

    def __setattr__(self, name: str, value: Any) -> None:
        self.__getattr__(name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.__getattr__("__call__")


# values that nobody can write to, by exact type
_PLAIN = frozenset(
    {
        int,
        float,
        complex,
        bool,
        str,
        bytes,
        range,
        type,
        type(None),
        torch.dtype,
        torch.device,
        torch.Size,
        types.BuiltinFunctionType,
        types.ModuleType,
        _Absent,
    }
)
_LOW_PRECISION = frozenset({torch.bfloat16, torch.float16})
_DEPTH = 6  # containers in containers
_ITEMS = 1024  # entries of one container


def is_plain(value: Any) -> bool:
    """The value can be shared: nothing can be written to it."""
    if type(value) in _PLAIN:
        return True
    if type(value) is tuple:
        return all(type(item) in _PLAIN for item in value)
    return isinstance(value, Enum)


class Copier:
    """Deep copies with one memory.

    `limit`: elements of all tensors together (None: any). `widen`: low-precision tensors become FP32.
    `optimizer`: tensors that are its parameters are refused.
    """

    def __init__(self, limit: int | None, widen: bool = False, optimizer: Optimizer | None = None) -> None:
        self._optimizer = optimizer
        self._member_ids: frozenset[int] | None = None
        self._left = limit
        self._widen = widen
        self.has_widened = False
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []  # an id is only good while its object lives

    def replace(self, original: Any, copied: Any) -> None:
        """Wherever `original` is met from now on, `copied` stands in its place."""
        self._memo[id(original)] = copied
        self._kept.append(original)

    def copy(self, value: Any, owner: str) -> Any:
        """A copy; raises `ReplayError` naming `owner` for what must not be copied."""
        if type(value) is dict and all(map(is_plain, value)) and all(map(is_plain, value.values())):
            if id(value) not in self._memo:
                self.replace(value, dict(value))
            return self._memo[id(value)]
        problem = self._visit(value, 0)
        if problem:
            raise ReplayError(f"{owner} holds {problem}")
        try:
            return copy.deepcopy(value, self._memo)
        except Exception as error:
            raise ReplayError(f"{owner} cannot be copied: {error!r}") from error

    def _visit(self, value: Any, depth: int) -> str:
        """Copy the tensors and generators below `value`; what in it must not be copied, "" when nothing."""
        if is_plain(value) or id(value) in self._memo:
            return ""
        if isinstance(value, Tensor):
            return self._visit_tensor(value)
        if isinstance(value, torch.Generator):
            self.replace(value, value.clone_state())
            return ""
        if isinstance(value, (Optimizer, torch.nn.Module)):
            self.replace(value, _Absent(value))  # may never be used in a step; to be copied they are too large
            return ""
        if depth == _DEPTH:
            return "containers nested too deeply"
        if isinstance(value, types.FunctionType):
            # deepcopy shares functions, so what they close over would be written to
            return self._visit_closure(value, depth)
        if isinstance(value, types.MethodType):
            return self._visit(value.__self__, depth + 1)
        if isinstance(value, dict):
            if any(isinstance(key, Tensor) for key in value):
                return "something per parameter outside optimizer.state"
            items = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            items = list(value)
        else:
            items = list(getattr(value, "__dict__", {}).values())
        if len(items) > _ITEMS:
            return f"a {type(value).__name__} of {len(items)} items"
        for item in items:
            if problem := self._visit(item, depth + 1):
                return problem
        return ""

    def _visit_tensor(self, value: Tensor) -> str:
        if id(value) in self._members():
            return "one of its parameters outside param_groups"
        if self._left is not None:
            self._left -= value.numel()
            if self._left < 0:
                return f"tensors outside optimizer.state that are too large to copy at every step ({value.numel()})"
        try:
            copied = _cloned(value.detach())
        except Exception as error:
            return f"a {type(value).__name__} that cannot be copied ({error!r})"
        if self._widen and type(value) is Tensor and value.dtype in _LOW_PRECISION:
            copied, self.has_widened = copied.to(torch.float32), True
        self.replace(value, torch.nn.Parameter(copied) if isinstance(value, torch.nn.Parameter) else copied)
        return ""

    def _members(self) -> frozenset[int]:
        if self._member_ids is None:
            groups = self._optimizer.param_groups if self._optimizer is not None else ()
            self._member_ids = frozenset(id(param) for group in groups for param in group["params"])
        return self._member_ids

    def _visit_closure(self, function: types.FunctionType, depth: int) -> str:
        for cell in function.__closure__ or ():
            content = cell.cell_contents
            if not is_plain(content) and not isinstance(content, types.FunctionType):
                return f"the function {function.__qualname__}, which closes over a {type(content).__name__}"
            if isinstance(content, types.FunctionType) and (problem := self._visit_closure(content, depth + 1)):
                return problem
        return ""


def _cloned(tensor: Tensor) -> Tensor:
    if type(tensor) is Tensor or not hasattr(tensor, "__tensor_flatten__"):
        return tensor.clone()
    # wrappers of plain tensors (quantised state) need not know how to clone themselves
    names, context = tensor.__tensor_flatten__()
    parts = {name: _cloned(getattr(tensor, name)) for name in names}
    cloned: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
    return cloned
