"""States that an optimizer keeps in attributes of its own, or as settings of its groups: a list beside its parameters, a dict by parameter,
by its id or place, one flat tensor; or in attributes of the parameters (`param.main_param`).

FP32 weights, compensations, gathered gradients. They are replayed as other states are, under the attribute's name, where a rule
cannot be replayed without them (`adopt`); whether what was made of them is right, the trial of the rule says.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.odd_tensors import unreadable

# before the name: the optimizer may keep a state of that name as well
_OF_ITSELF, _OF_GROUPS, _OF_PARAMS = "self.", "group.", "param."
_NEAR = 0.05  # of the weight: so near to it is a copy of it
_ENOUGH = 4096  # elements to take an average of


class Layout(Enum):
    beside = "a list of one for each parameter"
    by_group = "a list of such lists, one for each group"
    by_param = "a dict by parameter"
    by_id = "a dict by a parameter's id"
    by_place = "a dict by a parameter's place"
    flat = "one tensor, the elements of all parameters one after the other"
    own = "a list of the parameters themselves"
    mark = "an attribute of each parameter"


class Shelf(NamedTuple):
    """One attribute that holds something for each parameter, or a setting that does so for those of its group."""

    attribute: str
    layout: Layout
    is_of_groups: bool = False

    @property
    def state(self) -> str:
        """The name under which it is a state."""
        owner = _OF_GROUPS if self.is_of_groups else _OF_PARAMS if self.layout is Layout.mark else _OF_ITSELF
        return owner + self.attribute


_adopted: weakref.WeakKeyDictionary[Optimizer, tuple[Shelf, ...]] = weakref.WeakKeyDictionary()


def shelves_of(optimizer: Optimizer) -> tuple[Shelf, ...]:
    """The attributes of an optimizer that hold something for each of its parameters; () where there is but its own list of them."""
    groups = [group["params"] for group in optimizer.param_groups]
    params = [param for group in groups for param in group]
    found = []
    for name, value in vars(optimizer).items():
        layout = None if name in ("param_groups", "state", "defaults") else _layout(value, params, groups)
        if layout is not None:
            found.append(Shelf(name, layout))
    for name in optimizer.param_groups[0] if groups else ():
        in_each = {_layout(group.get(name), group["params"], [group["params"]]) for group in optimizer.param_groups}
        layout = in_each.pop() if name != "params" and len(in_each) == 1 else None
        if layout not in (None, Layout.own):
            found.append(Shelf(name, layout, is_of_groups=True))
    found += [Shelf(name, Layout.mark) for name in _marks(params)]
    return tuple(found) if any(shelf.layout is not Layout.own for shelf in found) else ()


def adopt(optimizer: Optimizer) -> bool:
    """Take what an optimizer keeps in attributes for states. False: there is nothing, or it is done."""
    if optimizer in _adopted:
        return False
    shelves = shelves_of(optimizer)
    if shelves:
        _adopted[optimizer] = shelves
    return bool(shelves)


def let_go(optimizer: Optimizer) -> None:
    """Take them for attributes again."""
    _adopted.pop(optimizer, None)


def attributes(optimizer: Optimizer) -> frozenset[str]:
    """Those that are states."""
    shelves = _adopted.get(optimizer, ())
    return frozenset(one.attribute for one in shelves if not one.is_of_groups and one.layout is not Layout.mark)


def states_of(optimizer: Optimizer) -> Mapping[Tensor, dict[str, Any]]:
    """`optimizer.state`, with what else is taken for states; then a state is a dict made anew."""
    shelves = _adopted.get(optimizer)
    return optimizer.state if shelves is None else _States(optimizer, shelves)


def furnish(
    twin: Optimizer, original: Optimizer, state: Mapping[Tensor, dict[str, Any]], *, are_synthetic: bool
) -> None:
    """Give a copy of an optimizer shelves of its own, with what is in the `state` of its parameters, and taken from there.

    `are_synthetic`: its parameters are not the original's, and get something like what those have.
    """
    shelves = _adopted.get(original)
    if shelves is None:
        return
    _adopted[twin] = shelves

    def item(shelf: Shelf, param: Tensor) -> Any:
        if shelf.layout is Layout.own:
            return param
        mine = state.get(param) or {}
        return _stand_in(original, shelf, param) if are_synthetic else mine.pop(shelf.state, None)

    for shelf in shelves:
        kept = [[(param, item(shelf, param)) for param in group["params"]] for group in twin.param_groups]
        if shelf.layout is Layout.mark:
            for param, mark in itertools.chain.from_iterable(kept):
                setattr(param, shelf.attribute, mark)
        elif shelf.is_of_groups:
            value = original.param_groups[0].get(shelf.attribute)
            for group, of_group in zip(twin.param_groups, kept, strict=True):
                group[shelf.attribute] = _container(shelf.layout, [of_group], value)
        else:
            value = getattr(original, shelf.attribute)
            object.__setattr__(twin, shelf.attribute, _container(shelf.layout, kept, value))


class _States(Mapping[Tensor, dict[str, Any]]):
    def __init__(self, optimizer: Optimizer, shelves: tuple[Shelf, ...]) -> None:
        self._optimizer, self._shelves = optimizer, shelves
        params = [(g, i, p) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])]
        self._places = {id(param): (k, g, i) for k, (g, i, param) in enumerate(params)}
        self._params = [param for *_, param in params]
        self._ends = _ends_of([self._params])
        self._ends_in_group = _ends_of([group["params"] for group in optimizer.param_groups])

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        found = dict(self._optimizer.state.get(param) or {})
        for shelf in self._shelves:
            place = self._places.get(id(param))
            if place is None:
                continue
            if shelf.is_of_groups:
                kept, ends = self._optimizer.param_groups[place[1]].get(shelf.attribute), self._ends_in_group
                place = place[2], 0, place[2]
            else:
                kept, ends = getattr(self._optimizer, shelf.attribute, None), self._ends
            if shelf.layout is Layout.mark:
                value = vars(param).get(shelf.attribute)
            elif shelf.layout is Layout.flat:
                value = _part(kept, param, ends[id(param)])
            else:
                value = _at(kept, shelf.layout, param, place)
            if value is not None:
                found[shelf.state] = value
        if not found:
            raise KeyError(param)
        return found

    def __iter__(self) -> Iterator[Tensor]:
        return (param for param in self._params if param in self)

    def __len__(self) -> int:
        return len(self._params)


def _ends_of(lists: Iterable[Sequence[Tensor]]) -> dict[int, int]:
    """Of each parameter of each list the elements up to its end."""
    found: dict[int, int] = {}
    for params in lists:
        ends = itertools.accumulate(param.numel() for param in params)
        found.update((id(param), end) for param, end in zip(params, ends, strict=True))
    return found


def _at(container: Any, layout: Layout, param: Tensor, places: tuple[int, int, int]) -> Any:
    """`places`: of the parameter among all of them; its group, and its place in that."""
    if layout is Layout.own:
        return None
    place, group, within = places
    try:
        if layout is Layout.beside:
            return container[place]
        if layout is Layout.by_group:
            return container[group][within]
        return container.get({Layout.by_param: param, Layout.by_place: place}.get(layout, id(param)))
    except (IndexError, AttributeError, TypeError):  # put away, or not there for a group that was added
        return None


def _part(flat: Any, param: Tensor, end: int) -> Tensor | None:
    """The elements of a parameter in a flat tensor, in its shape."""
    if not isinstance(flat, Tensor) or not param.numel() <= end <= flat.numel():
        return None
    return flat.detach()[end - param.numel() : end].view(param.shape)


def _container(layout: Layout, kept: list[list[tuple[Tensor, Any]]], original: Any) -> Any:
    if layout is Layout.by_group:
        return type(original)([[value for _, value in group] for group in kept])
    flat = [pair for group in kept for pair in group]
    if layout is Layout.flat:
        parts = [value.reshape(-1) for _, value in flat]
        return torch.cat(parts) if parts else original.new_empty(0)
    if layout in (Layout.beside, Layout.own):
        return type(original)([value for _, value in flat])
    keys: dict[Layout, Any] = {Layout.by_param: [param for param, _ in flat], Layout.by_place: range(len(flat))}
    keyed = zip(keys.get(layout, [id(param) for param, _ in flat]), flat, strict=True)
    by_key = {key: value for key, (_, value) in keyed if value is not None}
    return defaultdict(original.default_factory, by_key) if isinstance(original, defaultdict) else by_key


def _layout(value: Any, params: Sequence[Tensor], groups: Sequence[Sequence[Tensor]]) -> Layout | None:
    if isinstance(value, Tensor):
        numel = sum(param.numel() for param in params)
        is_flat = value.dim() == 1 and not unreadable(value) and value.numel() == numel and len(params) > 1
        return Layout.flat if is_flat else None
    if type(value) in (list, tuple):
        if len(value) == len(params) and all(map(_is, value, params)):
            return Layout.own
        if _is_beside(value, params):
            return Layout.beside
        are_lists = len(value) == len(groups) and all(type(one) in (list, tuple) for one in value)
        return Layout.by_group if are_lists and all(map(_is_beside, value, groups)) else None
    if type(value) not in (dict, defaultdict) or not value:
        return None
    known = {id(param): param for param in params}
    if all(isinstance(key, Tensor) for key in value):
        by_id, layout = {id(key): one for key, one in value.items()}, Layout.by_param
    elif all(type(key) is int and 0 <= key < len(params) for key in value):
        by_id, layout = {id(params[key]): one for key, one in value.items()}, Layout.by_place
    else:
        by_id, layout = value, Layout.by_id
    if not by_id.keys() <= known.keys():
        return None
    return layout if all(_fits(one, known[key]) for key, one in by_id.items()) else None


def _marks(params: Sequence[Tensor]) -> list[str]:
    """The attributes of all parameters that hold a tensor of their shape; what is nobody's business begins with "_"."""
    names = [name for name in getattr(params[0], "__dict__", ()) if not name.startswith("_")] if params else []

    def are_kept(name: str) -> bool:
        kept = [getattr(param, "__dict__", {}).get(name) for param in params]
        return all(isinstance(one, Tensor) for one in kept) and _is_beside(kept, params)

    return [name for name in names if are_kept(name)]


def _is(a: Any, b: Any) -> bool:
    return a is b


def _is_beside(value: Any, params: Sequence[Tensor]) -> bool:
    """One for each parameter, of its shape; not the parameters, of which a copy must not have other ones."""
    if len(value) != len(params) or not any(isinstance(one, Tensor) for one in value):
        return False
    known = {id(param) for param in params}
    return all(id(one) not in known and _fits(one, param) for one, param in zip(value, params, strict=True))


def _fits(value: Any, param: Tensor) -> bool:
    if isinstance(value, Tensor):
        return type(value) in (Tensor, torch.nn.Parameter) and not unreadable(value) and value.shape == param.shape
    return value is None or type(value) in (int, float)


def _stand_in(optimizer: Optimizer, shelf: Shelf, param: Tensor) -> Any:
    """What a synthetic parameter has in place of what real ones have: a copy of its weights, or the same everywhere.

    In the parameter's format where it is in the real one's: what is made like a parameter would be so here.
    """
    states = states_of(optimizer)
    given = (
        (real, states.get(real, {}).get(shelf.state)) for group in optimizer.param_groups for real in group["params"]
    )
    real, value = max(
        ((real, value) for real, value in given if value is not None),
        key=lambda pair: pair[0].numel(),
        default=(param, None),
    )
    if not isinstance(value, Tensor):
        return value
    dtype = param.dtype if value.dtype is real.dtype else value.dtype
    kept, weight = value.detach().float(), real.detach().float()
    if float((kept - weight).norm()) <= _NEAR * float(weight.norm()):
        return param.detach().to(dtype, copy=True)
    mean = float(kept.reshape(-1)[:_ENOUGH].double().mean())
    return torch.full_like(param, mean, dtype=dtype, requires_grad=False)
