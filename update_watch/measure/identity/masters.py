"""Optimizers that step other tensors than the model's: FP32 master copies, flat partitions. Whose are they?

Mixed-precision wrappers (Apex, Megatron, DeepSpeed, hand-written loops) keep FP32 weights of their own, let the optimizer
step those, and copy the result into the model. What arrives is then to be seen in the master, under the parameter's name.
A master is known by what its wrapper says (`partitions`), or by its values (`by_value`) and gradients as the parameter has
them: a copy that nobody feeds is no master. What cannot be told stays unknown, with the reason.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.measure.identity import by_value, partitions
from update_watch.measure.identity.partitions import Piece
from update_watch.measure.sampling import local

_ELSEWHERE = "its optimizer steps other tensors than the model's, and which of them hold this parameter is not known"
_ZERO_3 = (
    "DeepSpeed ZeRO-3 steps a flat partition instead, and which one holds this parameter is not known: give the watch "
    "`engine.optimizer`, not the optimizer inside it; a partition that is swapped out cannot be watched"
)

_SHORTEST_PARTITION = 1024
_ALIKE = 0.98  # squared cosine of gradients of which one is the other, rounded and scaled


class Masters(NamedTuple):
    """What was found out about the tensors of one optimizer that are not the model's."""

    names: dict[int, tuple[str, ...]]  # id of a stepped tensor -> the parameters it holds
    instead: dict[int, str]  # id of a model's parameter -> why it is not measured itself; "": its master has its name
    pieces: dict[int, list[Piece]]  # id of a flat tensor that is stepped -> what lies in it
    pairs: list[tuple[Tensor, Tensor]]  # master and parameter, where both have the same shape
    views: list[tuple[Tensor, Tensor, Tensor]]  # the same where the master is a part of a flat tensor, and that

    @property
    def is_empty(self) -> bool:
        """Nothing that is stepped stands for a parameter."""
        return not self.names and not self.pieces


def find(
    named: Sequence[tuple[str, Tensor]],
    known: dict[int, tuple[str, ...]],
    optimizer: Optimizer,
    wrappers: Sequence[Any] = (),
    taken: Container[int] = (),
) -> Masters:
    """Look for the model's parameters behind what the optimizer steps. Compares values: not for use inside a step.

    `wrappers`: what the optimizer came wrapped in; `taken`: ids of parameters whose masters another optimizer steps.
    """
    found = Masters({}, {}, {}, [], [])
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    held = {id(p) for p in stepped}
    left = [p for _, p in named if id(p) not in held and p.requires_grad]
    left = list({id(p): p for p in left}.values())
    names = {id(p): known[id(p)] for p in left}
    for wrapper in [*wrappers, *partitions.keepers(left, optimizer)]:
        pieces, absent = partitions.sub_groups(wrapper, names)
        found.pieces.update(pieces)
        found.instead.update(dict.fromkeys(absent, ""))  # it lies in other ranks' partitions
    free = {id(p): p for p in stepped if id(p) not in known and id(p) not in found.pieces}
    if free:
        _by_mark(left, names, free, found)
        unmarked = [p for p in left if id(p) not in found.instead]
        for flat, parts in by_value.flats_of(list(free.values()), unmarked):
            found.pieces[id(free.pop(id(flat)))] = [
                Piece(names[id(param)], tuple(param.shape), at, param.numel()) for at, param in parts
            ]
            found.views.extend([(by_value.part_of(flat, at, param), param, flat) for at, param in parts])
        for master, param in by_value.pairs_of(list(free.values()), unmarked, taken):
            found.names[id(free.pop(id(master)))] = names[id(param)]
            found.instead[id(param)] = ""
            found.pairs.append((master, param))
    shared: set[int] = set().union(*map(partitions.of_all_ranks, wrappers))
    is_foreign = len(free) == len(stepped)  # it steps nothing that is known to be the model's
    in_pieces = {name for pieces in found.pieces.values() for piece in pieces for name in piece.names}
    for param in left:
        if not in_pieces.isdisjoint(names[id(param)]):
            found.instead[id(param)] = ""
        elif id(param) in shared:
            found.instead.setdefault(id(param), "")  # other ranks step it
        elif hasattr(param, "ds_tensor"):
            found.instead.setdefault(id(param), _ZERO_3)
        elif is_foreign or any(_could_hold(one, param) for one in free.values()):
            found.instead.setdefault(id(param), _ELSEWHERE)
    return found


def _by_mark(left: list[Tensor], names: dict[int, tuple[str, ...]], free: dict[int, Tensor], found: Masters) -> None:
    """Parameters that tell where their master is."""
    for param in left:
        master = getattr(param, "main_param", None)
        if isinstance(master, Tensor) and id(master) in free:
            piece = partitions.shard(param, names[id(param)], master)
            if piece is not None:
                found.pieces[id(master)] = [piece]
            else:
                found.pairs.append((master, param))
            found.names[id(free.pop(id(master)))] = names[id(param)]
            found.instead[id(param)] = ""
    for flat in list(free.values()):
        seen = partitions.view(flat, left, names)
        if seen is not None:
            found.pieces[id(free.pop(id(flat)))] = [seen]
    fragments = partitions.fragments(left, names, free.values())
    found.pieces.update(fragments)
    for key in fragments:
        free.pop(key)
    for param in left if fragments else ():
        if getattr(param, "_hp_mapping", fragments) is None:
            found.instead[id(param)] = ""  # all of it lies in other ranks' partitions


def share_gradients(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool | None:
    """Whether masters are given the gradients of the parameters they are copies of, whatever they are scaled by.

    None: no pair has a gradient on both sides. Reads values: not for use in every step.
    """
    for master, param in sorted(pairs, key=lambda pair: -pair[1].numel()):
        a, b = master.grad, param.grad
        if a is None or b is None or a.layout is not torch.strided or b.layout is not torch.strided:
            continue
        x, y = local(a).detach().double().reshape(-1), local(b).detach().double().reshape(-1)
        if not bool(y.any()):
            continue
        # one that is all zeros is fed by nobody: of scaled gradients it would be the limit
        return bool(x.any()) and float(x @ y) ** 2 >= _ALIKE * float(x @ x) * float(y @ y)
    return None


def get_zeros(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the gradients of all masters are zeros, and those of their parameters are not: nobody feeds them.

    Reads values, and on other devices than the CPU would wait for them: False there.
    """
    read = [(master.grad, param.grad) for master, param in pairs if param.is_cpu and param.grad is not None]
    read = [(a, b) for a, b in read if a is None or a.layout is b.layout is torch.strided]
    return any(bool(local(b).any()) for _, b in read) and not any(
        a is not None and bool(local(a).any()) for a, _ in read
    )


def _could_hold(stepped: Tensor, param: Tensor) -> bool:
    """A tensor of the parameter's shape, or a vector that is long enough to be a partition: not a temperature."""
    if stepped.shape == param.shape:
        return True
    return stepped.dim() == 1 and stepped.numel() >= min(param.numel(), _SHORTEST_PARTITION)
