"""The rows of an audit for what accumulates beside the weights: optimizer state, gradients, averages.

For a state x <- beta * x + ... the question is whether (1 - beta) * x can be taken from x; it is put to all
significands of the state's format.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from update_watch import formats
from update_watch.audit.members import FULL, Member, Rows, grouped, health_of, lost_shares
from update_watch.audit.table import AuditRow
from update_watch.formats import Format
from update_watch.measure.sampling import local
from update_watch.replay.state_forms import StateForm, dtype_name, stored_bytes
from update_watch.report import SEVERITY, Health
from update_watch.wording import number, percent, short, size


def state_rows(members: list[Member]) -> Rows:
    """Every state tensor, those that exist and those that will."""
    found: dict[tuple[str, str, StateForm | None], list[tuple[Member, int]]] = {}
    for member in members:
        present = {k: v for k, v in member.state.items() if isinstance(v, Tensor)}
        for name, value in present.items():
            key = (name, dtype_name(local(value)), _dynamics(member.forms.get(name)))
            found.setdefault(key, []).append((member, stored_bytes(local(value))))
        for name, form in member.forms.items() if not present else ():
            held = form.bytes_for(tuple(local(member.param).shape))
            found.setdefault((name, form.dtype, _dynamics(form)), []).append((member, held))
    rows: Rows = []
    for (name, dtype, dynamics), part in found.items():
        row = AuditRow(f"state {name}", dtype, len(part), sum(held for _, held in part), "")
        rows.append(_state_row(row, name, dynamics, [m for m, _ in part]))
    return rows


def _dynamics(form: StateForm | None) -> StateForm | None:
    return dataclasses.replace(form, dtype="", stand_in=(), parts=()) if form is not None else None


def _state_row(row: AuditRow, name: str, dynamics: StateForm | None, members: list[Member]) -> tuple[AuditRow, str]:
    dtype = getattr(torch, row.dtype, None)
    form = formats.of(dtype) if isinstance(dtype, torch.dtype) else None
    is_full = row.dtype in ("int", "float", "int64", "float64") or (form is not None and form.precision >= FULL)
    cure_bytes = round(row.bytes * (32 / form.dtype.itemsize / 8 - 1)) if form is not None else None
    repair: dict[str, Any] = {"cure": "FP32 state", "cure_bytes": cure_bytes, "names": tuple(m.name for m in members)}
    if dynamics is not None and dynamics.is_counter:
        if is_full or form is None:
            return dataclasses.replace(row, expected="counts every step"), ""
        top = 2**form.precision
        row = dataclasses.replace(row, expected=f"stops at {top}", health=Health.stalled, **repair)
        return row, f"The step counter '{name}' is kept in {short(row.dtype)} and stops at {top}: keep it in FP32."
    if dynamics is not None and dynamics.is_sum:
        if is_full or form is None:
            return dataclasses.replace(row, expected="a sum of terms"), ""
        few, many = 2**form.precision, 2 ** (form.precision + 1)
        row = dataclasses.replace(row, expected=f"a sum: stops growing after {few} to {many} equal terms",
                                  health=Health.stalling, **repair)  # fmt: skip
        return row, (
            f"Optimizer state {name} in {short(row.dtype)} adds up terms and never decays: it stops growing after"
            f" {few} to {many} equal ones. Keep the optimizer state in FP32 (+{size(cure_bytes or 0)})."
        )
    if dynamics is None or dynamics.decay is None or form is None:
        if is_full:
            return dataclasses.replace(row, expected=f"{short(row.dtype)} resolves its changes"), ""
        return dataclasses.replace(row, health=Health.unknown, expected="how it changes is not known"), ""
    rate = 1 - dynamics.decay
    if rate < 1e-7:  # below what FP32 tells from 1
        return dataclasses.replace(row, expected="does not decay; it is overwritten, not added to"), ""
    w = _significands(form)
    lost = float(lost_shares(form, w, -rate * w, [len(w)]))
    # any significand that cannot decay is where decaying values get caught
    health = max(health_of(lost), Health.stalling if lost else Health.healthy, key=SEVERITY[::-1].index)
    row = dataclasses.replace(row, rate=rate, lost=lost, health=health)
    at = f"1 - beta = {number(rate)}"
    if health is Health.healthy:
        return dataclasses.replace(row, expected=f"decays ({at})"), ""
    few = "none of its values" if lost > 0.999 else f"only {percent(1 - lost)} of its values"
    row = dataclasses.replace(row, expected=f"{few} can decay ({at}), so it only grows" if lost > 0.999 else
                              f"{few} can decay ({at})", **repair)  # fmt: skip
    return row, (
        f"Optimizer state {name} in {short(row.dtype)}: {few} can decay at {at}, while growth passes. Keep the"
        f" optimizer state in FP32 (+{size(cure_bytes or 0)}), or use a beta of at most"
        f" {1 - 2.0**-form.precision:.4g}."
    )


def _significands(form: Format) -> Tensor:
    """One stored number per significand; an even choice of them for formats with many."""
    count = 2 ** min(form.mantissa_bits, 12)
    return form.round(1 + torch.arange(count, dtype=torch.float32) / count)


# --- gradients and averages -----------------------------------------------------------


def gradient_rows(members: list[Member]) -> Rows:
    """The buffer `.grad`, into which backward passes add."""

    def kept_in(member: Member) -> torch.dtype:
        asked = getattr(member.param, "grad_dtype", None)
        return asked if isinstance(asked, torch.dtype) else member.param.dtype

    rows: Rows = []
    trained = [m for m in members if m.param.requires_grad]
    for dtype, part in grouped(trained, kept_in).items():
        form = formats.of(dtype)
        expected = "sums micro-batches"
        if form is not None and form.precision < FULL:
            expected = (
                f"fine with one backward per step; of {2**form.precision} equal micro-batches and more, some are lost"
            )
        held = sum(local(m.param).numel() for m in part) * dtype.itemsize
        rows.append((AuditRow("gradients", str(dtype).removeprefix("torch."), len(part), held, expected), ""))
    return rows


def average_rows(averages: Mapping[str, tuple[Any, list[tuple[str, Tensor]]]]) -> Rows:
    """Averaged models: an average moves towards the weight by (1 - decay) of the gap between them."""
    rows: Rows = []
    for label, (average, pairs) in averages.items():
        tensors = {id(t): t for _, t in pairs if t.is_floating_point()}
        rate = average_rate(average)
        for dtype, part in grouped(tensors.values(), lambda t: t.dtype).items():
            held = sum(stored_bytes(local(t)) for t in part)
            row = AuditRow(f"average {label}", str(dtype).removeprefix("torch."), len(part), held, "", rate=rate)
            rows.append(_average_row(row, label, formats.of(dtype), sum(local(t).numel() for t in part)))
    return rows


def _average_row(row: AuditRow, label: str, form: Format | None, elements: int) -> tuple[AuditRow, str]:
    if form is None or form.precision >= FULL:
        return dataclasses.replace(row, expected="follows the weights"), ""
    cure_bytes, rate = 4 * elements - row.bytes, row.rate
    if rate is None:
        expected = f"moves where weight and average differ by 2^-{form.precision} / (1 - decay); its decay is not known"
        return dataclasses.replace(row, health=Health.unknown, expected=expected), ""
    gap = 2.0 ** -(form.precision + 1) / rate
    health = Health.stalled if gap >= 1 else Health.stalling if gap >= 0.05 else Health.healthy
    span = f"{percent(gap)} to {percent(2 * gap)}"
    row = dataclasses.replace(row, health=health, expected=f"moves only where weight and average differ by {span}")
    if health is Health.healthy:
        return row, ""
    row = dataclasses.replace(row, cure="FP32 average", cure_bytes=cure_bytes)
    return row, (
        f"The average '{label}' in {short(row.dtype)} (1 - decay = {number(rate)}) moves only where it differs from"
        f" the weight by {span} of its value. Keep the averaged model in FP32 (+{size(cure_bytes)})."
    )


def average_rate(average: Any) -> float | None:
    """1 - decay of an averaged model, tried out where it brings its function; None where it is not known."""
    if isinstance(average, torch.optim.swa_utils.AveragedModel):
        rates = [_tried_rate(average, count) for count in (1000, 2000)]
        return rates[0] if math.isclose(rates[0], rates[1], rel_tol=1e-6) else None
    for name in ("decay", "beta"):  # timm, diffusers; ema-pytorch
        value = getattr(average, name, None)
        if isinstance(value, float) and 0 < value < 1:
            return 1 - value
    return None


def _tried_rate(average: Any, count: int) -> float:
    held, live = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    if average.multi_avg_fn is not None:
        average.multi_avg_fn([held], [live], torch.tensor(count))
        return 1 - float(held)
    if average.avg_fn is not None:
        return 1 - float(average.avg_fn(held, live, torch.tensor(count)))
    return 1 / (count + 1)
