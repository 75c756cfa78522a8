"""The parameters an audit looks at, and rounding applied to samples of stored numbers: how many changes are lost?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from update_watch import formats
from update_watch.audit.table import AuditRow
from update_watch.formats import Format
from update_watch.measure.sampling import local
from update_watch.replay.rule_properties import RuleProperties
from update_watch.replay.state_forms import StateForm, stored_bytes
from update_watch.report import Health
from update_watch.thresholds import Thresholds
from update_watch.wording import number

Rows = list[tuple[AuditRow, str]]  # with a warning each, "" when nothing is wrong
LIMITS = Thresholds()
FULL = 24  # significant bits from which on a format counts as full precision
_Item = TypeVar("_Item")
_Key = TypeVar("_Key")


@dataclasses.dataclass
class Member:
    """One parameter of an optimizer."""

    name: str
    param: Tensor
    lr: float  # the highest that is known of
    weight_decay: float
    properties: RuleProperties | None
    forms: Mapping[str, StateForm]  # of the states it will get
    reason: str  # why something of it is not known; ""
    state: Mapping[str, Any]  # what it has by now
    options: tuple[str, ...] = ()  # what its optimizer can be told, of `cures.OPTIONS`
    samples: Tensor | None = None  # FP32, on the CPU; None where its values cannot be read

    @property
    def format(self) -> Format | None:
        return formats.of(self.param.dtype)

    @property
    def is_low(self) -> bool:
        """Stored in less than full precision."""
        return self.format is None or self.format.precision < FULL

    @property
    def low_states(self) -> int:
        """How many states of its own size it will have in a 16-bit format."""
        return sum(form.bytes_for(tuple(self.param.shape)) == 2 * self.param.numel() for form in self.forms.values())

    @property
    def bytes(self) -> int:
        return stored_bytes(local(self.param))


def lost_shares(form: Format, w: Tensor, d: Tensor, sizes: list[int]) -> Tensor:
    """Per part of `w`: the share of changes `d` that rounding takes. (A part without changes: 0.)"""
    wanted = d != 0
    columns = torch.stack([form.absorbs(w, d) & wanted, wanted], dim=1).double()
    sums = torch.segment_reduce(columns, "sum", lengths=torch.tensor(sizes))
    return sums[:, 0] / sums[:, 1].clamp(min=1)


def health_of(lost: float) -> Health:
    """What to expect where this share of the changes is lost."""
    if 1 - lost < LIMITS.stalled:
        return Health.stalled
    return Health.stalling if 1 - lost < LIMITS.stalling else Health.healthy


def spread(values: Iterable[float], sizes: list[int]) -> Tensor:
    """One value per part, for each of its elements; FP32."""
    return torch.tensor(list(values), dtype=torch.float32).repeat_interleave(torch.tensor(sizes))


def samples(member: Member) -> Tensor:
    assert member.samples is not None
    return member.samples


def joined(members: list[Member]) -> tuple[Format, Tensor, list[int]]:
    """Format and samples of members of one format, and how many each has."""
    form = members[0].format
    assert form is not None
    parts = [samples(m) for m in members]
    return form, torch.cat(parts), [len(part) for part in parts]


def span(values: list[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Items by key, in the order in which they come."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
