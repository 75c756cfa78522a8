"""Masters that nothing marks, known by their values: those of one parameter, rounded; or of many, one after the other.

Values that several parameters have (norms of ones, biases of zeros) tell nothing. There the order does: of all of one kind,
or of those between two that are known.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from update_watch.measure.identity.partitions import is_flat
from update_watch.measure.sampling import local
from update_watch.odd_tensors import unreadable

_FEWEST = 2  # parameters in a flat master
_PADDING = 0.25  # of it, zeros at its end, at most

Pairs = list[tuple[Tensor, Tensor]]  # master and parameter


def pairs_of(masters: Sequence[Tensor], params: Sequence[Tensor], taken: Container[int] = ()) -> Pairs:
    """Which master has the shape and values of which parameter, as far as that can be told.

    `taken`: ids of parameters whose masters are known already; they may have new ones.
    """
    # the whole list in the model's order is worth more than the values of zeros and ones
    if len(masters) == len(params) and all(map(_is_copy, masters, params)):
        return list(zip(masters, params, strict=True))
    alike = [[i for i, param in enumerate(params) if _is_copy(master, param)] for master in masters]
    rivals: dict[int, int] = {}
    for places in alike:
        for i in places:
            rivals[i] = rivals.get(i, 0) + 1
    found = {m: places[0] for m, places in enumerate(alike) if len(places) == 1 and rivals[places[0]] == 1}
    # zeros and ones are found in any model: they count beside values that are not
    if all(_is_constant(params[i]) for i in found.values()):
        return []
    _in_order({m: tuple(places) for m, places in enumerate(alike) if m not in found}, found)
    free = {id(params[i]) for i in range(len(params)) if id(params[i]) not in taken}
    _in_order({m: tuple(i for i in p if id(params[i]) in free) for m, p in enumerate(alike) if m not in found}, found)
    _in_order({m: _between(m, places, found) for m, places in enumerate(alike) if m not in found}, found)
    return [(masters[m], params[i]) for m, i in sorted(found.items())]


def _in_order(candidates: Mapping[int, tuple[int, ...]], found: dict[int, int]) -> None:
    """Pair masters with the same candidates, where there are as many of the one as of the other."""
    kinds: dict[tuple[int, ...], list[int]] = {}
    used = set(found.values())
    for m, places in candidates.items():
        kinds.setdefault(tuple(i for i in places if i not in used), []).append(m)
    for places, members in kinds.items():
        if len(places) == len(members):
            found.update(zip(members, places, strict=True))


def _between(m: int, places: Sequence[int], found: Mapping[int, int]) -> tuple[int, ...]:
    """Those of the places that lie between what the nearest masters before and after are copies of."""
    before = found[max(k for k in found if k < m)] if any(k < m for k in found) else -1
    after = found[min(k for k in found if k > m)] if any(k > m for k in found) else 1 << 62
    return tuple(i for i in places if before < i < after)


def flats_of(flats: Sequence[Tensor], params: Sequence[Tensor]) -> list[tuple[Tensor, list[tuple[int, Tensor]]]]:
    """Flat tensors, of those given, of which it is known which parameters lie in them, and from where on."""
    left = [param for param in params if local(param) is param and param.numel() and not unreadable(param)]
    waiting = [flat for flat in flats if is_flat(flat) and not unreadable(flat)]
    found: list[tuple[Tensor, list[tuple[int, Tensor]]]] = []
    for is_told in (False, True):  # zeros and ones count beside values that are not
        for flat in list(waiting) if found or not is_told else ():
            held = _held_by(flat, left, is_told)
            if held:
                found.append((flat, held))
                used = {id(param) for _, param in held}
                left = [param for param in left if id(param) not in used]
                waiting = [one for one in waiting if one is not flat]
    return found


def part_of(flat: Tensor, start: int, param: Tensor) -> Tensor:
    """The elements of a parameter in a flat tensor, in its shape."""
    return flat.detach()[start : start + param.numel()].view(param.shape)


def _held_by(flat: Tensor, params: Sequence[Tensor], is_told: bool) -> list[tuple[int, Tensor]]:
    """[] where not all of it is known, or nothing but values that any model has and that is not `is_told` already."""
    for in_model_order in (True, False):
        found = _laid_out(flat, params, in_model_order)
        rest = flat.detach()[sum(param.numel() for _, param in found) :]
        if rest.numel() <= _PADDING * flat.numel() and not bool(rest.any()):
            is_told = is_told or not all(_is_constant(param) for _, param in found)
            return found if is_told and len(found) >= _FEWEST else []
    return []


def _laid_out(flat: Tensor, params: Sequence[Tensor], in_model_order: bool) -> list[tuple[int, Tensor]]:
    """As many as can be told from its start on: each behind the one before in the model, or each the first that fits."""
    at, left = 0, list(params)
    found: list[tuple[int, Tensor]] = []
    while left and at < flat.numel():
        able = range(1) if in_model_order and found else range(len(left))
        i = next((i for i in able if _is_at(flat, at, left[i])), None)
        if i is None:
            break
        param = left.pop(i)
        if in_model_order:
            del left[:i]
        found.append((at, param))
        at += param.numel()
    return found


def _is_at(flat: Tensor, start: int, param: Tensor) -> bool:
    size = param.numel()
    if start + size > flat.numel() or flat.device != param.device or not param.is_contiguous():
        return False
    return _is_copy(part_of(flat, start, param), param)


def _is_constant(tensor: Tensor) -> bool:
    values = local(tensor.detach()).reshape(-1)
    return bool((values == values[0]).all())


def _is_copy(master: Any, param: Tensor) -> bool:
    a, b = local(master.detach()), local(param.detach())
    if unreadable(a) or unreadable(b):
        return False
    if a.shape != b.shape or a.device != b.device or a.is_meta or not a.numel():
        return False
    return bool(torch.equal(a.to(b.dtype), b))
