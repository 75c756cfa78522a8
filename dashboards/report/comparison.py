"""Runs side by side: what differs between them, as the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from update_watch.dashboards.report.first_screen import FirstScreen, formats, parameters
from update_watch.dashboards.report.history import History
from update_watch.dashboards.verdict import lr_words
from update_watch.naming import model_words, plural_of
from update_watch.report import SEVERITY, Health

_UNWELL = SEVERITY.index(Health.stalling)
_SETTINGS = 24  # of what the user said about the runs
_LONG = 60


class Row(NamedTuple):
    label: str
    values: tuple[str, ...]  # one per run
    differs: bool


def compare(histories: Sequence[History], screens: Sequence[FirstScreen]) -> tuple[Row, ...]:
    """Numbers first, then kinds, then settings; what differs before what does not, within settings."""
    rows = [
        _row("arrived", [screen.arrived or "–" for screen in screens]),
        _row("learning rate now", [_rate(h.last.run.lr) for h in histories]),
        _row("highest learning rate", [_rate(_peak(h)) for h in histories]),
        _row("optimizer", [str(h.run.get("optimizer", "–")) for h in histories]),
        _row("formats", [formats(h.last) for h in histories]),
        _row("parameters", [parameters(sum(h.last.table.numel)) for h in histories]),
        _row("steps", [f"{h.last_step:,}" for h in histories]),
        *_families(histories),
    ]
    return tuple(rows + sorted(_settings(histories), key=lambda row: not row.differs))


def _row(label: str, values: Sequence[str]) -> Row:
    return Row(label, tuple(values), len(set(values)) > 1)


def _families(histories: Sequence[History]) -> list[Row]:
    """Of each family of tensors, how many do not get their updates."""
    counts: list[dict[str, list[int]]] = []
    for history in histories:
        table, unwell = history.last.table, history.last.tensors.health <= _UNWELL
        words_of = model_words(table.name, table.shape)
        sick, all_of = (
            np.bincount(f, minlength=len(words_of.families)).tolist()
            for f in (words_of.family_P[unwell], words_of.family_P)
        )
        counts.append({word: [sick[k], all_of[k]] for k, word in enumerate(words_of.families)})
    words = dict.fromkeys(word for found in counts for word in found)
    return [
        _row(
            f"{plural_of(word)} that lose updates",
            [f"{c[word][0]:,} of {c[word][1]:,}" if word in c else "–" for c in counts],
        )
        for word in words
    ]


def _settings(histories: Sequence[History]) -> list[Row]:
    """What the journals say of the runs, as far as it is a word or a number."""
    shown = {"name", "optimizer", "trainer", "is_demo"}
    keys = dict.fromkeys(
        key for h in histories for key, value in h.run.items() if _is_plain(value) and key not in shown
    )
    return [_row(key, [_text(h.run.get(key)) for h in histories]) for key in list(keys)[:_SETTINGS]]


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool)) and len(str(value)) <= _LONG


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _peak(history: History) -> float:
    rates = history.of_run("lr")
    return max((rate for rate in rates.tolist() if not math.isnan(rate)), default=math.nan)


def _rate(rate: float) -> str:
    return "–" if math.isnan(rate) else lr_words(rate) if rate else "0"
