"""The verdict on a run in the words of a person: which kinds of tensors, how much of each update, since when, why.

Made from the columns of one window, so the HTML report, the terminal and W&B say the same. One number is used
throughout: the efficiency, as the share of each update that arrives.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from update_watch.dashboards.frame import CAUSES, NO_CODE, Frame
from update_watch.dashboards.run_numbers import weighted
from update_watch.dashboards.unseen import unseen_words
from update_watch.naming import ModelWords, model_words, plural_of
from update_watch.report import SEVERITY, Cause, Health
from update_watch.wording import short

UNWELL = (Health.broken, Health.stalled, Health.stalling)
_NAMED = 3  # phrases in a sentence

# why, in a clause that follows "because"; {format} is that of the weights
CAUSE_WORDS = {
    "weight_rounding": "{format} has no room for steps this small",
    "state_rounding": "the optimizer's state is rounded",
    "decay_rounding": "weight decay is rounded away",
    "average_rounding": "the averaged model does not follow",
    "accumulation_rounding": "summed gradients lose micro-batches",
    "overwritten": "what the steps write is overwritten between them",
    "not_copied_back": "the optimizer's masters are not copied back to the model",
    "average_diverges": "the averaged model runs away from the weights",
    "average_not_updated": "the averaged model is not updated",
    "negligible_gradient": "the gradients are no more than round-off",
    "requires_grad_off": "they are frozen",
    "not_in_optimizer": "no optimizer holds them",
    "no_gradient": "no gradient reaches them",
    "zero_gradient": "every gradient is zero",
    "zero_learning_rate": "the learning rate is zero or has run out",
    "skipped_steps": "steps are skipped for overflow",
    "not_written": "the optimizer does not write its updates",
    "non_finite": "there is NaN or infinity",
    "replicas_differ": "the ranks store different values",
    "not_replayable": "the update cannot be replayed",
}


def cause_words(cause: Cause | None, dtype: str = "") -> str:
    """Why, as a clause: "BF16 has no room for steps this small"."""
    if cause is None:
        return ""
    words = CAUSE_WORDS.get(cause.value, cause.value.replace("_", " "))
    return words.format(format=short(dtype) if dtype else "their format")


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors of one health and one cause."""

    health: Health
    cause: Cause | None
    members: tuple[int, ...]  # indices in the frame
    words: str  # "all 65 norms and lm_head.weight"
    arrived: float | None  # efficiency, weighted by number of elements
    since: int | None  # the step at which the first of them began
    advice: str  # of the worst of them


@dataclasses.dataclass(frozen=True)
class Verdict:
    health: Health
    sentence: str  # what is the case, which kinds
    reason: str  # why and since when; may be empty
    groups: tuple[Group, ...]  # of what is not well, worst first
    cause: Cause | None  # of the first group


def verdict_of(frame: Frame, lr_at: Callable[[int], float] | None = None, first_step: int = 0) -> Verdict:
    """The verdict on a window.

    Args:
        lr_at: learning rate of the run at a step; NaN where it is not known.
        first_step: the step before the run's first window.
    """
    found = _verdict(frame, lr_at, first_step)
    unseen = unseen_words(frame)
    return dataclasses.replace(found, reason=f"{unseen} {found.reason}".rstrip()) if unseen else found


def _verdict(frame: Frame, lr_at: Callable[[int], float] | None, first_step: int) -> Verdict:
    groups = groups_of(frame, UNWELL)
    if groups:
        text = "; ".join(_clause(group, first_step) for group in groups[:_NAMED])
        reason = _reason(frame, groups, lr_at, first_step)
        sentence = _sentence(text) if text.startswith(("all ", "both ")) else f"{text}."  # a name stays as it is
        return Verdict(groups[0].health, sentence, reason, groups, groups[0].cause)
    return _calm(frame)


def groups_of(frame: Frame, healths: Sequence[Health]) -> tuple[Group, ...]:
    """Tensors by health and cause, worst and most frequent first."""
    wanted = [SEVERITY.index(health) for health in healths]
    inside = np.flatnonzero(np.isin(frame.tensors.health, wanted))
    causes = frame.tensors.cause[inside].astype(np.int64) - NO_CODE  # from 0 on
    codes = frame.tensors.health[inside].astype(np.int64) * (len(CAUSES) + 1) + causes
    distinct, first, at, counts = np.unique(codes, return_index=True, return_inverse=True, return_counts=True)
    health_of = frame.tensors.health[inside][first]
    ordered = sorted(range(len(distinct)), key=lambda k: (health_of[k], -counts[k], first[k]))
    sizes = np.array(frame.table.numel, dtype=np.float64)
    return tuple(_group(frame, inside[at == k], sizes) for k in ordered)


def _group(frame: Frame, inside: NDArray[np.intp], sizes: NDArray[np.float64]) -> Group:
    """Of the tensors with these indices, which are of one health and cause."""
    efficiency = frame.tensors.numbers["efficiency"][inside]
    arrived = weighted(efficiency, sizes[inside])
    since = frame.tensors.numbers["since_step"][inside]
    known = since[~np.isnan(since)]
    health, cause = frame.tensors.health[inside[0]], frame.tensors.cause[inside[0]]
    worst = int(inside[np.where(np.isnan(efficiency), np.inf, efficiency).argmin()])
    return Group(
        health=SEVERITY[health],
        cause=None if cause == NO_CODE else CAUSES[cause],
        members=tuple(inside.tolist()),
        words=in_a_row(_words_of(frame).group(inside, _NAMED)),
        arrived=None if np.isnan(arrived) else arrived,
        since=int(known.min()) if len(known) else None,
        advice=frame.tensors.advice.get(worst, ""),
    )


def _words_of(frame: Frame) -> ModelWords:
    return model_words(frame.table.name, frame.table.shape)


def in_a_row(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def lr_words(rate: float) -> str:
    """A learning rate: "3e-04" as "3e-4"."""
    text = f"{rate:.1e}".replace(".0e", "e")
    digits, _, power = text.partition("e")
    return f"{digits}e{int(power)}"


def share_words(share: float) -> str:
    """A share in percent that says 0% and 100% only when it is."""
    if 0 < share < 0.005:
        return "under 1%"
    if 1 < share < 1.02:  # rounding alone may leave a little more than everything
        return "100%"
    return "over 99%" if 0.995 <= share < 1 else f"{100 * share:.0f}%"


def _is_one(group: Group) -> bool:
    return len(group.members) == 1


def _clause(group: Group, first_step: int) -> str:
    one = _is_one(group)
    if group.health is Health.broken:
        return (
            f"{group.words} {'holds' if one else 'hold'} NaN or infinity"
            if group.cause is Cause.non_finite
            else (f"{group.words} {'is' if one else 'are'} broken: {cause_words(group.cause)}")
        )
    if group.health is Health.stalled:
        if group.since is not None and group.since > first_step + 1:
            return f"{group.words} no longer {'trains' if one else 'train'}"
        return f"{group.words} {'does' if one else 'do'} not train"
    if group.arrived is None:
        return f"{group.words} {'loses' if one else 'lose'} part of each update"
    lost = share_words(max(0.0, 1 - group.arrived))
    return f"{group.words} {'loses' if one else 'lose'} {lost} of each update"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _reason(frame: Frame, groups: Sequence[Group], lr_at: Callable[[int], float] | None, first_step: int) -> str:
    chief = groups[0]
    dtypes = Counter(map(frame.table.dtype.__getitem__, chief.members))
    is_said = chief.cause is None or chief.cause is Cause.non_finite  # in the sentence itself
    parts = [] if is_said else [_sentence(cause_words(chief.cause, dtypes.most_common(1)[0][0]))]
    whens: dict[str, list[str]] = {}  # when -> families
    for word, since in _begun(frame, groups).items():
        is_begin = since <= first_step + 1
        when = "since the start" if is_begin else f"since step {since:,}"
        rate = lr_at(since) if lr_at is not None and not is_begin else float("nan")
        if not np.isnan(rate):
            when += f" (learning rate {lr_words(rate)})"
        whens.setdefault(when, []).append(word)
    spoken = [f"{in_a_row(words)} {when}" if len(whens) > 1 else when for when, words in whens.items()]
    if spoken:
        parts.append(_sentence("; ".join(spoken[:_NAMED])))
    return " ".join(part for part in parts if part != ".")


def _begun(frame: Frame, groups: Sequence[Group]) -> dict[str, int]:
    """Family of tensors ("norms") -> the step at which the first of them began to be as it is, the earliest first."""
    members = np.concatenate([np.array(group.members, dtype=np.intp) for group in groups])
    since = frame.tensors.numbers["since_step"][members]
    words = _words_of(frame)
    family = words.family_P[members]
    known = ~np.isnan(since)
    found = {
        plural_of(words.families[code]): int(since[known & (family == code)].min())
        for code in np.unique(family[known]).tolist()
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _calm(frame: Frame) -> Verdict:
    """Nothing is stalled: well, or nothing is known, or nothing is trained."""
    each = np.bincount(frame.tensors.health, minlength=len(SEVERITY)).tolist()
    counts = dict(zip(SEVERITY, each, strict=True))
    total, healthy = len(frame.tensors.health), counts[Health.healthy]
    states = sum(
        int((columns.health <= SEVERITY.index(Health.stalling))[columns.health != NO_CODE].sum())
        for columns in frame.accumulators.values()
    )
    if not total:
        return Verdict(Health.unknown, "No tensor is watched.", "", (), None)
    others = groups_of(frame, (Health.idle, Health.unknown, Health.frozen))
    if healthy:
        sentence = (
            (f"All {healthy:,} tensors get their updates." if total > 1 else "The one tensor gets its updates.")
            if healthy == total
            else (f"{healthy:,} of {total:,} tensors get their updates; {_others_counted(others)}.")
        )
        if frame.health in UNWELL and states:
            return Verdict(
                Health.stalling, f"{sentence[:-1]}, but what the optimizer keeps beside them does not.", "", (), None
            )
        return Verdict(Health.healthy, sentence, "", others, None)
    chief = others[0] if others else None
    if counts[Health.idle] and not counts[Health.unknown]:
        idle = next(group for group in others if group.health is Health.idle)
        why = cause_words(idle.cause).replace("them", "any tensor")
        return Verdict(Health.idle, f"Nothing is being trained{': ' + why if why else ''}.", "", others, idle.cause)
    if counts[Health.unknown]:
        return Verdict(
            Health.unknown, f"No verdict: {_unmeasured(others, total)}.", "", others, chief.cause if chief else None
        )
    return Verdict(Health.frozen, "Every tensor is frozen.", "", others, None)


def _others_counted(groups: Sequence[Group]) -> str:
    """In words where these are few, else their number by health: the names have a line of their own."""
    if len(groups) == 1 and "," not in groups[0].words and " and " not in groups[0].words:
        return _others_words(groups)
    counts = Counter({group.health: 0 for group in groups})
    for group in groups:
        counts[group.health] += len(group.members)
    return ", ".join(f"{count:,} {'is' if count == 1 else 'are'} {health}" for health, count in counts.items())


def _unmeasured(groups: Sequence[Group], total: int) -> str:
    lacking = sum(len(group.members) for group in groups if group.health is Health.unknown)
    if lacking < total:
        return _others_words(groups)
    return f"none of the {total:,} tensors can be measured" if total > 1 else "the one tensor cannot be measured"


def _others_words(groups: Sequence[Group]) -> str:
    return "; ".join(f"{group.words} {'is' if _is_one(group) else 'are'} {group.health}" for group in groups[:_NAMED])
