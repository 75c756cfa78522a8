"""What a report holds that somebody may have to hear of: tensors and accumulators that are not well, by episode.

An episode is one cause in one run, however many tensors it takes in the course of it. Two of them are of the run as a
whole: nothing trains, and too much of what is trained cannot be measured. One is of what is to come.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from update_watch.judge.alerts.keys import Keys
from update_watch.judge.columns.codes import (
    BROKEN,
    CAUSE_CODES,
    CAUSES,
    HEALTHS,
    HEALTHY,
    IDLE,
    NONE,
    STALLED,
    STALLING,
    Codes,
    Mask,
    Rows,
)
from update_watch.judge.columns.judged import LEVELS, Judged, levels_of
from update_watch.judge.forecast.forecaster import will_stall
from update_watch.judge.rest_sentences import is_left_behind
from update_watch.judge.run_summary import (
    is_bad,
    is_measurable,
    is_moving_unasked,
    is_training_nothing,
    is_unmeasured,
)
from update_watch.report import Cause, Level, Report
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
OWN = -1  # no accumulator: the tensor itself
INFO, WARN, ERROR = (LEVELS.index(level) for level in (Level.info, Level.warn, Level.error))
_LEVELS = np.zeros(len(HEALTHS), np.int8)  # by health
_LEVELS[[BROKEN, STALLED, STALLING]] = ERROR, ERROR, WARN
_IDLE_CAUSES = (Cause.no_gradient, Cause.zero_gradient, Cause.negligible_gradient)
_EARLY = [CAUSE_CODES[cause] for cause in (Cause.state_rounding, Cause.decay_rounding)]


@dataclasses.dataclass(frozen=True)
class Members:
    """Tensors and accumulators that are not well, of one episode, the worst first. Legend: m members."""

    places: Rows  # [m] of their tensors in the report
    parts: Rows  # [m] which of the report's accumulators; OWN: the tensor itself
    keys: Rows  # [m] as `Keys` numbers them
    level: Codes  # [m] how loud they are, by the index in `LEVELS`
    health: Codes  # [m]
    cause: Codes  # [m]
    said: str | None = None  # of the run as a whole; None: what is said of the tensor or accumulator

    def __len__(self) -> int:
        return len(self.places)

    def taken(self, which: Mask | Rows) -> Members:
        """Some of them."""
        return dataclasses.replace(self, **{name: getattr(self, name)[which] for name in _COLUMNS})

    def advice(self, judged: Judged) -> str:
        """What is said of the first."""
        if self.said is not None:
            return self.said
        place, part = int(self.places[0]), int(self.parts[0])
        if part == OWN:
            return judged.advice(place)
        return judged.tensor(place).accumulators[judged.parts[part].name].advice


_COLUMNS = ("places", "parts", "keys", "level", "health", "cause")


class Findings(NamedTuple):
    """Of one report."""

    bad: dict[str, Members]  # by episode
    well: Mask  # keys that are certainly well


def find(report: Report, judged: Judged, keys: Keys) -> Findings:
    """Everything in a report that is something to tell, or to compare with. `judged`: its tensors."""
    own, health = keys.of(judged.names), judged.health
    is_rounded = (judged.column("was_rounded") != 0) & (health == HEALTHY)
    found, is_well = _of_tensors(judged, own)
    # at the start of a run that is how weights are loaded; later it is told once, and never over
    if report.step > report.window and is_rounded.any():
        places = np.flatnonzero(is_rounded)
        of_rounded = keys.of(judged.names, WAS_ROUNDED)[places]
        found.append((WAS_ROUNDED, _members(judged, places, of_rounded, INFO, cause=NONE), -1))
    well = [own[is_well]]
    for k, part in enumerate(judged.parts):
        rest()
        level, of_part = levels_of(part), keys.of(judged.names, part.name)[part.places]
        well.append(of_part[(part.health == HEALTHY) & (level == 0)])
        # the loss of a bad weight drowns what its states and decay lose beside it
        is_drowned = is_bad(health[part.places]) & np.isin(part.cause, _EARLY)
        told = np.flatnonzero((level > 0) & ~is_drowned)
        # every average is an episode of its own: they are other models
        average = f" {part.name}" if part.name.startswith("average:") else ""
        for cause, of_cause in _by(part.cause[told], told):
            for code, those in [(cause, of_cause)] if cause != NONE else _by(part.health[of_cause], of_cause):
                name = f"{CAUSES[code] if cause != NONE else HEALTHS[code]}{average}"
                columns = (part.health[those], part.cause[those])
                parts = np.full(len(those), k)
                found.append((name, Members(part.places[those], parts, of_part[those], level[those], *columns), k))
    bad = _ordered(judged, found)
    rest()
    if is_training_nothing(judged):
        bad.pop(f"{Cause.not_in_optimizer}", None)  # the same, said of the run
        places = np.flatnonzero(judged.trainable)
        bad[NOTHING_TRAINS] = _members(judged, places, own[places], ERROR)
    _find_unmeasured(judged, own, bad)
    well += _find_ahead(report, judged, keys, bad)
    well += _find_divergence(report, judged, keys, bad)
    return Findings(bad, keys.mask(np.concatenate(well)))


def _of_tensors(judged: Judged, own: Rows) -> tuple[list[tuple[str, Members, int]], Mask]:
    """The tensors that are not well, each with its episode, and [n] those that are well."""
    health, cause = judged.health, judged.cause
    is_asked = ~is_moving_unasked(judged)
    level = _LEVELS[health].copy()
    # what is frozen and moves
    is_frozen = ~is_asked & judged.is_caused(Cause.requires_grad_off)
    level[is_frozen] = np.where(health == HEALTHY, WARN, INFO)[is_frozen]
    level[(health == IDLE) & judged.is_caused(*_IDLE_CAUSES)] = INFO
    outside = is_asked & (level == 0) & judged.is_caused(Cause.not_in_optimizer)
    for place in unhurried(np.flatnonzero(outside).tolist()):  # others are left out on purpose
        level[place] = WARN if is_left_behind(judged.advice(place)) else 0
    bad = np.flatnonzero(level)
    codes = np.where(cause[bad] == NONE, len(CAUSES) + health[bad], cause[bad])
    found = []
    for code, places in _by(codes, bad):
        name = f"{CAUSES[code]}" if code < len(CAUSES) else f"{HEALTHS[code - len(CAUSES)]}"
        found.append((name, _members(judged, places, own[places], level[places]), -2))
    return found, (health == HEALTHY) & is_asked & (level == 0)


def _members(
    judged: Judged, places: Rows, keys: Rows, level: Any, cause: int | None = None, said: str | None = None
) -> Members:
    """Of tensors."""
    n = len(places)
    causes = judged.cause[places] if cause is None else np.full(n, cause, np.int8)
    levels = np.full(n, level, np.int8)
    return Members(places, np.full(n, OWN), keys, levels, judged.health[places], causes, said)


def _by(codes: Codes, places: Rows) -> list[tuple[int, Rows]]:
    """The places of each code."""
    return [(code, places[codes == code]) for code in np.unique(codes).tolist()]


def _ordered(judged: Judged, found: list[tuple[str, Members, int]]) -> dict[str, Members]:
    """One for each episode: by how bad the tensors are, of one tensor by the last of the three; episodes by their first."""
    rank = np.empty(len(judged), np.intp)
    rank[judged.worst_first(np.arange(len(judged)))] = np.arange(len(judged))
    bad: list[tuple[tuple[int, int], str, Members]] = []
    for name in dict.fromkeys(name for name, _, _ in found):
        members = [(of_one, within) for other, of_one, within in found if other == name]
        within = np.concatenate([np.full(len(of_one), at) for of_one, at in members])
        columns: Any = {name: np.concatenate([getattr(of_one, name) for of_one, _ in members]) for name in _COLUMNS}
        joined = Members(**columns)
        order = np.lexsort((within, rank[joined.places]))
        joined = joined.taken(order)
        bad.append(((int(rank[joined.places[0]]), int(within[order[0]])), name, joined))
    return {name: members for _, name, members in sorted(bad, key=lambda one: one[0])}


def _find_unmeasured(judged: Judged, own: Rows, bad: dict[str, Members]) -> None:
    lacking, trained = is_unmeasured(judged), is_measurable(judged)
    if not lacking.any():
        return
    share = max(lacking.sum() / trained.sum(), judged.numel(lacking) / max(judged.numel(trained), 1))
    if share > _NOT_MEASURED_SHARE:
        places = np.flatnonzero(lacking)
        bad[NOT_MEASURED] = _members(judged, places, own[places], WARN)


def _find_ahead(report: Report, judged: Judged, keys: Keys, bad: dict[str, Members]) -> list[Rows]:
    """Those that will stall while there is time to change it; what is well. One that has stalled since is neither here."""
    forecast = report.forecast
    if forecast is None or (forecast.error is not None and forecast.error > _UNSURE):
        return []
    place_of = {name: place for place, name in enumerate(judged.names)}
    ahead = keys.of(judged.names, AHEAD)
    latest = (1 - _AHEAD_SHARE) * forecast.until
    # for certain: also were it to go as well as may be
    names, will = will_stall(forecast, latest)
    told = np.array([place_of[name] for name in names], dtype=np.intp)
    is_ahead, is_well = np.zeros(len(judged), bool), np.zeros(len(judged), bool)
    is_ahead[told], is_well[told] = will, ~will
    places = np.flatnonzero(is_ahead & (judged.health == HEALTHY))
    if len(places) and judged.numel(places) >= _AHEAD_SHARE * (judged.numel(judged.trainable) or 1):
        bad[AHEAD] = _members(judged, places, ahead[places], WARN, NONE, forecast.headline)
    return [ahead[is_well & (judged.health == HEALTHY)]]


def _find_divergence(report: Report, judged: Judged, keys: Keys, bad: dict[str, Members]) -> list[Rows]:
    """It is of the run as a whole; the largest tensor stands for it. Returns what is well."""
    trained = np.flatnonzero(judged.trainable)
    if report.divergence is None or not len(trained):
        return []
    largest = trained[judged.column("numel")[trained].argmax()]

    def said(name: str, place: int, level: int, text: str) -> Members:
        found = _members(judged, np.array([place]), keys.numbers([f"[{name}]"]), level, NONE, text)
        return dataclasses.replace(found, health=np.array([HEALTHY], np.int8))

    if report.divergence.is_warning:
        bad[DIVERGES] = said(DIVERGES, largest, WARN, report.divergence.headline)
        return []  # it tells of the other signs too
    for sign in report.divergence.signs:
        if sign.name in ALONE:
            # never well again, so it is told once in a run: a range that is left is left again
            names = judged.names
            place = next((place for place, name in enumerate(names) if name in sign.tensors), largest)
            bad[f"{OUT_OF_RANGE}{sign.name}"] = said(sign.name, place, INFO, sign.text)
    return [] if report.divergence.signs else [keys.numbers([f"[{DIVERGES}]"])]
