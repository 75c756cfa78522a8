"""What a report holds that somebody may have to hear of: tensors and accumulators that are not well, by episode.

An episode is one cause in one run, however many tensors it takes in the course of it. Two of them are of the run as a
whole: nothing trains, and too much of what is trained cannot be measured. One is of what is to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from update_watch.judge.heard import key as key_of
from update_watch.judge.heard import loud
from update_watch.judge.heard import well as well_accumulators
from update_watch.judge.rest_sentences import is_left_behind
from update_watch.judge.run_summary import (
    badness,
    is_measurable,
    is_moving_unasked,
    is_training_nothing,
    unmeasured,
)
from update_watch.report import Cause, Health, Level, Report, TensorReport
from update_watch.worker import rest, unhurried

NOTHING_TRAINS, NOT_MEASURED = "nothing_trains", "not_measured"  # episodes of the run
WAS_ROUNDED = "was_rounded"  # FP32 tensors that held nothing but BF16 values
DIVERGES = "diverges"  # an episode of the run: it is about to blow up
OUT_OF_RANGE = "out_of_range:"  # and the name of a sign: something has left the range it had
AHEAD = "ahead"  # what moves now and will stall at this schedule
_NOT_MEASURED_SHARE = 0.1  # of what is trained, by tensors or by elements, from which on it is told
_AHEAD_SHARE = 0.1  # of what is trained, that will stall for at least this share of the run, to be told
_UNSURE = 0.25  # error of the forecasts of this run, from which on nothing is made of them
ALONE = frozenset(
    {"updates", "gradients", "state", "fp16_range", "skipped"}
)  # signs that are told though nothing runs away
_LEVELS = {Health.broken: Level.error, Health.stalled: Level.error, Health.stalling: Level.warn}
_IDLE_CAUSES = frozenset({Cause.no_gradient, Cause.zero_gradient, Cause.negligible_gradient})


class Finding(NamedTuple):
    """One tensor or accumulator that is not well."""

    key: str  # the tensor's name; of an accumulator "name [accumulator]"
    tensor: TensorReport
    part: str  # the accumulator; "" for the tensor itself
    level: Level
    health: Health
    cause: Cause | None
    said: str | None = None  # of the run as a whole; None: what is said of the tensor or accumulator

    @property
    def advice(self) -> str:
        """Of thousands only the first is told."""
        if self.said is not None:
            return self.said
        return self.tensor.accumulators[self.part].advice if self.part else self.tensor.advice


class Findings(NamedTuple):
    """Of one report."""

    bad: dict[str, list[Finding]]  # by episode, worst first
    well: set[str]  # keys that are certainly well


def find(report: Report) -> Findings:
    """Everything in a report that is something to tell, or to compare with."""
    bad: dict[str, list[Finding]] = {}
    heard, well = loud(report.tensors), well_accumulators(report.tensors)
    tensors = report.tensors
    told = []
    for place, tensor in enumerate(unhurried(tensors)):
        if tensor.health is Health.healthy and tensor.cause is None and not tensor.was_rounded and place not in heard:
            well.add(tensor.name)
        else:
            told.append(place)
    for place in unhurried(sorted(told, key=lambda place: badness(tensors[place]))):
        tensor = tensors[place]
        level = _LEVELS.get(tensor.health)
        if level is not None:
            _add(bad, Finding(tensor.name, tensor, "", level, tensor.health, tensor.cause))
        elif is_moving_unasked(tensor):
            level = Level.warn if tensor.health is Health.healthy else Level.info
            if tensor.cause is Cause.requires_grad_off:
                _add(bad, Finding(tensor.name, tensor, "", level, tensor.health, tensor.cause))
        elif tensor.health is Health.idle and tensor.cause in _IDLE_CAUSES:
            _add(bad, Finding(tensor.name, tensor, "", Level.info, tensor.health, tensor.cause))
        elif tensor.cause is Cause.not_in_optimizer and is_left_behind(tensor.advice):  # others are left out on purpose
            _add(bad, Finding(tensor.name, tensor, "", Level.warn, tensor.health, tensor.cause))
        elif tensor.health is Health.healthy:
            well.add(tensor.name)
        # at the start of a run that is how weights are loaded; later it is told once, and never over
        if tensor.was_rounded and tensor.health is Health.healthy and report.step > report.window:
            key = f"{tensor.name} [{WAS_ROUNDED}]"
            bad.setdefault(WAS_ROUNDED, []).append(Finding(key, tensor, "", Level.info, tensor.health, None))
        for one in heard.get(place, ()):
            # the loss of a bad weight drowns what its states and decay lose beside it
            if tensor.health not in _LEVELS or not _is_early(one.cause):
                _add(bad, Finding(key_of(tensor.name, one.name), tensor, one.name, one.level, one.health, one.cause))
    rest()
    if is_training_nothing(report.tensors):
        bad.pop(f"{Cause.not_in_optimizer}", None)  # the same, said of the run
        bad[NOTHING_TRAINS] = [
            Finding(t.name, t, "", Level.error, t.health, t.cause) for t in report.tensors if t.trainable
        ]
    rest()
    _find_unmeasured(report.tensors, bad)
    rest()
    _find_ahead(report, bad, well)
    _find_divergence(report, bad, well)
    return Findings(bad, well)


def _find_unmeasured(tensors: Sequence[TensorReport], bad: dict[str, list[Finding]]) -> None:
    lacking, trained = unmeasured(tensors), [t for t in tensors if is_measurable(t)]
    if not lacking:
        return
    share = max(len(lacking) / len(trained), sum(t.numel for t in lacking) / max(sum(t.numel for t in trained), 1))
    if share > _NOT_MEASURED_SHARE:
        bad[NOT_MEASURED] = [Finding(t.name, t, "", Level.warn, t.health, t.cause) for t in lacking]


def _find_ahead(report: Report, bad: dict[str, list[Finding]], well: set[str]) -> None:
    """Those that will stall while there is time to change it. One that has stalled since is neither bad nor well here."""
    forecast = report.forecast
    if forecast is None or (forecast.error is not None and forecast.error > _UNSURE):
        return
    tensors = {t.name: t for t in report.tensors}
    latest = (1 - _AHEAD_SHARE) * forecast.until
    found = []
    for one in forecast.tensors:
        tensor, key = tensors[one.name], f"{one.name} [{AHEAD}]"
        # for certain: also were it to go as well as may be
        if one.stalling_step is not None and one.latest is not None and forecast.step < one.latest <= latest:
            if tensor.health is Health.healthy:
                found.append(Finding(key, tensor, "", Level.warn, tensor.health, None, forecast.headline))
        elif tensor.health is Health.healthy:
            well.add(key)
    trained = sum(t.numel for t in report.tensors if t.trainable) or 1
    if sum(f.tensor.numel for f in found) >= _AHEAD_SHARE * trained:
        bad[AHEAD] = found


def _find_divergence(report: Report, bad: dict[str, list[Finding]], well: set[str]) -> None:
    """It is of the run as a whole; the largest tensor stands for it."""
    largest = max((t for t in report.tensors if t.trainable), key=lambda t: t.numel, default=None)
    if report.divergence is None or largest is None:
        return
    key = f"[{DIVERGES}]"
    if report.divergence.is_warning:
        said = report.divergence.headline
        bad[DIVERGES] = [Finding(key, largest, "", Level.warn, Health.healthy, None, said)]
        return  # it tells of the other signs too
    if not report.divergence.signs:
        well.add(key)
    for sign in report.divergence.signs:
        if sign.name in ALONE:
            # never well again, so it is told once in a run: a range that is left is left again
            one = next((t for t in report.tensors if t.name in sign.tensors), largest)
            found = Finding(f"[{sign.name}]", one, "", Level.info, Health.healthy, None, sign.text)
            bad[f"{OUT_OF_RANGE}{sign.name}"] = [found]


def _add(bad: dict[str, list[Finding]], finding: Finding) -> None:
    # every average is an episode of its own: they are other models
    average = f" {finding.part}" if finding.part.startswith("average:") else ""
    # both are strings; to format a member of an enumeration takes five times as long
    bad.setdefault((finding.cause or finding.health) + average, []).append(finding)


def _is_early(cause: Cause | None) -> bool:
    return cause in (Cause.state_rounding, Cause.decay_rounding)
