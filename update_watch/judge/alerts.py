"""Alerts: told once, on a change of state, few, and with what a person needs to act.

What was told is remembered per tensor (and per accumulator, as "name [accumulator]"). A window's news is where the
state now differs from what was told. News that the cooldown or the budget holds back stays news: it is told later if it
is still true then, and forgotten if it is not. Idle, frozen and unknown are no news, good or bad.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from update_watch.judge.accumulators import alert_level
from update_watch.judge.advice import finding
from update_watch.judge.history import check_state
from update_watch.judge.run_summary import worst_first
from update_watch.report import Alert, Cause, Health, Level, Report
from update_watch.thresholds import Thresholds
from update_watch.wording import plural

_VERSION = 1
_HOUR = 3600.0
_LEVELS = {
    Health.broken: Level.error,
    Health.stalled: Level.error,
    Health.stalling: Level.warn,
    Health.healthy: Level.info,
}
_LOUDNESS = {Level.info: 0, Level.warn: 1, Level.error: 2}
_LOGGING = {Level.info: logging.INFO, Level.warn: logging.WARNING, Level.error: logging.ERROR}


@dataclasses.dataclass(frozen=True)
class _State:
    """The state of one tensor or accumulator now; `level` INFO means well."""

    key: str
    tensor: str
    part: str  # the accumulator; "" for the tensor itself
    level: Level
    health: Health
    cause: Cause | None
    advice: str
    since: int | None


class Alerts:
    """Turns reports into alerts. `clock` returns seconds since the epoch."""

    def __init__(self, thresholds: Thresholds, clock: Callable[[], float] = time.time) -> None:
        self._limits, self._clock = thresholds, clock
        self.is_logging = True  # False: another rank, which has the same reports, logs them
        self._told: dict[str, Level] = {}  # WARN or ERROR, by key
        self._told_at: dict[str, float] = {}  # when a key was last told as WARN or ERROR
        self._sent: list[float] = []  # times of the alerts of the last hour
        self._held: set[str] = set()  # keys whose news the budget held back since the last alert

    def update(self, report: Report) -> Report:
        """The report with its alerts, loudest first. They are logged too, by the logger "update_watch"."""
        now = self._clock()
        self._sent = [t for t in self._sent if now - _HOUR < t <= now]
        news: dict[Level, list[_State]] = {Level.error: [], Level.warn: [], Level.info: []}
        for state in _states(report):
            told = self._told.get(state.key)
            if state.level is Level.info:
                if told is not None:
                    news[Level.info].append(state)
            elif told is None or _LOUDNESS[state.level] > _LOUDNESS[told]:
                # a time to come is of a clock that was set back since
                is_cooling = 0 <= now - self._told_at.get(state.key, -math.inf) < self._limits.alert_cooldown
                if told is not None or not is_cooling:
                    news[state.level].append(state)
        sending = []
        for level, states in news.items():
            if states and len(self._sent) < self._budget(level):
                self._sent.append(now)
                sending.append((level, states))
            else:
                self._held.update(state.key for state in states)
        self._held -= {state.key for _, states in sending for state in states}
        alerts = [self._alert(level, states, report) for level, states in sending]
        for level, states in sending:
            for state in states:
                if level is Level.info:
                    del self._told[state.key]
                else:
                    self._told[state.key], self._told_at[state.key] = level, now
        for alert in alerts if self.is_logging else ():
            text = "\n" + alert.text if "\n" in alert.text else " " + alert.text.removeprefix("- ")
            logging.getLogger("update_watch").log(_LOGGING[alert.level], "%s:%s", alert.title, text)
        return dataclasses.replace(report, alerts=tuple(alerts))

    def _budget(self, level: Level) -> int:
        per_hour = self._limits.alerts_per_hour
        return per_hour if level is Level.error else per_hour - per_hour // 4

    def _alert(self, level: Level, states: list[_State], report: Report) -> Alert:
        limit = self._limits.alert_tensors
        firsts = list({state.cause: state for state in reversed(states)}.values())[::-1]
        states = firsts + [state for state in states if state not in firsts]
        # the cure once per cause, the numbers of every tensor
        lines = [f"- {state.key}: {_say(state, i >= len(firsts))}" for i, state in enumerate(states[:limit])]
        if len(states) > limit:
            rest = [state.key for state in states[limit : 2 * limit]]
            dots = ", ..." if len(states) > 2 * limit else ""
            lines.append(f"and {len(states) - limit} more: {', '.join(rest)}{dots}")
        held, self._held = self._held, set()
        if held:
            lines.append(
                f"{plural(len(held), 'other change')} of state {'was' if len(held) == 1 else 'were'} held back by the"
                f" budget of {plural(self._limits.alerts_per_hour, 'alert')} per hour."
            )
        causes = Counter(state.cause for state in states if state.cause is not None)
        return Alert(
            step=report.step,
            level=level,
            title=_title(level, states, len(report.tensors)),
            text="\n".join(lines),
            tensors=tuple(dict.fromkeys(state.tensor for state in states)),
            cause=causes.most_common(1)[0][0] if causes else None,
        )

    # --- resume ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain data (str, int, float, list, dict), safe to load weights-only."""
        return {
            "version": _VERSION,
            "told": {key: level.value for key, level in self._told.items()},
            "told_at": dict(self._told_at),
            "sent": list(self._sent),
            "held": sorted(self._held),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, so that nothing is told twice. Entries that cannot be read are dropped.

        Raises:
            TypeError, ValueError: `state` as a whole is not such data; nothing is changed then.
        """
        check_state("Alerts", state, _VERSION, {"told": Mapping, "told_at": Mapping, "sent": list, "held": list})
        levels = {level.value: level for level in (Level.warn, Level.error)}
        told = {str(key): levels[v] for key, v in state["told"].items() if isinstance(v, str) and v in levels}
        told_at = {str(key): float(v) for key, v in state["told_at"].items() if _is_time(v)}
        dropped = len(state["told"]) + len(state["told_at"]) - len(told) - len(told_at)
        if dropped:
            logging.getLogger("update_watch").warning(
                "Alerts.load_state_dict: %s cannot be read and may be told again.", plural(dropped, "value")
            )
        self._told, self._told_at = told, told_at
        self._sent = [float(v) for v in state["sent"] if _is_time(v)]
        self._held = {v for v in state["held"] if isinstance(v, str)}


def _states(report: Report) -> list[_State]:
    """The state of every tensor and accumulator that is something to tell or to compare with, worst first."""
    states = []
    for tensor in worst_first(report.tensors):
        level = _LEVELS.get(tensor.health)
        if level is not None:
            states.append(
                _State(
                    tensor.name, tensor.name, "", level, tensor.health, tensor.cause, tensor.advice, tensor.since_step
                )
            )
        for accumulator in tensor.accumulators.values():
            loud = alert_level(accumulator)
            if loud is None and accumulator.health is Health.healthy:
                loud = Level.info
            # the loss of a bad weight drowns what its states and decay lose beside it
            if loud is None or (
                loud is not Level.info and level in (Level.warn, Level.error) and _is_early(accumulator.cause)
            ):
                continue
            key = f"{tensor.name} [{accumulator.name}]"
            states.append(
                _State(
                    key,
                    tensor.name,
                    accumulator.name,
                    loud,
                    accumulator.health,
                    accumulator.cause,
                    accumulator.advice,
                    None,
                )
            )
    return states


def _is_early(cause: Cause | None) -> bool:
    return cause in (Cause.state_rounding, Cause.decay_rounding)


def _say(state: _State, is_cure_said: bool) -> str:
    if state.level is Level.info:
        return "healthy again."
    since = f"{state.health} since step {state.since}. " if state.since is not None else ""
    return f"{since}{finding(state.advice) if is_cure_said else state.advice}"


def _title(level: Level, states: list[_State], tensors: int) -> str:
    """Under 64 characters. Of the weights, if there are any: that an accumulator of a tensor stalls says less."""
    states = [state for state in states if not state.part] or states
    count = len({state.tensor for state in states})
    subject = f"{count} of {plural(tensors, 'tensor')}"
    parts = {state.part for state in states}
    if "" not in parts:
        subject = f"{parts.pop() if len(parts) == 1 else 'accumulators'} of {subject}"
    if level is Level.info:
        return _fit(f"{subject} recovered")
    healths = list(dict.fromkeys(str(state.health) for state in states))
    causes = {state.cause for state in states}
    why = f" ({states[0].cause})" if len(causes) == 1 else ""
    return _fit(f"{subject} {' or '.join(healths)}", why)


def _fit(text: str, more: str = "", limit: int = 63) -> str:
    text = text + more if len(text) + len(more) <= limit else text
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
