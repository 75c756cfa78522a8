"""What an alert says: who, since when, what was seen, what to change and what that costs; then the tensors, as a list.

Everything before the list has room on a phone: under 600 characters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence

from update_watch.judge.advice import advise, finding
from update_watch.judge.alerts.episodes import GREW, OVER, WORSE
from update_watch.judge.alerts.findings import (
    AHEAD,
    DIVERGES,
    NOT_MEASURED,
    NOTHING_TRAINS,
    OUT_OF_RANGE,
    WAS_ROUNDED,
    Finding,
)
from update_watch.judge.headline import mean_seen, nothing_trains, unmeasured_sentence
from update_watch.judge.remedies import ahead, remedy
from update_watch.judge.run_summary import is_measurable
from update_watch.naming import group_words
from update_watch.report import Alert, Cause, Health, Level, Report, TensorReport
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
    members: Sequence[Finding],
    report: Report,
    told: int,
    limits: Thresholds,
    trainer: str,
) -> Alert:
    """The alert for an event of an episode. `told`: how many members it had when it was told last."""
    tensors = report.tensors
    if event == OVER:
        well = f"{_sentence(plural(told, 'tensor'))} that had it {'is' if told == 1 else 'are'} well again."
        return Alert(
            step=report.step,
            level=Level.info,
            title=_fit(f"Over: {_name(episode)}"),
            text=_OVER.get(episode, well),
            tensors=(),
            cause=_cause(episode),
        )
    chosen = list(dict.fromkeys(f.tensor.name for f in members))
    if episode == NOTHING_TRAINS:
        title, head = "NOTHING TRAINS", nothing_trains(tensors, report.step)
    elif episode == NOT_MEASURED:
        of = sum(is_measurable(t) for t in tensors)
        title, head = f"NOT MEASURED: {len(chosen)} of {plural(of, 'tensor')}", unmeasured_sentence(tensors)
    elif episode == WAS_ROUNDED:
        title = f"WAS ROUNDED: {plural(len(chosen), 'FP32 tensor')}"
        said = members[0].advice
        head = f"{_who([f.tensor for f in members], tensors)}: {said[:1].lower()}{said[1:]}"
    elif episode == AHEAD and report.forecast is not None:
        title = f"AHEAD: {len(chosen)} of {plural(len(tensors), 'tensor')} will stall"
        head = f"{members[0].advice}\nFix: {ahead(report.forecast, [f.tensor for f in members], tensors, trainer)}."
    elif episode == DIVERGES:
        title, head, chosen = "DIVERGES: the weights run away", f"{members[0].advice}\nFix: {_HOLD}.", []
    elif episode.startswith(OUT_OF_RANGE):
        words, look = _RANGES[episode.removeprefix(OUT_OF_RANGE)]
        said = members[0].advice
        title, head, chosen = f"OUT OF RANGE: {words}", f"{said[:1].upper()}{said[1:]}.\nFix: {look}.", []
    else:
        title, head = _title(event, members, tensors, told), _head(members, tensors, trainer)
    lines = [head if len(head) <= _HEAD else head[: _HEAD - 1] + "…"]
    if len(members) > 1 and episode not in (NOTHING_TRAINS, NOT_MEASURED, AHEAD, WAS_ROUNDED):
        lines += [f"- {_line(f)}" for f in members[: limits.alert_tensors]]
        if len(members) > limits.alert_tensors:
            lines.append(f"and {len(members) - limits.alert_tensors} more")
    return Alert(report.step, level, _fit(title), "\n".join(lines), tuple(chosen), members[0].cause)


def with_decay(alert: Alert, decaying: Sequence[Finding]) -> Alert:
    """The alert on lost updates, with a word on the weight decay that is lost in other tensors."""
    head, *rest = alert.text.split("\n- ", 1)
    words = f"{head}\nWeight decay is lost in {plural(len(decaying), 'other tensor')} as well."
    return dataclasses.replace(alert, text="\n- ".join([words, *rest]))


def head_of(text: str) -> str:
    """The text of an alert without its list of tensors: what a log or a terminal has room for."""
    lines = text.split("\n")
    return "\n".join(line for line in lines if not line.startswith("- ") and not _REST.fullmatch(line))


def _title(event: str, members: Sequence[Finding], tensors: Sequence[TensorReport], told: int) -> str:
    worst = max(members, key=lambda f: (f.health is Health.broken, f.health is Health.stalled)).health
    word = "STILL MOVING" if worst is Health.healthy or worst is Health.unknown else str(worst).upper()
    parts = {f.part for f in members}
    healths = {f.tensor.name: f.health for f in reversed(members)}  # the worst of each, as that is the first
    count = list(healths.values()).count(worst)
    what = f"{count} of {plural(len(tensors), 'tensor')}"
    if "" not in parts:
        what = f"{parts.pop() if len(parts) == 1 else 'what accumulates'} of {what}"
    others = {health for health in healths.values() if health is not worst}
    if others:
        what = f"{what}, {len(healths) - count} more {others.pop() if len(others) == 1 else 'unwell'}"
    grown = f", was {told}" if event == GREW or (event == WORSE and told != len(healths)) else ""
    return f"{word}: {what}{grown}"


def _head(members: Sequence[Finding], tensors: Sequence[TensorReport], trainer: str) -> str:
    """Who since when and what was seen; what to change."""
    mine = list({f.tensor.name: f.tensor for f in members}.values())
    cause = members[0].cause
    if len(members) > 1 and cause in _HAS_GROUP_ADVICE and all(not f.part for f in members):
        seen = advise(cause, mean_seen(mine)).finding + "."
    else:
        seen = finding(members[0].advice)
    fix = remedy(cause, mine, tensors, trainer, members[0].advice, members[0].part)
    worst = {f.tensor.name for f in members if not f.part and f.health in (Health.broken, Health.stalled)}
    text = f"{_who(mine, tensors, worst)}: {seen[:1].lower() if seen[1:2].islower() else seen[:1]}{seen[1:]}"
    return f"{text}\nFix: {fix}." if fix else text


def _who(mine: Sequence[TensorReport], tensors: Sequence[TensorReport], worst: Collection[str] = ()) -> str:
    """ "All 5 norms since step 50, head.weight since step 551": by when it began, the oldest first; those of `worst` by name."""
    shapes = {t.name: t.shape for t in tensors}

    def words(names: Sequence[str]) -> str:
        first = [name for name in names if name in worst]
        found = group_words(names, shapes, 3)
        if len(found) > 1 and 0 < len(first) < len(names):
            found = [*group_words(first, shapes, 3), f"{len(names) - len(first)} more"]
        return ", ".join(found)

    since: dict[int | None, list[str]] = {}
    for tensor in mine:
        since.setdefault(tensor.since_step if tensor.health is not Health.healthy else None, []).append(tensor.name)
    if len(since) > 2:
        begins = [step for step in since if step is not None]
        return _sentence(f"{words([t.name for t in mine])} since steps {min(begins)} to {max(begins)}")
    parts = []
    for step, names in sorted(since.items(), key=lambda item: item[0] or 0):
        when = f" since step {step}" if step is not None else ""
        parts.append(words(names) + when)
    return _sentence(", ".join(parts))


def _line(found: Finding) -> str:
    """One tensor of the list, numbers only."""
    t = found.tensor
    numbers: list[str] = []
    if found.part:
        accumulator = t.accumulators.get(found.part)
        if accumulator is not None and accumulator.efficiency is not None:
            numbers.append(f"efficiency {fixed(accumulator.efficiency)}")
    else:
        if t.efficiency is not None:
            numbers.append(f"efficiency {fixed(t.efficiency)}")
        if t.lost_fraction is not None:
            numbers.append(f"{percent(t.lost_fraction)} lost")
        if found.cause is Cause.state_rounding and t.state_factor is not None:
            numbers = [f"updates {fixed(t.state_factor)} of what FP32 state gives"]
    return f"{found.key}: {found.health}" + (f", {', '.join(numbers)}" if numbers else "")


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
