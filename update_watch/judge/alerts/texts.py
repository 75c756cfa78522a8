"""What an alert says: who, since when, what was seen, what to change and what that costs; then the tensors, as a list.

Everything before the list has room on a phone: under 600 characters.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from update_watch.judge.advice import advise, finding
from update_watch.judge.alerts.episodes import GREW, OVER, WORSE
from update_watch.judge.alerts.findings import (
    AHEAD,
    DIVERGES,
    NOT_MEASURED,
    NOTHING_TRAINS,
    OUT_OF_RANGE,
    OWN,
    WAS_ROUNDED,
    Members,
)
from update_watch.judge.columns.codes import BROKEN, HEALTHS, HEALTHY, STALLED, UNKNOWN, Rows, cause_of
from update_watch.judge.columns.judged import Judged
from update_watch.judge.headline import mean_seen, nothing_trains, unmeasured_sentence
from update_watch.judge.remedies import ahead, remedy
from update_watch.judge.run_summary import is_measurable
from update_watch.report import Alert, Cause, Level, Report
from update_watch.thresholds import Thresholds
from update_watch.wording import fixed, percent, plural

_REST = re.compile(r"and \d+ more")
_TITLE, _HEAD = 63, 590  # characters
_OVER = {
    AHEAD: "What moves now will go on moving at this schedule.",
    DIVERGES: "The weights have stopped growing faster than the steps.",
}
_HOLD = "lower the learning rate, or end its climb, now or from a checkpoint of before; weight decay and clipped gradients hold too"
# of a sign: the title, and where to look
_RANGES = {
    "updates": (
        "updates outgrow their learning rate",
        "look for gradients that grow, weights that shrink, a batch or a clipping that changed",
    ),
    "gradients": ("gradients grow", "clip them by their norm, and look at what the latest batches hold"),
    "state": ("optimizer state drifts", "keep the optimizer's states in FP32, or take a smaller beta2"),
    "fp16_range": (
        "near the top of FP16",
        "lower the scale of the loss, as a GradScaler does by itself, clip gradients, or train in BF16",
    ),
    "skipped": (
        "more and more steps are skipped",
        "look for what overflows in FP16 (logits, scores of attention, the loss) and compute it in FP32, or train in BF16",
    ),
}
_HAS_GROUP_ADVICE = frozenset({Cause.weight_rounding, Cause.decay_rounding, Cause.average_rounding})


def alert_of(
    event: str,
    episode: str,
    level: Level,
    members: Members | None,
    report: Report,
    judged: Judged,
    told: int,
    limits: Thresholds,
    trainer: str,
) -> Alert:
    """The alert for an event of an episode. `told`: how many members it had when it was told last."""
    if event == OVER or members is None:
        well = f"{_sentence(plural(told, 'tensor'))} that had it {'is' if told == 1 else 'are'} well again."
        return Alert(
            step=report.step,
            level=Level.info,
            title=_fit(f"Over: {_name(episode)}"),
            text=_OVER.get(episode, well),
            tensors=(),
            cause=_cause(episode),
        )
    mine = _different(members.places)
    names = judged.names
    chosen = [names[place] for place in mine.tolist()]
    if episode == NOTHING_TRAINS:
        title, head = "NOTHING TRAINS", nothing_trains(judged, report.step)
    elif episode == NOT_MEASURED:
        of = int(is_measurable(judged).sum())
        title, head = f"NOT MEASURED: {len(chosen)} of {plural(of, 'tensor')}", unmeasured_sentence(judged)
    elif episode == WAS_ROUNDED:
        title = f"WAS ROUNDED: {plural(len(chosen), 'FP32 tensor')}"
        said = members.advice(judged)
        head = f"{_who(mine, judged)}: {said[:1].lower()}{said[1:]}"
    elif episode == AHEAD and report.forecast is not None:
        title = f"AHEAD: {len(chosen)} of {plural(len(judged), 'tensor')} will stall"
        head = f"{members.advice(judged)}\nFix: {ahead(report.forecast, mine, judged, trainer)}."
    elif episode == DIVERGES:
        title, head, chosen = "DIVERGES: the weights run away", f"{members.advice(judged)}\nFix: {_HOLD}.", []
    elif episode.startswith(OUT_OF_RANGE):
        words, look = _RANGES[episode.removeprefix(OUT_OF_RANGE)]
        said = members.advice(judged)
        title, head, chosen = f"OUT OF RANGE: {words}", f"{said[:1].upper()}{said[1:]}.\nFix: {look}.", []
    else:
        title, head = _title(event, members, judged, told), _head(members, mine, judged, trainer)
    lines = [head if len(head) <= _HEAD else head[: _HEAD - 1] + "…"]
    if len(members) > 1 and episode not in (NOTHING_TRAINS, NOT_MEASURED, AHEAD, WAS_ROUNDED):
        lines += [f"- {_line(members, i, judged)}" for i in range(min(len(members), limits.alert_tensors))]
        if len(members) > limits.alert_tensors:
            lines.append(f"and {len(members) - limits.alert_tensors} more")
    return Alert(report.step, level, _fit(title), "\n".join(lines), tuple(chosen), cause_of(members.cause[0]))


def with_decay(alert: Alert, decaying: int) -> Alert:
    """The alert on lost updates, with a word on the weight decay that is lost in so many other tensors."""
    head, *rest = alert.text.split("\n- ", 1)
    words = f"{head}\nWeight decay is lost in {plural(decaying, 'other tensor')} as well."
    return dataclasses.replace(alert, text="\n- ".join([words, *rest]))


def head_of(text: str) -> str:
    """The text of an alert without its list of tensors: what a log or a terminal has room for."""
    lines = text.split("\n")
    return "\n".join(line for line in lines if not line.startswith("- ") and not _REST.fullmatch(line))


def _different(places: Rows) -> Rows:
    """Each once, in their order."""
    _, first = np.unique(places, return_index=True)
    found: Rows = places[np.sort(first)]
    return found


def _title(event: str, members: Members, judged: Judged, told: int) -> str:
    worst = next((code for code in (BROKEN, STALLED) if (members.health == code).any()), int(members.health[0]))
    word = "STILL MOVING" if worst in (HEALTHY, UNKNOWN) else str(HEALTHS[worst]).upper()
    parts = {int(part) for part in np.unique(members.parts)}
    _, first = np.unique(members.places, return_index=True)
    healths = members.health[first]  # the worst of each, as that is the first
    count = int((healths == worst).sum())
    what = f"{count} of {plural(len(judged), 'tensor')}"
    if OWN not in parts:
        what = f"{judged.parts[parts.pop()].name if len(parts) == 1 else 'what accumulates'} of {what}"
    others = {int(code) for code in healths[healths != worst]}
    if others:
        kind = str(HEALTHS[others.pop()]) if len(others) == 1 else "unwell"
        what = f"{what}, {len(healths) - count} more {kind}"
    grown = f", was {told}" if event == GREW or (event == WORSE and told != len(healths)) else ""
    return f"{word}: {what}{grown}"


def _head(members: Members, mine: Rows, judged: Judged, trainer: str) -> str:
    """Who since when and what was seen; what to change."""
    cause, advice = cause_of(members.cause[0]), members.advice(judged)
    if len(members) > 1 and cause in _HAS_GROUP_ADVICE and (members.parts == OWN).all():
        seen = advise(cause, mean_seen(judged, mine)).finding + "."
    else:
        seen = finding(advice)
    part = "" if members.parts[0] == OWN else judged.parts[members.parts[0]].name
    fix = remedy(cause, mine, judged, trainer, advice, part)
    is_worst = (members.parts == OWN) & np.isin(members.health, (BROKEN, STALLED))
    text = f"{_who(mine, judged, members.places[is_worst])}: "
    text += f"{seen[:1].lower() if seen.split(maxsplit=1)[0][1:].islower() else seen[:1]}{seen[1:]}"
    return f"{text}\nFix: {fix}." if fix else text


def _who(mine: Rows, judged: Judged, worst: Rows | tuple[()] = ()) -> str:
    """ "All 5 norms since step 50, head.weight since step 551": by when it began, the oldest first; those of `worst` by name."""

    def words(places: Rows) -> str:
        first = places[np.isin(places, worst)]
        found = judged.words(places)
        if len(found) > 1 and 0 < len(first) < len(places):
            found = [*judged.words(first), f"{len(places) - len(first)} more"]
        return ", ".join(found)

    begins = np.where(judged.health[mine] == HEALTHY, np.nan, judged.since[mine])
    since = np.unique(begins)  # NaN, once, is the last
    known = since[~np.isnan(since)].astype(int).tolist()
    if len(since) > 2:
        return _sentence(f"{words(mine)} since steps {known[0]} to {known[-1]}")
    parts = [words(mine[np.isnan(begins)])] if len(known) < len(since) else []
    parts += [f"{words(mine[begins == step])} since step {step}" for step in known]
    return _sentence(", ".join(parts))


def _line(members: Members, i: int, judged: Judged) -> str:
    """One tensor of the list, numbers only."""
    t, k, cause = judged.tensor(int(members.places[i])), int(members.parts[i]), cause_of(members.cause[i])
    numbers: list[str] = []
    key = t.name if k == OWN else f"{t.name} [{judged.parts[k].name}]"
    if k != OWN:
        accumulator = t.accumulators.get(judged.parts[k].name)
        if accumulator is not None and accumulator.efficiency is not None:
            numbers.append(f"efficiency {fixed(accumulator.efficiency)}")
    else:
        if t.efficiency is not None:
            numbers.append(f"efficiency {fixed(t.efficiency)}")
        if t.lost_fraction is not None:
            numbers.append(f"{percent(t.lost_fraction)} lost")
        if cause is Cause.state_rounding and t.state_factor is not None:
            numbers = [f"updates {fixed(t.state_factor)} of what FP32 state gives"]
    return f"{key}: {HEALTHS[members.health[i]]}" + (f", {', '.join(numbers)}" if numbers else "")


def _cause(episode: str) -> Cause | None:
    try:
        return Cause(episode.split(" ")[0])
    except ValueError:
        return None


def _name(episode: str) -> str:
    return episode.replace("_", " ").replace(" average:", " of ")


def _sentence(text: str) -> str:
    """With a capital where it begins with a word, not with the name of a tensor."""
    return f"{text[:1].upper()}{text[1:]}" if text.startswith(("all ", "both ")) else text


def _fit(text: str) -> str:
    return text if len(text) <= _TITLE else f"{text[: _TITLE - 3]}..."
