"""Copies of what an optimizer keeps beside its parameters, so that a replay can write to them.

One `Copier` per replay: things that are the same object in the optimizer are the same object in the copy, and what
points back to the optimizer points to the twin. What cannot be copied, or must not be copied at every step (models,
process groups, buffers as large as the model) has an `Absent` in its place, which refuses to be used and says what it is.
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

from update_watch.replay.absent import Absent

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
        Absent,
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
        self._owner = ""  # of what is being copied
        self._memo: dict[int, Any] = {}
        self._generators: list[tuple[torch.Generator, torch.Generator]] = []  # and their copies
        self._kept: list[Any] = []  # an id is only good while its object lives

    def replace(self, original: Any, copied: Any) -> None:
        """Wherever `original` is met from now on, `copied` stands in its place."""
        self._memo[id(original)] = copied
        self._kept.append(original)

    @property
    def have_drawn(self) -> bool:
        """Whether numbers were drawn from the copy of any generator."""
        return any(not torch.equal(copied.get_state(), own.get_state()) for own, copied in self._generators)

    def copy(self, value: Any, owner: str) -> Any:
        """A copy; what must not be copied is `Absent` in it, under the name of `owner`."""
        if type(value) is dict and all(map(is_plain, value)) and all(map(is_plain, value.values())):
            if id(value) not in self._memo:
                self.replace(value, dict(value))
            return self._memo[id(value)]
        self._owner = owner
        self._visit(value, 0)
        try:
            return copy.deepcopy(value, self._memo)
        except Exception as error:
            self._memo[id(value)] = Absent(value, f"{owner}, which cannot be copied: {error!r}")
            self._kept.append(value)
            return self._memo[id(value)]

    def _refuse(self, value: Any, problem: str) -> None:
        self.replace(value, Absent(value, f"{self._owner}, which holds {problem}"))

    def _visit(self, value: Any, depth: int) -> None:
        """Copy the tensors and generators below `value`, and put something in the place of what must not be copied."""
        if is_plain(value) or id(value) in self._memo:
            return
        if isinstance(value, Tensor):
            self._visit_tensor(value)
        elif isinstance(value, torch.Generator):
            self._generators.append((value, value.clone_state()))
            self.replace(*self._generators[-1])
        elif isinstance(value, (Optimizer, torch.nn.Module)):
            self.replace(value, Absent(value))  # may never be used in a step; to be copied they are too large
        elif depth == _DEPTH:
            self._refuse(value, "containers nested too deeply")
        elif isinstance(value, types.FunctionType):
            # deepcopy shares functions, so what they close over would be written to
            if problem := self._closure_of(value):
                self._refuse(value, problem)
        elif isinstance(value, types.MethodType):
            self._visit(value.__self__, depth + 1)
        elif isinstance(value, types.GeneratorType):
            self._refuse(value, "an iterator")
        elif self._is_by_parameter(value):
            self._refuse(value, "something per parameter outside optimizer.state")
        else:
            if isinstance(value, dict):
                items = list(value.values())
            elif isinstance(value, (list, tuple, set, frozenset, deque)):
                items = list(value)
            else:
                items = list(getattr(value, "__dict__", {}).values())
            if len(items) > _ITEMS:
                self._refuse(value, f"a {type(value).__name__} of {len(items)} items")
                return
            for item in items:
                self._visit(item, depth + 1)

    def _visit_tensor(self, value: Tensor) -> None:
        if id(value) in self._members():
            self._refuse(value, "one of its parameters outside param_groups")
            return
        if self._left is not None:
            self._left -= value.numel()
            if self._left < 0:
                self._refuse(
                    value, f"tensors outside optimizer.state that are too large to copy at every step ({value.numel()})"
                )
                return
        try:
            copied = _cloned(value.detach())
        except Exception as error:
            self._refuse(value, f"a {type(value).__name__} that cannot be copied ({error!r})")
            return
        if self._widen and type(value) is Tensor and value.dtype in _LOW_PRECISION:
            copied, self.has_widened = copied.to(torch.float32), True
        self.replace(value, torch.nn.Parameter(copied) if isinstance(value, torch.nn.Parameter) else copied)

    def _is_by_parameter(self, value: Any) -> bool:
        """A map from parameters, or a list of other tensors of their shapes, as FP32 weights are."""
        if isinstance(value, dict):
            return any(isinstance(key, Tensor) or key in self._members() for key in value)
        if (
            not isinstance(value, (list, tuple))
            or not value
            or not all(issubclass(type(item), Tensor) for item in value)
        ):
            return False
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        lists = [group["params"] for group in groups]
        shapes = [item.shape for item in value]
        return self._members().isdisjoint(map(id, value)) and any(
            shapes == [param.shape for param in params] for params in (*lists, [p for params in lists for p in params])
        )

    def _members(self) -> frozenset[int]:
        if self._member_ids is None:
            groups = self._optimizer.param_groups if self._optimizer is not None else ()
            self._member_ids = frozenset(id(param) for group in groups for param in group["params"])
        return self._member_ids

    def _closure_of(self, function: types.FunctionType, depth: int = 0) -> str:
        for cell in function.__closure__ or ():
            content = cell.cell_contents
            if not is_plain(content) and not isinstance(content, types.FunctionType):
                return f"the function {function.__qualname__}, which closes over a {type(content).__name__}"
            if isinstance(content, types.FunctionType) and depth < _DEPTH:
                if problem := self._closure_of(content, depth + 1):
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
