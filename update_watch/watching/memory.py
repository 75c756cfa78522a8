"""What a watch remembers between windows, as plain data: for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from update_watch.judge.alerts import Alerts
from update_watch.judge.diagnosis import Diagnosis
from update_watch.judge.history import check_state
from update_watch.worker import Worker

_VERSION = 1


class Remembering:
    """The part of a watch that is kept in checkpoints."""

    _judge: Worker
    _diagnosis: Diagnosis
    _alerts: Alerts
    _base_step: int

    @property
    def step(self) -> int:
        """The step reports are numbered by."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Plain data (safe to load weights-only): what verdicts and alerts remember between windows."""
        self._judge.wait(5.0)
        return {
            "version": _VERSION,
            "step": self.step,
            "diagnosis": self._diagnosis.state_dict(),
            "alerts": self._alerts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            TypeError, ValueError: data this version cannot read; nothing is changed then.
        """
        _check(state)
        self._judge.wait(5.0)
        before = self._alerts.state_dict()
        self._alerts.load_state_dict(state["alerts"])
        try:
            self._diagnosis.load_state_dict(state["diagnosis"])
        except (TypeError, ValueError):
            self._alerts.load_state_dict(before)  # all or nothing
            raise
        self._base_step = int(state["step"])


def _check(state: Any) -> None:
    """Raise TypeError or ValueError for what `state_dict` has not returned."""
    if not isinstance(state, Mapping) or state.get("version") != _VERSION:
        version = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"Watch.load_state_dict: version {version!r} cannot be read, {_VERSION} is expected; "
            "leave the state out to start the watch's memory anew"
        )
    check_state("Watch", state, _VERSION, {"diagnosis": Mapping, "alerts": Mapping, "step": int})
    if isinstance(state["step"], bool) or state["step"] < 0:
        raise ValueError(f"Watch.load_state_dict: step={state['step']!r} is not a step; pass what state_dict() gave")
