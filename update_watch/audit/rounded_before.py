"""FP32 numbers that are none: weights, masters and states of which every value is one of BF16.

A resume or a load through BF16 leaves them so. What that took is lost, and no format brings it back; from the next step on they
are as good as any. Constants say nothing: values must differ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from update_watch.audit.members import Member
from update_watch.measure.sampling import VARIED, local, unsamplable
from update_watch.wording import listed, plural


def is_rounded(samples: Tensor) -> bool:
    """Whether FP32 values (on the CPU) are all values of BF16, and not just a constant or two."""
    return bool(samples.bfloat16().float().eq(samples).all()) and len(set(samples.tolist())) >= VARIED


def sentences(members: list[Member], own: Collection[int], view: Callable[[Tensor], Tensor]) -> list[str]:
    """What was found, for people. `own`: ids of the model's tensors; others are masters. `view`: of a tensor's samples.

    Masters are made of rounded weights at the start of every run: they are only named where their states have begun.
    """
    full = [m for m in members if m.param.dtype is torch.float32 and m.samples is not None]
    found: list[str] = []
    for what, part in (
        ("FP32 weight", [m for m in full if id(m.param) in own]),
        ("FP32 master", [m for m in full if id(m.param) not in own and m.state]),
    ):
        _add(found, what, [m.name for m in part if m.samples is not None and is_rounded(m.samples)], len(part))
    names: dict[str, list[str]] = {}
    of: dict[str, int] = {}
    for m, state, samples in _read_states(members, view):
        of[state] = of.get(state, 0) + 1
        if is_rounded(samples):
            names.setdefault(state, []).append(m.name)
    for state, rounded in names.items():
        _add(found, f"FP32 {state}", rounded, of[state])
    return found


def _add(found: list[str], what: str, names: list[str], of: int) -> None:
    if names:
        verb = "holds" if len(names) == 1 else "hold"
        found.append(
            f"{len(names)} of {plural(of, f'{what} tensor')} {verb} nothing but values of BF16, as after a load or a resume"
            f" through BF16: {listed(tuple(names))}. What that rounded away is lost; from here on they train as FP32 does."
        )


def _read_states(members: list[Member], view: Callable[[Tensor], Tensor]) -> list[tuple[Member, str, Tensor]]:
    """Samples of all FP32 states, with one transfer per device."""
    views: dict[torch.device, list[tuple[Member, str, Tensor]]] = {}
    for m in members:
        for name, value in m.state.items():
            if not isinstance(value, Tensor) or value.dtype is not torch.float32 or value.numel() < VARIED:
                continue
            shard = local(value)
            if not shard.is_meta and not unsamplable(shard) and shard.numel():
                views.setdefault(shard.device, []).append((m, str(name), view(shard)))
    found = []
    for triples in views.values():
        joined = torch.cat([samples for _, _, samples in triples]).cpu()
        parts = torch.split(joined, [len(samples) for _, _, samples in triples])
        found += [(m, name, part) for (m, name, _), part in zip(triples, parts, strict=True)]
    return found
