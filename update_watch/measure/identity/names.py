"""What the model's tensors are called, now and as they are replaced."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.kinds import without_wrappers
from update_watch.measure.sampling import local
from update_watch.odd_tensors import shape_of


class Names(dict[int, tuple[str, ...]]):
    """id(tensor) -> its names, of the tensors of a model and of those that stand for them."""

    def __init__(self, model: Any, names: dict[int, tuple[str, ...]]) -> None:
        super().__init__(names)
        self._model = model if isinstance(model, torch.nn.Module) else ()

    def learn(self, tensors: Iterable[Tensor]) -> None:
        """Those of tensors that have come into the model since it was read."""
        new = set(map(id, tensors)) - self.keys()
        if new:
            self.update((key, names) for key, names in names_of(self._model).items() if key in new)


class NamedModel:
    """The model's tensors by name. A tensor that takes another's place takes its name.

    `names` is one dict for ever: id(tensor) -> its names, of the model's tensors and of those that stand for them.
    """

    def __init__(self, model: Any) -> None:
        """Raises TypeError for what is neither a module nor (name, tensor) pairs."""
        self._model = model
        self._tree: _Tree | None = None
        self.pairs = named_tensors(model)
        self.names = Names(model, names_of(self.pairs))
        self._made: tuple[Any, list[Tensor], dict[str, int], frozenset[int]] | None = None  # of these pairs
        self._given = _given(model)
        self._is_once = iter(model) is model if not isinstance(model, torch.nn.Module) else False

    def refresh(self) -> dict[str, Tensor]:
        """Read the model anew. Returns the old tensors, by name, that have left the model since."""
        if self._is_once:  # a generator is used up
            return {}
        if self._tree is not None and self._tree.is_as_it_was():
            return {}
        if self._given and len(self._given) == len(self._model) and all(map(operator.is_, self._given, self._model)):
            return {}
        self._given = _given(self._model)
        self._tree = _Tree(self._model) if _Tree.can(self._model) else None
        read = named_tensors(self._model)
        if len(read) == len(self.pairs) and all(map(_is_as_it_was, read, self.pairs)):
            return {}
        before, now = dict(self.pairs), dict(read)
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

    def ids(self) -> frozenset[int]:
        """Those of the tensors."""
        return self._of_pairs()[2]

    def _of_pairs(self) -> tuple[list[Tensor], dict[str, int], frozenset[int]]:
        # asked for at the end of every window: the pairs stay the same list until they change
        if self._made is None or self._made[0] is not self.pairs:
            tensors = {id(tensor): tensor for _, tensor in self.pairs}
            order = {self.names[id(tensor)][0]: i for i, (_, tensor) in reversed(list(enumerate(self.pairs)))}
            self._made = self.pairs, list(tensors.values()), order, frozenset(tensors)
        return self._made[1:]


def _given(model: Any) -> list[Any]:
    """The pairs of a list: for as long as they are these, nothing has another name. Nothing of what is no list of pairs."""
    is_list = type(model) in (list, tuple) and all([type(pair) is tuple for pair in model])
    return list(model) if is_list else []


class _Tree:
    """All modules of a model and what they hold: found to be the same in a tenth of the time that reading names takes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = list(model.modules())
        self._names, self._held = self._now()

    @staticmethod
    def can(model: Any) -> bool:
        """Whether that tells all of a model's names."""
        is_module = isinstance(model, torch.nn.Module)
        return is_module and type(model).named_parameters is torch.nn.Module.named_parameters

    def is_as_it_was(self) -> bool:
        """Each module has the parameters and modules that it had."""
        names, held = self._now()
        return names == self._names and all(map(operator.is_, held, self._held))

    def _now(self) -> tuple[list[str], list[Any]]:
        # thousands at the end of every window: loops of the interpreter's own, not of Python
        inside = [list(map(operator.attrgetter(kind), self._modules)) for kind in ("_parameters", "_modules")]
        dicts = inside[0] + inside[1]
        return list(chain.from_iterable(dicts)), list(chain.from_iterable([held.values() for held in dicts]))


def _is_as_it_was(now: tuple[str, Tensor], before: tuple[str, Tensor]) -> bool:
    return now[1] is before[1] and now[0] == before[0]


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


def outline_of(optimizer: Optimizer) -> list[tuple[int, ...]]:
    """Of each group how many members it has, and which are the first and the last of them."""
    groups = [group["params"] for group in optimizer.param_groups]
    return [(len(params), id(params[0]), id(params[-1])) if params else (0,) for params in groups]


def short(value: Any) -> str:
    """For messages: small values as they are, of others the type."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else type(value).__name__
