"""Alerts: one story per cause, told when it begins, grows, becomes worse in kind and ends.

What is news is decided in `episodes`, what is said in `texts`. News that the cooldown or the budget holds back stays
news: it is told later if it is still true then, and forgotten if it is not.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from update_watch.columns.late_fields import changed
from update_watch.judge.alerts.episodes import BEGAN, GREW, OVER, Episode, level_of
from update_watch.judge.alerts.findings import AHEAD, INFO, NOTHING_TRAINS, Members, find
from update_watch.judge.alerts.keys import Keys
from update_watch.judge.alerts.texts import alert_of, head_of, with_decay
from update_watch.judge.columns.codes import CAUSE_CODES, IDLE, Mask
from update_watch.judge.columns.judged import judged_of
from update_watch.judge.history import check_state
from update_watch.report import Cause, Level, Report
from update_watch.thresholds import Thresholds
from update_watch.wording import above_progress_bars, plural
from update_watch.worker import rest, unhurried

_VERSION = 2
_HOUR = 3600.0
_LOUDEST_FIRST = (Level.error, Level.warn, Level.info)
_LOGGING = {Level.info: logging.INFO, Level.warn: logging.WARNING, Level.error: logging.ERROR}
_WEIGHTS, _DECAY = str(Cause.weight_rounding), str(Cause.decay_rounding)
_OF_TEXTS = ("was_well", "resting", "held")  # parts of the state
_SAID_TWICE = 2  # forecasts in a row that say the same, till it is told
_FOR_GOOD = 3  # windows with a learning rate of 0, from which on it is no warm-up and no last window


class Alerts:
    """Turns reports into alerts. `clock` returns seconds since the epoch."""

    def __init__(self, thresholds: Thresholds, clock: Callable[[], float] = time.time) -> None:
        self._limits, self._clock = thresholds, clock
        self.is_logging = True  # False: another rank, which has the same reports, logs them
        self._episodes: dict[str, Episode] = {}
        self._keys = Keys()
        self._was_well: Mask = np.zeros(
            0, bool
        )  # keys that have been well: only of these it is news that they came to rest
        self._resting: Mask = np.zeros(0, bool)  # keys that were idle in the window before
        self._sent: list[float] = []  # times of the alerts of the last hour
        self._held: set[str] = set()  # episodes whose news the budget held back since the last alert

    def update(self, report: Report, trainer: str = "torch", model: str = "") -> Report:
        """The report with its alerts, loudest first. They are logged too, by the logger "update_watch".

        Args:
            trainer: in whose words cures are told, a key of `cures.TRAINERS`.
            model: its name, where a process watches several.
        """
        now = self._clock()
        self._sent = [t for t in self._sent if now - _HOUR < t <= now]
        judged, keys = judged_of(report), self._keys
        found = find(report, judged, keys)
        rest()
        self._was_well, self._resting = keys.grown(self._was_well), keys.grown(self._resting)
        bad = self._without_old_rest(found.bad)
        # what loses the updates loses the decay too, and has the same cure: one story
        decaying = bad.pop(_DECAY, None) if _WEIGHTS in bad else None
        self._was_well |= found.well
        trained = judged.numel(judged.trainable) or 1
        news: list[tuple[Level, str, str, Members | None, float]] = []
        for name in unhurried({**self._episodes, **bad}):
            members = bad.get(name)
            episode = self._episodes.setdefault(name, Episode())
            episode.take_in(members, found.well, keys)
            share = 0.0 if members is None else judged.numel(np.unique(members.places)) / trained
            event = episode.news(members, share)
            if name == AHEAD and members is None:
                episode.patience = 0  # it must be said twice in a row
            if event == GREW and name == _WEIGHTS and share < 1 and self._was_foretold():
                continue  # until it has all of the model
            if event and not self._must_wait(name, episode, event, members, now):
                level = Level.info if members is None else level_of(members)
                news.append((level, event, name, members, share))
        news.sort(key=lambda item: (_LOUDEST_FIRST.index(item[0]), -item[4]))
        alerts = []
        for level, event, name, members, share in news:
            if len(self._sent) >= self._budget(level):
                self._held.add(name)
                continue
            self._sent.append(now)
            self._held.discard(name)
            count = self._episodes[name].told_members
            self._episodes[name].tell(event, members, share, now)
            alert = alert_of(event, name, level, members, report, judged, count, self._limits, trainer)
            if name == _WEIGHTS and members is not None and decaying is not None:
                alert = with_decay(alert, len(decaying))
            alerts.append(alert)
        if alerts and self._held:
            held, self._held = self._held, set()
            note = f"\n{plural(len(held), 'other change')} held back: {self._limits.alerts_per_hour} alerts an hour at most."
            alerts[-1] = dataclasses.replace(alerts[-1], text=alerts[-1].text + note)
        self._episodes = {
            name: e for name, e in self._episodes.items() if e.is_open or e.count or e.over_at > -math.inf
        }
        alerts = [dataclasses.replace(alert, model=model) for alert in alerts] if model else alerts
        of = f" of {model}" if model else ""
        for alert in alerts if self.is_logging else ():
            with above_progress_bars():
                logging.getLogger("update_watch").log(
                    _LOGGING[alert.level],
                    "update-watch, step %d%s: %s\n%s",
                    alert.step,
                    of,
                    alert.title,
                    head_of(alert.text),
                )
        return changed(report, alerts=tuple(alerts))

    def _without_old_rest(self, bad: dict[str, Members]) -> dict[str, Members]:
        """Of what is idle, only what was well before and has been idle for two windows; nothing where nothing trains."""
        resting = np.zeros_like(self._resting)
        news: dict[str, Members] = {}
        for name, members in bad.items():
            is_idle = members.health == IDLE
            resting[members.keys[is_idle]] = True
            if name != NOTHING_TRAINS and is_idle.any():
                is_news = self._was_well[members.keys] & self._resting[members.keys] & (NOTHING_TRAINS not in bad)
                members = members.taken(~is_idle | (members.level != INFO) | is_news)
            if len(members):
                news[name] = members
        self._resting = resting
        return news

    def _was_foretold(self) -> bool:
        return AHEAD in self._episodes and self._episodes[AHEAD].is_open

    def _must_wait(self, name: str, episode: Episode, event: str, members: Members | None, now: float) -> bool:
        if event != BEGAN:
            return name == AHEAD and event != OVER  # more of it is told when it has come
        episode.patience += 1
        if name == AHEAD and episode.patience < _SAID_TWICE:
            return True
        if name == NOTHING_TRAINS and members is not None and episode.patience < _FOR_GOOD:
            if members.cause[0] == CAUSE_CODES[Cause.zero_learning_rate]:
                return True
        # a time to come is of a clock that was set back since
        return 0 <= now - episode.over_at < self._limits.alert_cooldown

    def _budget(self, level: Level) -> int:
        per_hour = self._limits.alerts_per_hour
        return per_hour if level is Level.error else per_hour - per_hour // 4

    # --- resume ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain data (str, int, float, list, dict), safe to load weights-only."""
        return {
            "version": _VERSION,
            "episodes": {name: episode.to_plain(self._keys) for name, episode in self._episodes.items()},
            "was_well": self._keys.texts(self._was_well),
            "resting": self._keys.texts(self._resting),
            "sent": list(self._sent),
            "held": sorted(self._held),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, so that nothing is told twice. Entries that cannot be read are dropped.

        Raises:
            TypeError, ValueError: `state` as a whole is not such data; nothing is changed then.
        """
        parts = {"episodes": Mapping, "was_well": list, "resting": list, "sent": list, "held": list}
        check_state("Alerts", state, _VERSION, parts)
        episodes, dropped, keys = {}, 0, Keys()
        for name, data in state["episodes"].items():
            try:
                episodes[str(name)] = Episode.from_plain(data, keys)
            except (KeyError, TypeError, ValueError):
                dropped += 1
        if dropped:
            logging.getLogger("update_watch").warning(
                "Alerts.load_state_dict: %s cannot be read and may be told again.", plural(dropped, "episode")
            )
        self._episodes, self._keys = episodes, keys
        was_well, resting, held = (
            [v for v in state[part] if isinstance(v, str)] for part in parts if part in _OF_TEXTS
        )
        self._was_well, self._resting = (keys.mask(keys.numbers(texts)) for texts in (was_well, resting))
        self._held = set(held)
        self._sent = [float(v) for v in state["sent"] if _is_time(v)]


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
