"""What the first screen says of a run in words and numbers: plain values for the template, which escapes every text."""

from __future__ import annotations

import bisect
import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from update_watch.cures import TITLES, TRAINERS, code
from update_watch.cures import Cure as Change
from update_watch.dashboards.frame import NO_CODE, Frame
from update_watch.dashboards.offers import HALVES, Offer, offers_of
from update_watch.dashboards.report.charts.rates import critical_rates
from update_watch.dashboards.report.history import History, accumulator_names, is_unwell, margin
from update_watch.dashboards.verdict import UNWELL, Verdict, lr_words, share_words, verdict_of
from update_watch.naming import shared_prefix
from update_watch.report import Health
from update_watch.wording import short, size

_SHORT_TITLES = {
    Change.masters: "FP32 masters",
    Change.stochastic_rounding: "stochastic rounding",
    Change.kahan: "Kahan summation",
    Change.fused_decay: "fused decay",
    Change.fp32_states: "FP32 states",
    Change.fp32_average: "FP32 average",
}
_MARKS = {Health.broken: "broken", Health.stalled: "stalled", Health.stalling: "part is lost"}
_FIRST_TRAINERS = ("transformers", "lightning", "torch")  # where the journal does not know which it is
_PARTS = {
    "exp_avg": "first moment",
    "exp_avg_sq": "second moment",
    "momentum_buffer": "momentum",
    "grad": "gradient sum",
}


_OF_UNKNOWN = {  # what is in the reason -> what can be done about it, as docs/unknown.md says it
    "random numbers": "Draw outside of the optimizer's step, as noise on the gradients: what a step draws itself cannot be known from"
    " another draw. Rules that only round at random are measured",
    "windows are pooled": "Train on: windows are pooled until it is known. samples=1024 makes it sooner",
    "steps a verdict needs": "Train on, or take a shorter window",
    "hides its stored values": "Nothing, where these are quantised weights: watch what is trained beside them (adapters)",
    "other tensors than the model's": "Make the optimizer after the model is wrapped, moved or converted",
    "longer window would": "Take a longer window: net progress over it decides",
    "": "docs/unknown.md says for each reason what can be done",
}


class Option(NamedTuple):
    """One cure."""

    key: str
    title: str
    meaning: str  # the same in a clause
    cost: str  # "+16 GB"


@dataclasses.dataclass(frozen=True)
class Cure:
    """What to change: code by cure and trainer, or one sentence where it is no matter of code."""

    sentence: str
    options: tuple[Option, ...] = ()
    trainers: tuple[tuple[str, str], ...] = ()  # (key, title), the run's own first
    codes: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)  # cure -> trainer -> code


@dataclasses.dataclass(frozen=True)
class FirstScreen:
    name: str
    facts: tuple[str, ...]  # the run in a line
    verdict: Verdict
    is_calm: bool  # nothing is stalled: nothing is unfolded
    cure: Cure | None
    arrived: str  # "6%"
    was: str  # "94%" at its best, where that says more
    margin: str  # of a healthy run: how far the learning rate may fall
    outlook: str  # what is to come
    held: str  # of a schedule that has ended: what had been forecast of it, and what came
    also: tuple[str, ...]  # what is not well beside the weights
    marks: tuple[tuple[int, str], ...]  # (step, what began there), for the chart over time
    rates: Mapping[str, float]  # learning rates by name: now, peak, end


def first_screen(history: History) -> FirstScreen:
    """Everything the first screen says about a run."""
    frame = history.last
    rates = history.of_run("lr")
    ends = [end for _, end in history.spans]

    def lr_at(step: int) -> float:
        return float(rates[min(bisect.bisect_right(ends, step), len(ends) - 1)])

    verdict = verdict_of(frame, lr_at, history.first_step)
    known = history.of_run("efficiency")
    best = float(np.nanmax(known)) if not np.isnan(known).all() else math.nan
    now = frame.run.efficiency
    begun: dict[str, int] = {}
    for group in verdict.groups:
        if group.health in UNWELL and group.since is not None:
            mark = _MARKS[group.health]
            begun[mark] = min(group.since, begun.get(mark, group.since))
    is_calm = verdict.health not in UNWELL
    return FirstScreen(
        name=history.name,
        facts=run_facts(history),
        verdict=verdict,
        is_calm=is_calm,
        cure=_cure(frame, verdict, history.run),
        arrived="" if math.isnan(now) else share_words(max(0.0, now)),
        was=share_words(best) if best - now > 0.05 else "",
        margin=_margin(frame) if verdict.health is Health.healthy else "",
        outlook=_outlook(history),
        held=_held(history),
        also=_also(frame),
        marks=tuple((step, mark) for mark, step in begun.items() if step > history.first_step + 1),
        rates={} if verdict.health is Health.broken else _rates(history),
    )


def _outlook(history: History) -> str:
    """Whether it is about to blow up, and what the rest of its schedule will do."""
    outlook, divergence = history.last.outlook, history.last.divergence
    coming = [outlook.headline] if outlook is not None and outlook.until > history.last_step else []
    return " ".join([divergence.headline, *coming] if divergence is not None and divergence.is_warning else coming)


def _held(history: History) -> str:
    """What was forecast early in the run, and what came, where its schedule has ended."""
    early, now = history.foretold, history.last.run.efficiency
    if (
        early is None
        or not early.course
        or math.isnan(now)
        or not (early.made_at or math.inf) < early.until <= history.last_step
    ):
        return ""
    said = early.headline.rstrip(".").partition("; ")[0]
    forecast = share_words(early.course[-1][1])
    return (
        f"Forecast at step {early.made_at:,}: {said[:1].lower()}{said[1:]}. At the end {share_words(now)} of each update arrived;"
        f" {forecast} was forecast."
    )


# --- the run in a line -----------------------------------------------------------------------------------


def run_facts(history: History) -> tuple[str, ...]:
    frame, run = history.last, history.run
    numel = sum(frame.table.numel)
    count = len(frame.table.name)
    tensors = "1 tensor" if count == 1 else f"{count:,} tensors"
    facts = [f"{tensors}, {parameters(numel)} parameters"]
    if run.get("optimizer"):
        facts.append(str(run["optimizer"]))
    facts.append(formats(frame))
    steps = history.last_step - history.first_step
    facts.append(f"step {history.last_step:,}" if steps != history.last_step else f"{steps:,} steps")
    length = _duration(history)
    if length:
        facts.append(length)
    now = frame.run.lr
    if not math.isnan(now):
        facts.append(f"learning rate now {lr_words(now)}" if now else "learning rate now 0")
    closed = _time(frame.time)
    if closed:
        facts.append(f"last window {closed}")
    return tuple(facts)


def parameters(count: int) -> str:
    """8,030,261,248 -> "8.0B"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}" if count < 100 * unit else f"{count / unit:.0f}{name}"
    return f"{count:,}"


def formats(frame: Frame) -> str:
    """ "BF16 weights, no FP32 copy": what the weights are kept in, and whether something keeps what rounding takes."""
    dtypes, sizes = frame.table.dtype, np.array(frame.table.numel, dtype=np.float64)
    found = list(dict.fromkeys(dtypes))
    place = {dtype: i for i, dtype in enumerate(found)}
    numel = np.bincount(np.fromiter(map(place.__getitem__, dtypes), dtype=np.intp, count=len(dtypes)), weights=sizes)
    kinds = sorted(filter(None, found), key=lambda dtype: -numel[place[dtype]])
    if not kinds:
        return "format not known"
    text = " and ".join(short(kind) for kind in kinds[:3]) + " weights"
    schemes = {scheme for scheme, dtype in set(zip(frame.table.scheme, dtypes, strict=True)) if dtype in HALVES}
    if schemes == {"plain"}:
        return f"{text}, no FP32 copy"
    if any(s.startswith("carried") for s in schemes):
        return f"{text}, remainder kept"
    return f"{text}, stochastic rounding" if "stochastic" in schemes else text


def _duration(history: History) -> str:
    times = [time for time in history.times if time > 0]
    if len(times) < 2:
        return ""
    first, last = history.spans[0], history.spans[-1]
    done = last[1] - first[1]
    seconds = (times[-1] - times[0]) * ((last[1] - first[0]) / done if done > 0 else 1)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _time(seconds: float) -> str:
    if seconds <= 0:
        return ""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return ""


# --- the cure --------------------------------------------------------------------------------------------


def _cure(frame: Frame, verdict: Verdict, run: Mapping[str, Any]) -> Cure | None:
    group = verdict.groups[0] if verdict.groups else None
    if verdict.health in (Health.healthy, Health.frozen):
        return None
    if group is None:
        return _cure_of_parts(frame)
    offers = offers_of(frame, verdict)
    if group.health is Health.unknown:
        return Cure(next((cure for part, cure in _OF_UNKNOWN.items() if part in group.advice), _OF_UNKNOWN[""]))
    if not offers:
        _, _, cure = group.advice.partition("; ")
        return Cure(_capital(cure or group.advice).rstrip(".")) if group.advice else None
    return _coded(offers, str(run.get("trainer", "")), str(run.get("optimizer", "")))


def _cure_of_parts(frame: Frame) -> Cure | None:
    """Where only what lies beside the weights is not well."""
    for name in accumulator_names(frame):
        columns = frame.accumulators[name]
        bad = np.flatnonzero((columns.health != NO_CODE) & is_unwell(columns.health))
        if len(bad):
            text = columns.advice.get(int(bad[0]), "")
            return Cure(_capital(text.partition("; ")[2] or text).rstrip(".")) if text else None
    return None


def _coded(offers: Sequence[Offer], trainer: str, rule: str) -> Cure:
    first = [trainer] if trainer in TRAINERS else []
    order = list(dict.fromkeys([*first, *_FIRST_TRAINERS, *TRAINERS]))
    cures = [offer.cure for offer in offers]
    codes = {cure.value: {key: text for key in order if (text := code(cure, key, rule))} for cure in cures}
    options = tuple(Option(c.value, _SHORT_TITLES[c], _capital(TITLES[c]), f"+{size(cost)}") for c, cost in offers)
    return Cure("", options, tuple((key, TRAINERS[key]) for key in order), codes)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- numbers -----------------------------------------------------------------------------------------------


def _margin(frame: Frame) -> str:
    found = margin(frame.tensors)
    if np.isnan(found).all():
        return ""
    worst = int(np.nanargmin(found))
    factor = float(found[worst])
    if factor <= 1:
        return ""
    name = frame.table.name[worst][len(shared_prefix(frame.table.name)) :]
    many = f"{factor:,.0f}x" if factor >= 10 else f"{factor:.1f}x"
    return f"Room: the learning rate may fall {many} before the first tensor loses half of its updates ({name})."


def _rates(history: History) -> dict[str, float]:
    rates = history.of_run("lr")
    known = rates[~np.isnan(rates) & (rates > 0)]
    if not len(known) or not critical_rates(history):
        return {}
    found = {"now": float(history.last.run.lr)}
    if known.max() > 1.4 * found["now"]:
        found["peak"] = float(known.max())
    end = history.run.get("lr_end")
    if isinstance(end, (int, float)) and not isinstance(end, bool) and 0 < end < 0.7 * found["now"]:
        found["end of schedule"] = float(end)
    return {name: rate for name, rate in found.items() if rate > 0}


def _also(frame: Frame) -> tuple[str, ...]:
    found = []
    for name in accumulator_names(frame):
        columns = frame.accumulators[name]
        present = columns.health != NO_CODE
        bad = int((is_unwell(columns.health) & present).sum())
        if bad:
            many = f"all {bad:,}" if bad == int(present.sum()) and bad > 1 else f"{bad:,} of {int(present.sum()):,}"
            found.append(f"{part_words(name)} {'is lost' if name == 'weight_decay' else 'is rounded'} in {many}")
    return tuple(found)


def part_words(name: str) -> str:
    """Of what is kept beside a weight: "exp_avg_sq" -> "second moment"."""
    if name.startswith("average:"):
        return f"average {name.removeprefix('average:')}"
    return _PARTS.get(name, name.replace("_", " "))
