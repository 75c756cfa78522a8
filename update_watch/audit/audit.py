"""What accumulates in a training, and what rounding will take from it: known before the first step.

Weights, optimizer state, weight decay, averages and the gradient buffer all add small changes to stored numbers. A
change under half the gap to the neighbouring stored number is lost (`formats`). How large the changes will be follows
from learning rate, beta and decay where the rule allows it; what the rule does is tried, not guessed (`replay.rule_properties`).
What is made of that: `audit_weights` and `audit_states`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.audit import rounded_before
from update_watch.audit.members import Member
from update_watch.audit.states import average_rows, gradient_rows, state_rows
from update_watch.audit.table import Audit
from update_watch.audit.weights import decay_rows, frozen_rows, weight_rows
from update_watch.cures import options_of
from update_watch.measure.identity.names import names_of
from update_watch.measure.identity.partitions import chain
from update_watch.measure.parameters import why_not_together, why_unknown
from update_watch.measure.plain_torch import PlainTorch
from update_watch.measure.sampling import local, unsamplable
from update_watch.odd_tensors import unreadable
from update_watch.replay.rule import Kind
from update_watch.replay.rule_kind import find_rule
from update_watch.replay.rule_properties import RuleProperties, find_properties
from update_watch.replay.state_forms import StateForm, find_states, likeness
from update_watch.wording import first_line, listed, plural
from update_watch.wrappers import unwrap

SAMPLES = 128  # elements looked at per tensor


def audit(
    model: Any,
    optimizer: Any,
    averages: Mapping[str, Any] | None = None,
) -> Audit:
    """What accumulates, in which format, what is expected to be lost, and what the cures cost.

    To be called before the first step; states that exist already are taken as they are. Nothing is changed: not the
    optimizer, not its parameters, no random state. The learning rate judged by is the highest that is known of: with a
    scheduler, the one the schedule starts from or rises to.

    Args:
        model: a module, or (name, tensor) pairs.
        optimizer: one torch optimizer or a sequence of them; wrappers are looked through.
        averages: averaged models by name, `{"ema": ema_model}`; modules or (name, tensor) pairs.

    Raises:
        TypeError: `model` or an average is neither, or there is no torch optimizer in `optimizer`.
    """
    given = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    optimizers = [unwrap(inner) for one in given for inner in chain(one)]
    parameters = _pairs(model, "model")
    averaged = {name: (average, _pairs(average, f"averages[{name!r}]")) for name, average in (averages or {}).items()}
    notes: list[str] = []
    plain = PlainTorch(*optimizers)
    with plain, plain:
        members = _members(optimizers, parameters, notes)
        rows = [
            *weight_rows(members),
            *decay_rows(members),
            *state_rows(members),
            *gradient_rows(members),
            *average_rows(averaged),
            *frozen_rows(_left_over(parameters, members)),
        ]
        seen = rounded_before.sentences(members, {id(tensor) for _, tensor in parameters}, _view)
    warnings = [warning for _, warning in rows if warning]
    foreign = {id(member.param) for member in members} - {id(tensor) for _, tensor in parameters}
    forgotten = tuple(name for name, tensor in _left_over(parameters, members) if tensor.requires_grad)
    if foreign:
        notes.append(
            f"The optimizer holds {plural(len(foreign), 'tensor')} that are not the model's own, such as FP32 master"
            " weights; what is said of them holds for them, not for the model's copies."
        )
    elif forgotten:
        verb = "requires a gradient" if len(forgotten) == 1 else "require gradients"
        warnings.append(f"{plural(len(forgotten), 'tensor')} {verb}, but no optimizer holds them: {listed(forgotten)}.")
    return Audit(tuple(row for row, _ in rows), tuple(warnings), tuple(dict.fromkeys(notes)), tuple(seen))


def _members(optimizers: Sequence[Optimizer], parameters: list[tuple[str, Tensor]], notes: list[str]) -> list[Member]:
    """Every parameter of every optimizer, with what is known of the rule that will move it."""
    names = names_of(parameters)
    known: dict[Hashable, tuple[RuleProperties | None, dict[str, StateForm], str]] = {}
    members: list[Member] = []
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            lr, decay = peak_lr(group), number_of(group.get("weight_decay"))
            for position, param in enumerate(group["params"]):
                shard = local(param)
                odd = "" if shard.is_meta else unreadable(shard)  # of meta tensors all but the values is known
                key: Hashable = odd or likeness(optimizer, index, shard)
                if odd:
                    known[key] = None, {}, odd
                elif key not in known:
                    known[key] = _find_properties(optimizer, index, shard)
                    name = type(optimizer).__name__
                    if known[key][2] and param.is_floating_point():
                        notes.append(f"Not everything is known of {name}: {known[key][2]}.")
                    elif not known[key][2] and (why := _why_unmeasured(optimizer, index, param)):
                        notes.append(f"What {name} intends will not be measured: {why}.")
                properties, forms, reason = known[key]
                name = names.get(id(param), (f"group{index}.param{position}",))[0]
                reason = reason or unsamplable(shard) or ("its weights are complex" if param.is_complex() else "")
                state = optimizer.state.get(param) or {}
                members.append(
                    Member(name, param, lr or 0.0, decay or 0.0, properties, forms, reason, state, options_of(group))
                )
    _read_samples(members)
    return members


def _find_properties(
    optimizer: Optimizer, group: int, param: Tensor
) -> tuple[RuleProperties | None, dict[str, StateForm], str]:
    """The properties, the states to come, and why one of them is not known."""
    if not param.is_floating_point():
        kind = "complex" if param.is_complex() else str(param.dtype).removeprefix("torch.")
        return None, {}, f"its weights are {kind}"
    try:
        forms = find_states(optimizer, group, param)
        return find_properties(optimizer, group, param.dtype, param.dim()), forms, ""
    except Exception as error:  # formats without arithmetic raise torch's own errors, and optimizers any
        return None, {}, first_line(error)


def _why_unmeasured(optimizer: Optimizer, group: int, param: Tensor) -> str:
    """Why a watch will not know the updates of this parameter; "" where it will."""
    shard = local(param)
    if type(optimizer).__module__.startswith("torch.optim") or unsamplable(shard) or not shard.numel():
        return ""  # torch's own rules that run at all are known
    try:
        rule = find_rule(optimizer, group, shard.dim(), shape=tuple(shard.shape), dtype=shard.dtype)
    except Exception as error:  # as above
        return first_line(error)
    if rule.has_failed:
        return f"{rule.reason}; it is tried once more after the first step"
    return why_unknown(param, rule) or (why_not_together(optimizer) if rule.kind is Kind.together else "")


def _read_samples(members: list[Member]) -> None:
    """Read the samples of all members, with one transfer per device."""
    views: dict[torch.device, list[tuple[Member, Tensor]]] = {}
    for member in members:
        shard = local(member.param)
        if not unsamplable(shard) and shard.numel() and not shard.is_complex():
            views.setdefault(shard.device, []).append((member, _view(shard).to(torch.float32)))
    for pairs in views.values():
        joined = torch.cat([view for _, view in pairs]).cpu()
        parts = torch.split(joined, [len(view) for _, view in pairs])
        for (member, _), part in zip(pairs, parts, strict=True):
            member.samples = part


def _view(tensor: Tensor) -> Tensor:
    """Up to SAMPLES elements of a dense tensor at regular distance, in memory order; not aligned with its rows."""
    count = min(tensor.numel(), SAMPLES)
    step = tensor.numel() // count
    row = tensor.shape[-1] if tensor.dim() else 1
    while step > 1 and math.gcd(step, row) > 1:
        step -= 1
    return tensor.detach().as_strided((count,), (step,))


def peak_lr(group: Mapping[str, Any]) -> float | None:
    """The highest learning rate that is known of: schedulers keep theirs as `initial_lr` or `max_lr`."""
    known = [value for key in ("lr", "initial_lr", "max_lr") if (value := number_of(group.get(key))) is not None]
    return max(known, default=None)


def number_of(value: Any) -> float | None:
    """A setting as a float, read from its device if need be; None when it is no number."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_meta else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _left_over(parameters: list[tuple[str, Tensor]], members: list[Member]) -> list[tuple[str, Tensor]]:
    owned = {id(member.param) for member in members}
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in parameters:
        if id(tensor) not in owned:
            found.setdefault(id(tensor), (name, tensor))
    return list(found.values())


def _pairs(value: Any, owner: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, torch.nn.Module):
        # ema-pytorch and the like keep the live model beside the averaged one
        inner = getattr(value, "ema_model", value)
        return list((inner if isinstance(inner, torch.nn.Module) else value).named_parameters(remove_duplicate=False))
    try:
        pairs = [(str(name), tensor) for name, tensor in value]
    except (TypeError, ValueError):
        pairs = []
    if not pairs or not all(isinstance(tensor, Tensor) for _, tensor in pairs):
        raise TypeError(f"audit({owner}={type(value).__name__}): expected a torch module or (name, tensor) pairs")
    return pairs
