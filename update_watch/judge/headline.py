"""The one sentence on the run: what is wrong with how much of it since when, and what to change; or that all is well.

It never says that all is well where something could not be measured, and a run in which nothing trains has its cause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from update_watch.judge.advice import advise, brief
from update_watch.judge.heard import Heard, loud, unknown_averages
from update_watch.judge.reasons import why
from update_watch.judge.remedies import remedy
from update_watch.judge.run_summary import (
    BAD,
    RANK,
    badness,
    is_measurable,
    is_moving_unasked,
    is_training_nothing,
    unmeasured,
)
from update_watch.judge.seen import Seen
from update_watch.naming import group_words
from update_watch.report import SEVERITY, Cause, Health, TensorReport, weighted_mean
from update_watch.wording import cause_label, fixed, plural
from update_watch.worker import unhurried

_FEW_LOOKS = 16  # of so many steps less than one was looked at: that all is well says the less
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
        "the gradient scaler skips every step",
        "look for NaN or overflow in the loss, or use BF16, which needs no scaler",
    ),
    Cause.not_in_optimizer: (
        "no optimizer holds its tensors",
        "make the optimizer after the model was wrapped, moved or loaded",
    ),
}


def headline(
    tensors: Sequence[TensorReport], step: int = 0, trainer: str = "torch", looked: tuple[int, int] | None = None
) -> str:
    """One sentence on the run. `trainer`: in whose words cures are told; `looked`: at how many of how many steps."""
    if not tensors:
        return "No tensors are watched."
    if is_training_nothing(tensors):
        return nothing_trains(tensors, step)
    groups: dict[tuple[Health, Cause | None], list[TensorReport]] = {}
    for tensor in tensors:
        if tensor.health in BAD:
            groups.setdefault((tensor.health, tensor.cause), []).append(tensor)
    findings = _accumulator_findings(tensors)
    lacking = unmeasured(tensors)
    if not groups and not findings:
        return _calm(tensors, looked)
    ordered = sorted(groups.items(), key=lambda item: (RANK[item[0][0]], -len(item[1])))
    also = [f"{len(members)} {health} ({cause_label(cause)})" for (health, cause), members in ordered[1:]]
    if ordered:
        (health, cause), members = ordered[0]
        text = _group(health, cause, members, tensors, trainer)
    else:
        text, findings = findings[0][1], findings[1:]
    also += [short for short, _ in findings]
    if lacking:
        also.append(f"{len(lacking)} not measured")
    pending = sum(t.health is Health.unknown for t in tensors) - len(lacking)
    if pending:
        also.append(f"{pending} not known yet")
    return f"{text}; also {', '.join(also)}." if also else f"{text}."


def nothing_trains(tensors: Sequence[TensorReport], step: int) -> str:
    """The sentence for a run in which everything that requires a gradient is at rest."""
    trained = [t for t in tensors if t.trainable]
    cause, count = Counter(t.cause for t in trained).most_common(1)[0]
    moving = [t for t in trained if t.health is not Health.idle]
    since = [t.since_step for t in trained if t.since_step is not None and t.health is Health.idle]
    when = f" since step {max(since)}" if since and not moving else ""
    seen, probable = _PROBABLE.get(cause, ("all is at rest", ""))  # type: ignore[arg-type]
    most = "" if count == len(trained) else f" (of {count} of {plural(len(trained), 'tensor')})"
    if moving:
        seen += f", and weight decay and momentum alone move {len(moving)} of {plural(len(trained), 'tensor')}"
        most = ""
    return f"Nothing is being trained{when}: {seen}{most}" + (f"; {probable}." if probable else ".")


def unmeasured_sentence(tensors: Sequence[TensorReport]) -> str:
    """ "19 of 21 tensors cannot be measured: ..."; "" when all can."""
    lacking, trained = unmeasured(tensors), [t for t in tensors if is_measurable(t)]
    if not lacking:
        return ""
    reasons = Counter(why(t.advice) for t in lacking if t.advice)
    text, count = reasons.most_common(1)[0] if reasons else ("", 0)
    share = "" if count == len(lacking) else f" ({count} of these)"
    because = f": {text}{share}" if text else ""
    return f"{len(lacking)} of {plural(len(trained), 'tensor')} cannot be measured{because}."


def mean_seen(members: Sequence[TensorReport]) -> Seen:
    """What was seen of several tensors, on average."""
    dtypes = {t.dtype for t in members}
    return Seen(
        dtype=dtypes.pop() if len(dtypes) == 1 else "",
        efficiency=weighted_mean((t.efficiency, t.numel) for t in unhurried(members)),
        lost=weighted_mean((t.lost_fraction, t.numel) for t in unhurried(members)),
    )


def _group(
    health: Health, cause: Cause | None, members: list[TensorReport], tensors: Sequence[TensorReport], trainer: str
) -> str:
    count = f"{len(members)} of {plural(len(tensors), 'tensor')} {'is' if len(members) == 1 else 'are'} {health}"
    since = [t.since_step for t in members if t.since_step is not None]
    when = f" since step {min(since)}" if since else ""
    if since and max(since) > min(since):  # they did not begin together
        when = f" since steps {min(since)} to {max(since)}"
    who = ""
    if len(members) < len(tensors):
        who = f" ({', '.join(group_words([t.name for t in members], {t.name: t.shape for t in tensors}, 3))})"
    worst = min(members, key=badness)
    if cause is None:
        return f"{count}{when}{who}"
    if len(members) == 1 or cause in (Cause.state_rounding, Cause.overwritten, Cause.not_copied_back):
        finding = brief(worst.advice).split("; ")[0]
    else:
        finding = advise(cause, mean_seen(members)).finding
    cure = remedy(cause, members, tensors, trainer, worst.advice)
    return f"{count}{when}{who}: {finding}" + (f"; {cure}" if cure else "")


def _accumulator_findings(tensors: Sequence[TensorReport]) -> list[tuple[str, str]]:
    """(in a word, in a sentence) per kind of accumulator that is not well, loudest and most frequent first."""
    groups: dict[tuple[str, Health, Cause | None], list[Heard]] = {}
    for place, of_tensor in loud(tensors).items():
        if tensors[place].health not in BAD:
            for one in of_tensor:
                groups.setdefault((one.name, one.health, one.cause), []).append(one)
    found = []
    for (name, health, _), members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0][0])):
        where = f"{name} is {health} in {len(members)} of {plural(len(tensors), 'tensor')}"
        advice = tensors[members[0].place].accumulators[name].advice
        found.append((f"{name} of {len(members)} {health}", f"{where}: {brief(advice)}"))
    return found


def _calm(tensors: Sequence[TensorReport], looked: tuple[int, int] | None) -> str:
    counts = Counter(t.health for t in tensors)
    efficiency = weighted_mean((t.efficiency, t.numel) for t in tensors if t.health is Health.healthy)
    known = f" (efficiency {fixed(efficiency)})" if efficiency is not None else ""
    moving = [t for t in tensors if is_moving_unasked(t) and t.health is Health.healthy]
    healthy = counts.pop(Health.healthy, 0) - len(moving)
    averages = unknown_averages(tensors)
    more = [", ".join(f"{name} of {count} not known" for name, count in averages.items())] if averages else []
    if looked is not None and looked[0] * _FEW_LOOKS < looked[1]:  # a budget: what else happened is not known
        more.append(f"looked at {looked[0]} of {plural(looked[1], 'step')}")
    also = "".join(f"; {one}" for one in more)
    if not counts and not moving:
        whole = f"All {healthy} tensors are healthy" if healthy > 1 else "The one tensor is healthy"
        return f"{whole}{known}{also}."
    text = f"{healthy} of {plural(len(tensors), 'tensor')} healthy{known}"
    rest = [f"{counts[health]} {health}" for health in SEVERITY if counts[health]]
    if moving:
        cause = Counter(str(t.cause) for t in moving).most_common(1)[0][0]
        rest.insert(0, f"{len(moving)} moving without being trained ({cause_label(cause)})")
    because = _why_unknown(tensors) if counts[Health.unknown] else _why_idle(tensors)
    return f"{text}, {', '.join(rest)}{because}{also}."


def _why_unknown(tensors: Sequence[TensorReport]) -> str:
    reasons = Counter(t.advice for t in tensors if t.health is Health.unknown and t.advice)
    if not reasons:
        return ""
    text, count = reasons.most_common(1)[0]
    share = "" if len(reasons) == 1 else f": {count} of these"
    return f" ({why(text)}{share})"


def _why_idle(tensors: Sequence[TensorReport]) -> str:
    """The cause of what is at rest, so that a headline always has one."""
    causes = Counter(t.cause for t in tensors if t.health is Health.idle and t.cause is not None)
    return f" ({', '.join(cause_label(cause) for cause, _ in causes.most_common(2))})" if causes else ""
