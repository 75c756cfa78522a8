"""From tensors to layers, to the health of the run, and to its one headline."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from update_watch.judge.accumulators import alert_level
from update_watch.judge.advice import Seen, advise, brief
from update_watch.judge.efficiency_grade import known
from update_watch.judge.reasons import why
from update_watch.report import SEVERITY, AccumulatorReport, Cause, Health, LayerReport, TensorReport, weighted_mean
from update_watch.wording import fixed, plural

_BAD = (Health.broken, Health.stalled, Health.stalling)
_RANK = {health: i for i, health in enumerate(SEVERITY)}


def by_layer(tensors: Sequence[TensorReport]) -> tuple[LayerReport, ...]:
    """One `LayerReport` per module path, in order of appearance."""
    layers: dict[str, list[TensorReport]] = {}
    for tensor in tensors:
        layers.setdefault(tensor.layer, []).append(tensor)
    return tuple(_layer(name, members) for name, members in layers.items())


def run_health(tensors: Sequence[TensorReport]) -> Health:
    """The worst of broken, stalled and stalling; `healthy` only when next to nobody is worse or unknown.

    What is frozen or idle does not make a run frozen or idle while something else trains. An accumulator somebody
    is alerted about makes a run stalling.
    """
    counts = Counter(tensor.health for tensor in tensors)
    for health in _BAD:
        if counts[health]:
            return health
    if any(alert_level(a) is not None for t in tensors for a in t.accumulators.values()):
        return Health.stalling
    if counts[Health.healthy] and counts[Health.healthy] >= counts[Health.unknown]:
        return Health.healthy
    return min(counts, key=_RANK.__getitem__, default=Health.unknown)


def worst_first(tensors: Iterable[TensorReport]) -> list[TensorReport]:
    """By severity, then by efficiency, then larger tensors first, then in order of the report."""
    return sorted(tensors, key=lambda t: (_RANK[t.health], 1.0 if t.efficiency is None else t.efficiency, -t.numel))


def headline(tensors: Sequence[TensorReport]) -> str:
    """One sentence: what is wrong with how many tensors since when, and the cure; or that all is well."""
    if not tensors:
        return "No tensors are watched."
    groups: dict[tuple[Health, Cause | None], list[TensorReport]] = {}
    for tensor in tensors:
        if tensor.health in _BAD:
            groups.setdefault((tensor.health, tensor.cause), []).append(tensor)
    findings = _accumulator_findings(tensors)
    if not groups and not findings:
        return _calm(tensors)
    ordered = sorted(groups.items(), key=lambda item: (_RANK[item[0][0]], -len(item[1])))
    also = [f"{len(members)} {health} ({cause})" for (health, cause), members in ordered[1:]]
    if ordered:
        (health, cause), members = ordered[0]
        text = _group(health, cause, members, tensors)
    else:
        text, findings = findings[0][1], findings[1:]
    also += [brief for brief, _ in findings]
    return f"{text}; also {', '.join(also)}." if also else f"{text}."


def _group(health: Health, cause: Cause | None, members: list[TensorReport], tensors: Sequence[TensorReport]) -> str:
    count = f"{len(members)} of {plural(len(tensors), 'tensor')} {'is' if len(members) == 1 else 'are'} {health}"
    since = [t.since_step for t in members if t.since_step is not None]
    when = f" since step {min(since)}" if since else ""
    if since and max(since) > min(since):  # they did not begin together
        when = f" since steps {min(since)} to {max(since)}"
    trait = _trait(members, tensors)
    if cause is None:
        return f"{count}{when}{trait}"
    if len(members) == 1 or cause is Cause.state_rounding:
        return f"{count}{when}{trait}: {brief(worst_first(members)[0].advice)}"
    advice = advise(cause, _mean_seen(members))
    return f"{count}{when}{trait}: {advice.finding}" + (f"; {advice.cure}" if advice.cure else "")


def _mean_seen(members: list[TensorReport]) -> Seen:
    dtypes = {t.dtype for t in members}
    efficiency = weighted_mean((t.efficiency, t.numel) for t in members)
    return Seen(
        dtype=dtypes.pop() if len(dtypes) == 1 else "",
        efficiency=efficiency,
        lost=weighted_mean((t.lost_fraction, t.numel) for t in members),
    )


def _accumulator_findings(tensors: Sequence[TensorReport]) -> list[tuple[str, str]]:
    """(in a word, in a sentence) per kind of accumulator that is not well, loudest and most frequent first."""
    groups: dict[tuple[str, Health, Cause | None], list[tuple[TensorReport, AccumulatorReport]]] = {}
    for tensor in tensors:
        if tensor.health in _BAD:
            continue
        for accumulator in tensor.accumulators.values():
            if alert_level(accumulator) is not None:
                key = (accumulator.name, accumulator.health, accumulator.cause)
                groups.setdefault(key, []).append((tensor, accumulator))
    found = []
    for (name, health, _), members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0][0])):
        where = f"{name} is {health} in {len(members)} of {plural(len(tensors), 'tensor')}"
        found.append((f"{name} of {len(members)} {health}", f"{where}: {brief(members[0][1].advice)}"))
    return found


def _calm(tensors: Sequence[TensorReport]) -> str:
    counts = Counter(t.health for t in tensors)
    efficiency = weighted_mean((t.efficiency, t.numel) for t in tensors if t.health is Health.healthy)
    known = f" (efficiency {fixed(efficiency)})" if efficiency is not None else ""
    healthy = counts.pop(Health.healthy, 0)
    if not counts:
        return f"All {healthy} tensors are healthy{known}." if healthy > 1 else f"The one tensor is healthy{known}."
    text = f"{healthy} of {plural(len(tensors), 'tensor')} healthy{known}"
    rest = [f"{counts[health]} {health}" for health in SEVERITY if counts[health]]
    return f"{text}, {', '.join(rest)}{_why_unknown(tensors)}."


def _why_unknown(tensors: Sequence[TensorReport]) -> str:
    reasons = Counter(t.advice for t in tensors if t.health is Health.unknown and t.advice)
    if not reasons:
        return ""
    text, count = reasons.most_common(1)[0]
    share = "" if len(reasons) == 1 else f": {count} of these"
    return f" ({why(text)}{share})"


def _trait(members: list[TensorReport], tensors: Sequence[TensorReport]) -> str:
    """What the names of several tensors have in common and those of the others have not."""
    if len(members) < 2 or len(members) == len(tensors):
        return ""
    inside = {id(t) for t in members}
    shared = _words(members[0].name)
    for tensor in tensors:
        words = _words(tensor.name)
        shared = shared & words if id(tensor) in inside else shared - words
        if not shared:
            return ""
    return f", all those with '{max(shared, key=lambda word: (len(word), word))}' in their name"


def _words(name: str) -> set[str]:
    return {word for word in re.split(r"[^A-Za-z]+", name.lower()) if len(word) > 1}


def _layer(name: str, members: list[TensorReport]) -> LayerReport:
    if len(members) == 1:
        (only,) = members
        return LayerReport(name, only.health, (only.name,), known(only.efficiency))
    worst = min((t.health for t in members), key=_RANK.__getitem__)
    names = tuple(t.name for t in members if t.health is worst)
    return LayerReport(name, worst, names, weighted_mean((t.efficiency, t.numel) for t in members))
