"""What the model's tensors are called, now and as they are replaced."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.kinds import without_wrappers
from update_watch.measure.sampling import local
from update_watch.odd_tensors import shape_of


class NamedModel:
    """The model's tensors by name. A tensor that takes another's place takes its name.

    `names` is one dict for ever: id(tensor) -> its names, of the model's tensors and of those that stand for them.
    """

    def __init__(self, model: Any) -> None:
        """Raises TypeError for what is neither a module nor (name, tensor) pairs."""
        self._model = model
        self.pairs = named_tensors(model)
        self.names = names_of(self.pairs)
        self._made: tuple[Any, list[Tensor], dict[str, int]] | None = None  # of these pairs
        self._is_once = iter(model) is model if not isinstance(model, torch.nn.Module) else False

    def refresh(self) -> dict[str, Tensor]:
        """Read the model anew. Returns the old tensors, by name, that have left the model since."""
        if self._is_once:  # a generator is used up
            return {}
        before, now = dict(self.pairs), dict(named_tensors(self._model))
        if len(before) == len(now) and all(before.get(name) is tensor for name, tensor in now.items()):
            return {}
        for name, old in before.items():
            # out of the step FSDP shows gathered tensors, or none: what is stepped is still the shard
            if name not in now or (local(old) is not old and local(now[name]) is now[name]):
                now[name] = old
        self.pairs = list(now.items())
        staying = {id(tensor) for tensor in now.values()}
        left = {name: old for name, old in before.items() if id(old) not in staying}
        for old in left.values():
            self.names.pop(id(old), None)
        self.names.update(names_of(self.pairs))
        return left

    def tensors(self) -> list[Tensor]:
        """Each tensor once, in the model's order."""
        return self._of_pairs()[0]

    def order(self) -> dict[str, int]:
        """First name of each tensor -> its place in the model."""
        return self._of_pairs()[1]

    def _of_pairs(self) -> tuple[list[Tensor], dict[str, int]]:
        # asked for at the end of every window: the pairs stay the same list until they change
        if self._made is None or self._made[0] is not self.pairs:
            tensors = list({id(tensor): tensor for _, tensor in self.pairs}.values())
            order = {self.names[id(tensor)][0]: i for i, (_, tensor) in reversed(list(enumerate(self.pairs)))}
            self._made = self.pairs, tensors, order
        return self._made[1:]


def named_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """All names of a module's parameters with the tensors; (name, tensor) pairs as they are.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, torch.nn.Module):
        return list(model.named_parameters(remove_duplicate=False))
    try:
        pairs = [(str(name), tensor) for name, tensor in model]
    except (TypeError, ValueError):
        pairs = None  # type: ignore[assignment]
    if pairs is None or not all(isinstance(tensor, Tensor) for _, tensor in pairs):
        raise TypeError(
            f"watch(model={short(model)}): expected a torch module or (name, tensor) pairs, as model.named_parameters()"
            " gives"
        )
    return pairs


def names_of(model: Any) -> dict[int, tuple[str, ...]]:
    """id(parameter) -> all its names. `model`: a module or (name, tensor) pairs."""
    pairs: Iterable[tuple[str, Tensor]]
    if isinstance(model, torch.nn.Module):
        pairs = model.named_parameters(remove_duplicate=False)
    else:
        pairs = model
    names: dict[int, tuple[str, ...]] = {}
    for name, tensor in pairs:
        names[id(tensor)] = (*names.get(id(tensor), ()), without_wrappers(name))
    return names


def describe(param: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """What a tensor is, as keyword arguments of `TensorEvidence`."""
    # ZeRO-3 leaves an empty tensor where none is needed
    shape = tuple(param.ds_shape) if hasattr(param, "ds_shape") else shape_of(param)
    return {
        "name": names[0],
        "names": names,
        "layer": names[0].rpartition(".")[0],
        "dtype": str(param.dtype).removeprefix("torch."),
        "shape": shape,
        "numel": math.prod(shape),
        "held": None if local(param) is param else local(param).numel(),
        "trainable": param.requires_grad,
    }


def members_of(optimizer: Optimizer) -> list[Tensor]:
    """The tensors an optimizer steps."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def short(value: Any) -> str:
    """For messages: small values as they are, of others the type."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else type(value).__name__
