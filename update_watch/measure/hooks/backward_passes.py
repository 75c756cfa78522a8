"""Backward passes of a model without a step of any optimizer: a rule that runs under another name is not seen by hooks.

Gradient hooks on a few tensors count the passes. Micro-batches that are summed into one gradient count as one pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_HOOKED = 3  # tensors: one of them may be used in only some of the passes


class BackwardPasses:
    """Calls `passed(count)` in every backward pass from the second one on that no `reset` came between.

    `passed` runs within the backward pass, on the thread of the device; what it raises must not reach training. `stepped()` counts the
    steps of optimizers that are not the model's: gradients that nobody sets to zero are no micro-batches where one has stepped in between.
    """

    def __init__(self, passed: Callable[[int], None], stepped: Callable[[], int] = lambda: 0) -> None:
        self._passed, self._stepped = passed, stepped
        self._counts: dict[int, int] = {}  # id of a tensor -> its gradients since the last step
        # id of a tensor -> its gradient's id and version, `stepped()`
        self._marks: dict[int, tuple[int, int, int]] = {}
        self._tensors: list[Tensor] = []
        self._known: Sequence[Tensor] | None = None
        self._handles: list[Any] = []
        self._most = 0
        self._hook = torch.compiler.disable(_weak(self._note))  # type: ignore[no-untyped-call]  # torch's

    def listen(self, tensors: Sequence[Tensor], is_fit: Callable[[Tensor], bool] = lambda _: True) -> None:
        """Count the passes that give these tensors gradients, of those that fit; does nothing where that is done already."""
        if self._tensors:
            known = set(map(id, tensors))  # they are held here: no other has their id
            if all(id(one) in known and one.requires_grad and one.is_leaf and is_fit(one) for one in self._tensors):
                return
        able = [tensor for tensor in tensors if tensor.requires_grad and tensor.is_leaf]
        self.stop()
        n, chosen = len(able), set[int]()
        for k in range(min(n, _HOOKED)):
            begin = k * n // min(n, _HOOKED)
            turned = (*able[begin:], *able[:begin])
            fit = next((one for one in turned if id(one) not in chosen and is_fit(one)), None)
            if fit is not None:
                chosen.add(id(fit))
                self._tensors.append(fit)
        for tensor in self._tensors:
            self._handles.append(tensor.register_post_accumulate_grad_hook(self._hook))  # type: ignore[no-untyped-call]

    def goes_on(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it listens already to what it would listen to. `tensors`: a list that is another one when it changes."""
        is_known, self._known = tensors is self._known, tensors
        return is_known and bool(self._tensors) and all(one.requires_grad and one.is_leaf for one in self._tensors)

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._tensors, self._known = [], [], None
        self.reset()

    @property
    def is_silent(self) -> bool:
        """Gradients have arrived since the last step."""
        return self._most > 0

    def reset(self) -> None:
        """A step was seen."""
        if self._most:
            self._most = 0
            self._counts.clear()

    def _note(self, tensor: Tensor) -> None:
        grad, key = tensor.grad, id(tensor)
        if grad is not None:  # else a hook of somebody's has used it up already
            mark = id(grad), grad._version, self._stepped()
            last, self._marks[key] = self._marks.get(key), mark
            if last is not None and mark == (last[0], last[1] + 1, last[2]):
                return  # a micro-batch more
        self._counts[key] = count = self._counts.get(key, 0) + 1
        if count > self._most:
            self._most = count
            if count > 1:
                self._passed(count)


def _weak(note: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that does not keep its owner alive: torch holds hooks where the collector of garbage does not look."""
    owner = weakref.WeakMethod(note)

    def hook(tensor: Tensor) -> None:
        method = owner()
        if method is not None:
            method(tensor)

    hook.__qualname__ = note.__qualname__
    return hook
