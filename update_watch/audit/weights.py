"""The rows of an audit for weights and weight decay.

A rule such as AdamW's moves a weight by at most about the learning rate per step. An update of that size is rounded,
upwards and downwards, at samples of the stored weights; real ones are often smaller, so more may be lost. Where the
update depends on the size of the gradients (SGD), nothing is said.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from update_watch.audit.members import Member, Rows, grouped, health_of, joined, lost_shares, span, spread
from update_watch.audit.table import AuditRow
from update_watch.cures import Cure, extra_bytes
from update_watch.formats import Format
from update_watch.measure.sampling import local
from update_watch.replay.state_forms import dtype_name, stored_bytes
from update_watch.report import Health
from update_watch.wording import listed, number, percent, plural, short, size


def weight_rows(members: list[Member]) -> Rows:
    """Weights by format and by what is known of their updates."""
    rows: Rows = []
    for (dtype, kind), part in grouped(members, lambda m: (dtype_name(local(m.param)), _kind(m))).items():
        row = AuditRow("weights", dtype, len(part), sum(m.bytes for m in part), "", rate=max(m.lr for m in part))
        if kind == "rounded":
            rows.append(_rounded_weights(row, part))
            continue
        health, expected = Health.healthy, "the optimizer makes good what rounding takes"
        if kind == "full":
            expected = "FP64 resolves its changes"
        elif kind == "free":
            form = part[0].format
            band = f"under |weight| * 2^-{form.precision + 1} to 2^-{form.precision} is lost" if form else "may be lost"
            expected = f"depends on gradients: an update {band}"
            health = Health.unknown if part[0].is_low else Health.healthy
        elif kind == "unknown":
            health, expected = Health.unknown, part[0].reason or "its learning rate is 0 and no other is known"
        rows.append((dataclasses.replace(row, health=health, expected=expected), ""))
    return rows


def _kind(member: Member) -> str:
    if member.param.dtype is torch.float64:
        return "full"
    if member.properties is None or member.samples is None or member.format is None:
        return "unknown"
    if member.properties.keeps_remainder:
        return "kept"
    if member.properties.step_size is None:
        return "free"
    return "rounded" if member.lr else "unknown"


def _rounded_weights(row: AuditRow, members: list[Member]) -> tuple[AuditRow, str]:
    """Weights moved by about the learning rate."""
    form, w, sizes = joined(members)
    steps = spread(map(_step, members), sizes)
    up, down = (lost_shares(form, w, sign * steps, sizes) for sign in (1.0, -1.0))
    numel = torch.tensor([float(m.param.numel()) for m in members], dtype=torch.float64)
    share = float(((up + down) / 2 * numel).sum() / numel.sum())
    critical = _critical_lr(form, members)
    # a weight that can fall but not rise is stuck as well, hence the worse of the two directions
    worse = torch.maximum(up, down)
    order = worse.argsort(descending=True, stable=True).tolist()
    stalled = [i for i in order if health_of(float(worse[i])) is Health.stalled]
    stalling = [i for i in order if health_of(float(worse[i])) is Health.stalling]
    lrs = span([m.lr for m in members])
    edge = f"; half below {number(critical)}" if members[0].is_low else ""
    row = dataclasses.replace(
        row, lost=share, critical_lr=critical, names=tuple(members[i].name for i in stalled + stalling)
    )
    if not stalled and not stalling:
        return dataclasses.replace(row, expected=f"{percent(share)} of updates of size lr = {lrs} lost{edge}"), ""
    counts = [f"{len(part)} {word}" for part, word in ((stalled, "stalled"), (stalling, "stalling")) if part]
    masters = sum(extra_bytes(Cure.masters, m.param.numel(), m.low_states) for m in members)
    row = dataclasses.replace(
        row,
        expected=f"{', '.join(counts)}; {percent(share)} of updates of size lr = {lrs} lost{edge}",
        health=Health.stalled if stalled else Health.stalling,
        cure="FP32 master weights",
        cure_bytes=masters,
    )
    worst = stalled or stalling
    what = "to stall" if stalled else "to lose part of their updates"
    verb = "is expected" if len(worst) == 1 else "are expected"
    names = listed(tuple(members[i].name for i in worst))
    warning = (
        f"{len(worst)} of {plural(len(members), f'{short(row.dtype)} weight tensor')} {verb} {what} at learning rate"
        f" {lrs}: {names}. Keep FP32 master weights (+{size(masters)}), or use Kahan summation"
        f" (+{size(row.bytes)}) or stochastic rounding (no memory). Updates are often smaller than the learning rate"
        f" and more of them is then lost; below {number(critical)} half of all would be."
    )
    return row, warning


def _critical_lr(form: Format, members: list[Member]) -> float:
    """The learning rate at which half of the updates, element by element, are under half a gap."""
    _, w, sizes = joined(members)
    stands_for = spread((m.param.numel() / n for m, n in zip(members, sizes, strict=True)), sizes)
    ratio = spread((_step(m) / m.lr for m in members), sizes)
    needed = torch.cat([form.half_gap(w, sign * torch.ones_like(w)) / ratio for sign in (1.0, -1.0)])
    order = needed.argsort()
    covered = stands_for.double().repeat(2)[order].cumsum(0)
    return float(needed[order][int((covered < covered[-1] / 2).sum())])


def _step(member: Member) -> float:
    assert member.properties is not None
    assert member.properties.step_size is not None
    return member.lr * member.properties.step_size


def decay_rows(members: list[Member]) -> Rows:
    """Weight decay that acts on the weights themselves; decay added to the gradient is no accumulation of its own."""
    decaying = [
        m for m in members
        if m.weight_decay and m.lr and m.format is not None and m.samples is not None
        and m.properties is not None and m.properties.decouples_decay
    ]  # fmt: skip
    rows: Rows = []
    for (dtype, merges), part in grouped(
        decaying, lambda m: (dtype_name(local(m.param)), m.properties is not None and m.properties.merges_decay)
    ).items():
        rates = [m.lr * m.weight_decay for m in part]
        row = AuditRow("weight decay", dtype, len(part), 0, "", rate=max(rates))
        if merges:
            expected = f"added with the gradient in one rounding (lr * decay = {span(rates)})"
            rows.append((dataclasses.replace(row, expected=expected), ""))
            continue
        form, w, sizes = joined(part)
        d = -w * spread(rates, sizes)
        lost = float(lost_shares(form, w, d, [len(w)]))
        health = health_of(lost)
        expected = f"{percent(lost)} lost at lr * decay = {span(rates)}"
        row = dataclasses.replace(row, expected=expected, lost=lost, health=health)
        if health is Health.healthy:
            rows.append((row, ""))
            continue
        can_fuse = all("fused" in m.options for m in part)
        row = dataclasses.replace(
            row,
            cure=f"FP32 master weights, or {'fused=True' if can_fuse else 'stochastic rounding'}",
            cure_bytes=None,
            names=tuple(m.name for m in part),
        )
        other = (
            "set fused=True, which adds decay and gradient in one rounding" if can_fuse else "use stochastic rounding"
        )
        warning = (
            f"Weight decay is lost in {short(dtype)} weights: lr * weight_decay = {span(rates)} per step, and"
            f" {number(2.0**-form.precision)} is needed for every weight to shrink. Keep FP32 master weights, or"
            f" {other}."
        )
        rows.append((row, warning))
    return rows


def frozen_rows(tensors: list[tuple[str, Tensor]]) -> Rows:
    """Weights that no optimizer holds."""
    rows: Rows = []
    for (trains, dtype), part in grouped((t for _, t in tensors), lambda t: (t.requires_grad, dtype_name(t))).items():
        held = sum(stored_bytes(local(t)) for t in part)
        if trains:
            row = AuditRow("weights, in no optimizer", dtype, len(part), held, "will not move", Health.idle)
        else:
            row = AuditRow("weights, frozen", dtype, len(part), held, "requires_grad is False", Health.frozen)
        rows.append((row, ""))
    return rows
