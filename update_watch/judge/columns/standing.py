"""What was found of a tensor's signal stands over windows that did not look at it: under a budget, or where the last is short.

Its gradient is as little known as its movement then, and what is pooled of earlier windows speaks of rounding alone: a
tensor without a gradient would be accused of what it loses of its momentum, and one that is frozen and yet moves be frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from update_watch.columns.evidence_columns import Columns
from update_watch.judge.advice import say
from update_watch.judge.columns.codes import CAUSE_CODES, CAUSES, FROZEN, HEALTHS, Mask, known
from update_watch.judge.columns.rests import Sorted, gradient_looks
from update_watch.judge.columns.verdicts import Verdicts
from update_watch.judge.no_signal import Verdict
from update_watch.judge.seen import Seen
from update_watch.report import Cause, Health

_SIGNALS = [CAUSE_CODES[cause] for cause in (Cause.requires_grad_off, Cause.zero_gradient, Cause.negligible_gradient)]
_AT_MOST = 8  # windows


class Standing:
    """Of tensors by name, the verdict of the last window that looked at them, and over how many it has stood."""

    def __init__(self) -> None:
        self._known: dict[str, _Found] = {}

    def take(self, columns: Columns, sorts: Sorted, but: Mask) -> dict[int, Verdict]:
        """Verdicts by place, of tensors that are neither at rest nor scored from here on. `but`: [n] not of these."""
        if not self._known:
            return {}
        is_off = sorts.cause == CAUSE_CODES[Cause.requires_grad_off]
        is_unseen = _is_unseen(columns)
        is_open = _is_unseen(columns, or_still=True) & (columns.column("finite") != 0)
        is_open &= columns.column("replicas_differ") == 0
        is_open &= (~sorts.rests | is_off) & ~but
        names, requires = columns.raw("name"), columns.column("requires_grad") != 0
        taken: dict[int, Verdict] = {}
        for place in np.flatnonzero(is_open).tolist():
            found = self._known.get(names[place])
            if found is None or not (is_unseen[place] or found.health is Health.idle):
                continue
            if found.windows >= _AT_MOST or (found.cause is Cause.requires_grad_off) == bool(requires[place]):
                del self._known[names[place]]
                continue
            self._known[names[place]] = found._replace(windows=found.windows + 1)
            sorts.rests[place] = sorts.scored[place] = False
            said = found.said if isinstance(found.said, str) else say(found.cause, found.said)
            taken[place] = found.health, found.cause, said
        return taken

    def keep(self, columns: Columns, found: Verdicts, texts: Mapping[int, str]) -> None:
        """Remember what this window found of those that it looked at."""
        names, is_seen = columns.raw("name"), ~_is_unseen(columns, or_still=True)
        if self._known:
            for place in np.flatnonzero(is_seen).tolist():
                self._known.pop(names[place], None)
        # what is frozen and at rest is so whether one looks or not
        is_told = is_seen & np.isin(found.cause, _SIGNALS) & (found.health != FROZEN)
        looks, steps = gradient_looks(columns), columns.column("steps")
        for place in np.flatnonzero(is_told).tolist():
            said = texts.get(place) or Seen(steps=int(steps[place]), looks=int(looks[place]))
            self._known[names[place]] = _Found(HEALTHS[found.health[place]], CAUSES[found.cause[place]], said, 0)


class _Found(NamedTuple):
    health: Health
    cause: Cause
    said: str | Seen  # the sentence, or what it is made of
    windows: int  # over which it has stood


def _is_unseen(columns: Columns, or_still: bool = False) -> Mask:
    """[n] stepped, and nothing is known of what came of it; `or_still`: or no more than that nothing of it moved."""
    column = columns.column
    found: Mask = (column("steps") > 0) & (column("measured_steps") == 0) & (column("gradient_looks") == 0)
    found &= np.isnan(known(column("zero_gradient_fraction")))
    for name in ("applied_ratio", "written_between", "moved", "changed_fraction"):
        values = known(column(name))
        found &= np.isnan(values) | (or_still & (values == 0))
    return found
