"""What a watch remembers between windows, as plain data: for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from update_watch.judge.alerts import Alerts
from update_watch.judge.diagnosis import Diagnosis
from update_watch.judge.history import check_state

_VERSION = 1


def save(step: int, diagnosis: Diagnosis, alerts: Alerts) -> dict[str, Any]:
    """Data that is safe to load weights-only."""
    return {
        "version": _VERSION,
        "step": step,
        "diagnosis": diagnosis.state_dict(),
        "alerts": alerts.state_dict(),
    }


def check(state: Any) -> None:
    """Raise TypeError or ValueError for what `save` has not returned."""
    if not isinstance(state, Mapping) or state.get("version") != _VERSION:
        version = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"Watch.load_state_dict: version {version!r} cannot be read, {_VERSION} is expected; "
            "leave the state out to start the watch's memory anew"
        )
    check_state("Watch", state, _VERSION, {"diagnosis": Mapping, "alerts": Mapping, "step": int})
    if isinstance(state["step"], bool) or state["step"] < 0:
        raise ValueError(f"Watch.load_state_dict: step={state['step']!r} is not a step; pass what state_dict() gave")


def load(state: Mapping[str, Any], diagnosis: Diagnosis, alerts: Alerts) -> int:
    """Put all of it back, or nothing; returns the step. Raises TypeError or ValueError for what cannot be read."""
    before = alerts.state_dict()
    alerts.load_state_dict(state["alerts"])
    try:
        diagnosis.load_state_dict(state["diagnosis"])
    except (TypeError, ValueError):
        alerts.load_state_dict(before)
        raise
    return int(state["step"])
