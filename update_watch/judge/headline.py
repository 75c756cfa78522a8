"""The one sentence on the run: what is wrong with how much of it since when, and what to change; or that all is well.

It never says that all is well where something could not be measured, and a run in which nothing trains has its cause.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np

from update_watch.judge.advice import advise, brief
from update_watch.judge.columns.codes import HEALTH_CODES, HEALTHS, HEALTHY, IDLE, NONE, UNKNOWN, Rows, cause_of
from update_watch.judge.columns.judged import Judged, levels_of
from update_watch.judge.reasons import why
from update_watch.judge.remedies import remedy
from update_watch.judge.run_summary import (
    BAD,
    counts_of,
    is_bad,
    is_measurable,
    is_moving_unasked,
    is_training_nothing,
    is_unmeasured,
    most_common,
)
from update_watch.judge.seen import Seen
from update_watch.report import SEVERITY, Cause, Health
from update_watch.wording import cause_label, fixed, plural
from update_watch.worker import unhurried

_FEW_LOOKS = 16  # of so many steps less than one was looked at: that all is well says the less
_ASKED = 200  # unknown tensors, at most, whose reason is looked up: each is a sentence
_WELL, _SURE = 0.8, 0.1  # an efficiency that nobody wonders at, and a standard error
_PROBABLE = {  # why nothing at all trains: what was seen, what it most often is
    Cause.zero_gradient: (
        "every gradient is exactly 0",
        "look for a clipping norm of 0, a loss that is multiplied by 0, or a product of two zeros at the start",
    ),
    Cause.no_gradient: (
        "no gradient arrives",
        "look for a loss that is detached from the model, or an optimizer that holds other tensors than the model",
    ),
    Cause.negligible_gradient: ("every gradient is at the level of round-off", "look for what cancels the loss"),
    Cause.zero_learning_rate: ("the learning rate is 0", "check the schedule and its warm-up"),
    Cause.skipped_steps: (
        "every step is skipped, by a gradient scaler or a check of one's own, as gradients hold NaN or infinity",
        "look for NaN or overflow in the loss, clip the gradients, or use BF16, which needs no scaler",
    ),
    Cause.not_in_optimizer: (
        "no optimizer holds its tensors",
        "make the optimizer after the model was wrapped, moved or loaded",
    ),
}


def headline(
    judged: Judged, step: int = 0, trainer: str = "torch", looked: tuple[int, int] | None = None, resting: int = 0
) -> str:
    """One sentence on the run.

    `trainer`: in whose words cures are told; `looked`: at how many of how many steps; `resting`: tensors whose turn it was not.
    """
    if not len(judged):
        return "No tensors are watched."
    if is_training_nothing(judged):
        return nothing_trains(judged, step)
    groups = [
        (code, cause, np.flatnonzero((judged.health == code) & (judged.cause == cause)))
        for code in BAD
        for cause, _ in most_common(judged.cause[judged.health == code])
    ]
    findings = _accumulator_findings(judged)
    if not groups and not findings:
        return _calm(judged, looked, resting)
    also = [f"{len(members)} {HEALTHS[code]} ({cause_label(cause_of(cause))})" for code, cause, members in groups[1:]]
    if groups:
        text = _group(*groups[0], judged, trainer)
    else:
        text, findings = findings[0][1], findings[1:]
    also += [short for short, _ in findings]
    lacking = int(is_unmeasured(judged).sum())
    if lacking:
        also.append(f"{lacking} not measured")
    pending = counts_of(judged.health)[UNKNOWN] - lacking
    if pending:
        also.append(f"{pending} not known yet")
    if resting:
        also.append(f"{len(judged) - resting} looked at now")
    return f"{text}; also {', '.join(also)}." if also else f"{text}."


def nothing_trains(judged: Judged, step: int) -> str:
    """The sentence for a run in which everything that requires a gradient is at rest."""
    trained = judged.trainable
    total = int(trained.sum())
    code, count = most_common(judged.cause[trained])[0]
    moving = int((trained & (judged.health != IDLE)).sum())
    since = judged.since[trained & (judged.health == IDLE)]
    since = since[~np.isnan(since)]
    when = f" since step {int(since.max())}" if len(since) and not moving else ""
    seen, probable = _PROBABLE.get(cause_of(code), ("all is at rest", ""))  # type: ignore[arg-type]
    most = "" if count == total else f" (of {count} of {plural(total, 'tensor')})"
    if moving:
        seen += f", and weight decay and momentum alone move {moving} of {plural(total, 'tensor')}"
        most = ""
    return f"Nothing is being trained{when}: {seen}{most}" + (f"; {probable}." if probable else ".")


def unmeasured_sentence(judged: Judged) -> str:
    """ "19 of 21 tensors cannot be measured: ..."; "" when all can."""
    lacking = np.flatnonzero(is_unmeasured(judged)).tolist()
    if not lacking:
        return ""
    reasons = Counter(why(advice) for advice in map(judged.advice, lacking) if advice)
    text, count = reasons.most_common(1)[0] if reasons else ("", 0)
    share = "" if count == len(lacking) else f" ({count} of these)"
    because = f": {text}{share}" if text else ""
    return f"{len(lacking)} of {plural(int(is_measurable(judged).sum()), 'tensor')} cannot be measured{because}."


def mean_seen(judged: Judged, places: Rows) -> Seen:
    """What was seen of several tensors, on average."""
    dtypes = judged.raw("dtype")
    first = dtypes[places[0]]
    return Seen(
        dtype=first if judged.having("dtype", first.__eq__)[places].all() else "",
        efficiency=judged.mean("efficiency", places),
        lost=judged.mean("lost_fraction", places),
    )


def _group(health: int, code: int, members: Rows, judged: Judged, trainer: str) -> str:
    cause = cause_of(code)
    count = (
        f"{len(members)} of {plural(len(judged), 'tensor')} {'is' if len(members) == 1 else 'are'} {HEALTHS[health]}"
    )
    since = judged.since[members]
    since = since[~np.isnan(since)]
    when = f" since step {int(since.min())}" if len(since) else ""
    if len(since) and since.max() > since.min():  # they did not begin together
        when = f" since steps {int(since.min())} to {int(since.max())}"
    who = f" ({', '.join(judged.words(members))})" if len(members) < len(judged) else ""
    if cause is None:
        return f"{count}{when}{who}"
    advice = judged.advice(int(judged.worst_first(members)[0]))
    if len(members) == 1 or cause in (Cause.state_rounding, Cause.overwritten, Cause.not_copied_back):
        finding = brief(advice).split("; ")[0]
    else:
        finding = advise(cause, mean_seen(judged, members)).finding
    cure = remedy(cause, members, judged, trainer, advice)
    return f"{count}{when}{who}: {finding}" + (f"; {cure}" if cure else "")


def _accumulator_findings(judged: Judged) -> list[tuple[str, str]]:
    """(in a word, in a sentence) per kind of accumulator that somebody is alerted of, the most frequent first."""
    is_open = ~is_bad(judged.health)
    kinds: list[tuple[str, int, Rows]] = []
    for part in judged.parts:
        is_loud = (levels_of(part) > 0) & is_open[part.places]
        verdicts = np.stack([part.health[is_loud], part.cause[is_loud]], 1)
        for verdict in np.unique(verdicts, axis=0):
            kinds.append((part.name, verdict[0], part.places[is_loud][(verdicts == verdict).all(1)]))
    found = []
    for name, code, places in sorted(kinds, key=lambda kind: (-len(kind[2]), kind[0], kind[2][0])):
        health, count = HEALTHS[code], len(places)
        advice = judged.tensor(int(places[0])).accumulators[name].advice
        where = f"{name} is {health} in {count} of {plural(len(judged), 'tensor')}"
        found.append((f"{name} of {count} {health}", f"{where}: {brief(advice)}"))
    return found


def _unknown_averages(judged: Judged) -> list[str]:
    averages = (part for part in judged.parts if part.name.startswith("average:"))
    counts = {part.name: int((part.health == UNKNOWN).sum()) for part in averages}
    return [f"{name} of {count} not known" for name, count in counts.items() if count]


def _calm(judged: Judged, looked: tuple[int, int] | None, resting: int) -> str:
    counts = counts_of(judged.health)
    is_healthy = judged.health == HEALTHY
    efficiency = judged.mean("efficiency", is_healthy)
    # verdicts are of many windows: what a few looks of this one say by chance is no number beside them
    error = judged.mean("efficiency_error", is_healthy)
    is_sure = efficiency is not None and (efficiency >= _WELL or (error is not None and error < _SURE))
    known = f" (efficiency {fixed(efficiency)})" if efficiency is not None and is_sure else ""
    moving = judged.cause[is_moving_unasked(judged) & is_healthy]
    healthy = counts[HEALTHY] - len(moving)
    averages = _unknown_averages(judged)
    more = [", ".join(averages)] if averages else []
    if looked is not None and looked[0] * _FEW_LOOKS < looked[1]:  # a budget: what else happened is not known
        more.append(f"looked at {looked[0]} of {plural(looked[1], 'step')}")
    if resting:
        more.append(f"looked at {len(judged) - resting} of them")
    also = "".join(f"; {one}" for one in more)
    others = [(health, counts[HEALTH_CODES[health]]) for health in SEVERITY if health is not Health.healthy]
    rest = [f"{count} {health}" for health, count in others if count]
    if not rest and not len(moving):
        whole = f"All {healthy} tensors are healthy" if healthy > 1 else "The one tensor is healthy"
        return f"{whole}{known}{also}."
    text = f"{healthy} of {plural(len(judged), 'tensor')} healthy{known}"
    if len(moving):
        cause = str(cause_of(most_common(moving)[0][0]))
        rest.insert(0, f"{len(moving)} moving without being trained ({cause_label(cause)})")
    because = _why_unknown(judged) if counts[UNKNOWN] else _why_idle(judged)
    return f"{text}, {', '.join(rest)}{because}{also}."


def _why_unknown(judged: Judged) -> str:
    """The most frequent reason; of very many tensors, of some all over the model."""
    unknown = np.flatnonzero(judged.health == UNKNOWN).tolist()
    asked = random.Random(0).sample(unknown, min(len(unknown), _ASKED))
    reasons = Counter(advice for advice in map(judged.advice, unhurried(sorted(asked))) if advice)
    if not reasons:
        return ""
    text, count = reasons.most_common(1)[0]
    known = f"{count}" if len(asked) == len(unknown) else f"about {100 * count / len(asked):.0f}%"
    share = "" if len(reasons) == 1 else f": {known} of these"
    return f" ({why(text)}{share})"


def _why_idle(judged: Judged) -> str:
    """The cause of what is at rest, so that a headline always has one."""
    causes = most_common(judged.cause[(judged.health == IDLE) & (judged.cause != NONE)])
    return f" ({', '.join(cause_label(cause_of(code)) for code, _ in causes[:2])})" if causes else ""
