"""The watched parameters of one optimizer: names, groups, sample positions, views of what is read each step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from update_watch import formats
from update_watch.measure.identity.names import members_of
from update_watch.measure.identity.partitions import Piece, PieceSampler
from update_watch.measure.sampling import Sampler, local, unsamplable
from update_watch.odd_tensors import shape_of, unreadable
from update_watch.replay import rule_properties, state_forms
from update_watch.replay.rounding_scheme import Scheme, find_scheme
from update_watch.replay.rule import Kind, Rule
from update_watch.replay.rule_kind import find_rule, find_scaled_rule
from update_watch.replay.synthetic_training import mimic

# whole-tensor replays of more elements than this would cost too much memory and time in one step
WHOLE_LIMIT = 2**24


class Row:
    """One parameter of one optimizer."""

    __slots__ = (
        "_checked",
        "decouples_decay",
        "form",
        "group",
        "identity",
        "is_first",
        "layout",
        "left_out",
        "lived",
        "names",
        "of",
        "param",
        "piece",
        "rates",
        "reason",
        "rule",
        "sampler",
        "scheme",
        "shaped",
        "state_facts",
    )

    def __init__(
        self,
        param: Tensor,
        names: tuple[str, ...],
        group: int,
        rule: Rule,
        scheme: Scheme,
        samples: int,
        piece: Piece | None = None,
        odd: str = "",
    ) -> None:
        """`odd`: why its elements cannot be sampled; "" when they can."""
        self.param, self.names, self.group, self.rule, self.scheme = param, names, group, rule, scheme
        self.piece = piece  # the part of `param` that is looked at; None: all of it
        # the row whose elements are read in several, of which this is the first or another one; None: it is read as one
        self.of: Row | None = None
        self.is_first = True
        self.layout = _layout(param)  # as it was planned for
        self.identity: dict[str, Any] | None = None  # what it is, once somebody has asked
        self.state_facts: Any = None  # what is said of its states, likewise
        self.decouples_decay = False  # weight decay acts on the weight, and its rounding may be looked at
        self.rates: dict[str, float] = {}  # state -> 1 - beta of `x <- beta x + ...`
        # counters when they were last read, and steps with a gradient since: parameters equal here have equal counters
        self.lived: tuple[tuple[float, ...], int] = (), 0
        self.reason = odd or why_unknown(param, rule)
        self.sampler: Sampler | None = None if odd else self.sampler_of(samples, 2)
        self._checked: tuple[str, ...] = ()
        self.shaped: frozenset[str] = frozenset()  # states of the parameter's shape
        # the carrier, where the rule keeps none of that name in FP32: there is nothing to carry then
        self.left_out = frozenset({scheme.carrier} - {"", *rule.forms})
        self.form: tuple[Any, ...] = (group, rule.rows, rule.kind, id(self) if rule.apart else 0, ())

    def sampler_of(self, samples: int, sets: int = 1) -> Sampler:
        """Sample positions of their own."""
        if self.piece is not None:
            return PieceSampler(self.param, self.piece, samples, sets)
        return Sampler(local(self.param), samples, sets)

    def stretches(self, samples: int, rows: int) -> list[Row]:
        """At most so many rows, each of a stretch: all is read where so many can, else of one length, all met equally often."""
        shard, (numel, block, *_) = local(self.param), self.sampler.positions  # type: ignore[union-attr, misc]
        equal = next(n for n in range(rows, 0, -1) if numel // block % n == 0)
        length, found = samples if rows * samples >= numel else numel // equal, []
        for start in range(0, numel, length):
            found.append(row := copy.copy(self))
            row.of, row.is_first = self, start == 0
            row.sampler = Sampler(shard, samples, 2, slice(start, min(start + length, numel)))
        return found

    @property
    def can_be_stretched(self) -> bool:
        """Its rule does not mind how many of its elements lie side by side; there are more than are sampled."""
        rule, is_plain = self.rule, type(self.sampler) is Sampler and not self.is_whole
        return is_plain and not rule.rows and not rule.apart and rule.scaled is None and self.is_measured

    @property
    def is_measured(self) -> bool:
        return not self.reason

    @property
    def has_changed(self) -> bool:
        """Another tensor was put into the parameter (`p.data = ...`, `model.to`): other shape, format or device."""
        shape, dtype, device = self.layout
        shard = local(self.param)
        if shard.dtype is dtype and shard.device == device and shard.layout is torch.strided and not shard.is_nested:
            return (() if is_lazy(shard) else shard.shape) != shape
        return _layout(self.param) != self.layout

    def check(self, state: Mapping[str, Any]) -> None:
        """Does what was found by trial hold for the states this parameter really has? Looked at when they change."""
        if not state or self._checked == tuple(state):
            return
        self._checked = tuple(state)
        shape = local(self.param).shape
        elements = {*self.rule.element_states, self.scheme.carrier}
        # a state that is None may become a tensor later
        self.shaped = frozenset(
            name
            for name, value in state.items()
            if (isinstance(value, Tensor) and holds_elements(local(value), shape))
            or (value is None and name in elements)
        )
        if away := self.states_elsewhere(state):
            self.shaped -= {*away}  # not even read: that would be a copy between devices in every step
            self.reason = self.reason or _elsewhere(self.param, away)
        self.form = (self.group, self.rule.rows, self.rule.kind, id(self) if self.rule.apart else 0, self._checked)
        known = {name: value for name, value in state.items() if name != self.scheme.carrier}
        self.reason = self.reason or self.rule.misfit(self.param, known)

    def step_likeness(self, state: Mapping[str, Any]) -> tuple[Any, ...]:
        """Rows equal in this can be replayed as one: same group, same form, same scalar state (step counters)."""
        scalars: list[Any] = []
        for name, value in state.items():
            if name in self.shaped or value is None:
                scalars.append(value is None)
            elif isinstance(value, Tensor):
                # a counter on the device is not read: equal histories have equal counters
                scalars.append(value.item() if value.is_cpu and value.numel() == 1 else self.lived)
            else:
                scalars.append(value)
        return self.form, scalars

    def states_elsewhere(self, state: Mapping[str, Any]) -> dict[str, torch.device]:
        """States of the parameter's shape that are on another device than it, as with offloading to the CPU."""
        device = local(self.param).device
        return {
            name: value.device
            for name, value in state.items()
            if name in self.shaped and isinstance(value, Tensor) and value.device != device
        }

    @property
    def is_whole(self) -> bool:
        """All its elements are looked at, in every measured step."""
        return self.sampler is not None and self.sampler.is_whole


def holds_elements(state: Tensor, shape: torch.Size) -> bool:
    """One number per weight. Quantised states say that they have the weight's shape; what they hold has another."""
    return not unreadable(state) and state.shape == shape and not hasattr(state, "__tensor_flatten__")


def _layout(param: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    shard = local(param)
    return shape_of(shard) if shard.is_nested or is_lazy(shard) else shard.shape, shard.dtype, shard.device


def _elsewhere(param: Tensor, states: Mapping[str, torch.device]) -> str:
    name, device = next(iter(states.items()))
    return f"its state '{name}' is on {device}, the weight on {local(param).device}: they cannot be read together"


def why_unknown(param: Tensor, rule: Rule) -> str:
    """Why the update of this parameter, which can be sampled, cannot be measured; "" when it can."""
    shard = local(param)
    if shard.numel() == 0:
        return "no element of it is on this rank" if param.numel() else "it has no elements"
    if rule.kind is Kind.unknown:
        return rule.reason
    if rule.kind is Kind.whole and shard.numel() < param.numel():
        return f"its rule needs the whole tensor, and this rank holds {shard.numel():,} of {param.numel():,} elements"
    if rule.kind is Kind.whole and shard.numel() > WHOLE_LIMIT:
        return f"its rule needs the whole tensor, and {shard.numel():,} elements are over the limit of {WHOLE_LIMIT:,}"
    if shard.dtype.is_complex:
        return f"its dtype {shard.dtype} is complex"
    return ""


def why_not_together(optimizer: Optimizer) -> str:
    """Why the updates of all tensors of an optimizer cannot be replayed at once; "" when they can."""
    params = members_of(optimizer)
    shards = [local(param) for param in params]
    numel = sum(shard.numel() for shard in shards)
    if any(shard.numel() < param.numel() for shard, param in zip(shards, params, strict=True)):
        return "its rule needs all tensors of its optimizer together, and this rank does not hold the whole of them"
    if len({shard.device for shard in shards}) > 1:
        return "its rule needs all tensors of its optimizer together, and they are on several devices"
    if numel > WHOLE_LIMIT:
        return (
            f"its rule needs all tensors of its optimizer together, and {numel:,} elements are over the limit of"
            f" {WHOLE_LIMIT:,}"
        )
    return ""


def build_rows(
    optimizer: Optimizer,
    names: dict[int, tuple[str, ...]],
    samples: int,
    label: str,
    found: dict[Any, Any],
    pieces: Mapping[int, Sequence[Piece]] | None = None,
) -> list[Row]:
    """Rows of all parameters of an optimizer, alike ones next to each other. `found` remembers probes.

    A flat tensor with `pieces` has a row for each.
    """
    rows: list[Row] = []
    kind = found.setdefault(("kind", id(optimizer)), _kind_of(optimizer))
    apart = ""  # why its tensors cannot be replayed together, where a rule needs that
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            odd = unsamplable(local(param))
            rule, scheme = _rule_and_scheme(optimizer, index, local(param), odd, kind, found)
            if rule.kind is Kind.together and not odd:
                apart = apart or why_not_together(optimizer)
            known = names.get(id(param)) or (f"{label}group{index}.param{position}",)
            for piece in (pieces or {}).get(id(param), (None,)):
                called = known if piece is None else piece.names
                row = Row(param, called, index, rule, scheme, samples, piece, odd)
                if rule.kind is Kind.together:
                    row.reason = row.reason or apart
                if row.is_measured and param.dtype in formats.HALVES:
                    _find_properties(row, optimizer, kind, found)
                rows.append(row)
    rows.sort(key=_likeness)
    return rows


def _rule_and_scheme(
    optimizer: Optimizer, group: int, shard: Tensor, odd: str, kind: Any, found: dict[Any, Any]
) -> tuple[Rule, Scheme]:
    """How the updates of parameters like `shard` can be replayed, and what becomes of what rounding takes."""
    if odd:  # it is only named: nothing has to be known of its rule
        return Rule(Kind.unknown, odd), Scheme("unknown")
    shape, dtype = shape_of(shard), shard.dtype
    key = ("rule", kind, group, mimic(shape), dtype)
    if key in found:
        return found[key]  # type: ignore[no-any-return]
    # an empty shard has no updates to find the rule with
    rule = Rule(Kind.unknown) if 0 in shape else find_rule(optimizer, group, len(shape), shape=shape, dtype=dtype)
    scheme_key = ("scheme", kind, group, dtype, min(len(shape), 2))
    if rule.scaled is None and scheme_key not in found:
        found[scheme_key] = find_scheme(optimizer, group, dtype, len(shape))
    if rule.scaled is None and rule.low_states - {found[scheme_key].carrier}:
        other = find_scaled_rule(optimizer, group, shape, dtype)
        rule = rule if other.scaled is None else other
    scheme = found[scheme_key] if rule.scaled is None else rule.scaled.scheme
    if rule.kind is Kind.together and scheme.carrier:
        reason = (
            f"its rule needs all tensors of its optimizer together, and a part of each weight is in '{scheme.carrier}'"
        )
        rule = Rule(Kind.unknown, reason)
    found[key] = rule, scheme
    return rule, scheme


def forget_failed_trials(optimizer: Optimizer, rows: Sequence[Row], found: dict[Any, Any]) -> bool:
    """Let the rules that did not run when they were tried be tried again. False: there are none."""
    if not any(row.rule.has_failed for row in rows):
        return False
    failed = [k for k, v in found.items() if isinstance(v, tuple) and v and isinstance(v[0], Rule) and v[0].has_failed]
    for key in failed:
        del found[key]
    found.pop(("kind", id(optimizer)), None)
    return True


# attributes of torch's optimizers and schedulers that say nothing of the rule
_BOOKKEEPING = ("state", "param_groups", "step", "defaults", "_optimizer_", "_zero_grad", "_opt_called", "_warned")


def _kind_of(optimizer: Optimizer) -> Any:
    """Optimizers that are equal in this behave alike, and one trial is enough for all of them.

    One optimizer per parameter (stepped in the backward pass) makes hundreds, one that is made anew for every step as
    many. What cannot be compared stays apart.
    """
    if optimizer.state and sum(len(group["params"]) for group in optimizer.param_groups) > 1:
        return id(optimizer)
    settings = {k: v for k, v in vars(optimizer).items() if not k.startswith(_BOOKKEEPING)}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    states = [optimizer.state.get(p) or {} for group in optimizer.param_groups for p in group["params"]]
    marks = [sorted(vars(p)) for group in optimizer.param_groups for p in group["params"]]
    if not all(map(_is_plain, (settings, *groups))) or any(marks):
        return id(optimizer)
    counters = [(k, v.item() if _is_counter(v) else type(v).__name__) for state in states for k, v in state.items()]
    return (type(optimizer), repr(settings), repr(groups), repr(counters))


def _is_counter(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str)


def _find_properties(row: Row, optimizer: Optimizer, kind: Any, found: dict[Any, Any]) -> None:
    """What rounding may do to decay and states, found on synthetic parameters."""
    param = local(row.param)
    ndim = min(param.dim(), 2)
    key = ("properties", kind, row.group, param.dtype, ndim)
    if key not in found:
        try:
            seen = rule_properties.find_decay(optimizer, row.group, param.dtype, ndim)
            # joined with the gradient's part before rounding, decay arrives as that does
            decouples = seen.decouples_decay and not seen.merges_decay
        except Exception:  # torch's own errors as well, of formats that it cannot compute with
            decouples = False
        try:
            states = state_forms.find_states(optimizer, row.group, param)
        except Exception:  # as above
            states = {}
        found[key] = decouples, {k: 1 - s.decay for k, s in states.items() if s.decay is not None}
    row.decouples_decay, row.rates = found[key]


def _likeness(row: Row) -> tuple[Any, ...]:
    shard = local(row.param)
    return (str(shard.device), row.group, row.rule.kind.value, row.rule.rows, str(shard.dtype), row.is_whole)
