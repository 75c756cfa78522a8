"""What rounding in the optimizer states does to the updates: at a few elements the states are kept in FP32 as well.

A second moment that can only grow, a momentum that no longer decays, a step counter stuck at 256: every single step looks
right, since it starts from the states that are stored. Only a copy that was never rounded shows how far they have gone.
So at some elements of at most 8 tensors the states are kept in FP32 too and advanced by the optimizer's own rule, at
every step, with the real gradients. At every sixteenth step the same replay starts from the stored states as well:

    state factor = sum <from stored states, from FP32 states> / sum <from FP32 states, from FP32 states>

says by what factor the updates differ. The stored weight is taken anew at each step: only the update's size matters.

The copy begins with the states as they are stored when it begins, and counts the steps it has run since. When somebody
else writes to the states (a checkpoint is loaded) it ends and a new one begins, at most once per window. Where all states
are stored in FP32 there is none, and nothing is spent.
"""

from __future__ import annotations

import logging
import math
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.measure.accumulators.reference_states import FullStates, ShadowWindow, form, short_states
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import local
from update_watch.measure.transfer import Batch
from update_watch.replay.absent import ReplayError
from update_watch.replay.synthetic_parameter import SyntheticParameter, undisturbed
from update_watch.replay.twin import Twin

logger = logging.getLogger("update_watch")

_ROWS = 8
_SPANS = 2  # with and without weight decay, say: each costs the operators of one update
_LONGEST_PAUSE = 64  # windows
_SAME = 1e-4  # states that do not depend on the weight differ by rounding alone


class Shadow:
    """The FP32 copy of one optimizer's states, as long as there is one. `before` and `after` surround every step."""

    def __init__(self, optimizer: Optimizer, twin: Twin | None, rng: random.Random, found: dict[Any, Any]) -> None:
        self._optimizer, self._twin, self._rng, self._found = optimizer, twin, rng, found
        self._copy: FullStates | None = None
        self._is_resting = False
        self._found_last: ShadowWindow | None = None
        self._may_begin = True
        self._rest, self._pause = 0, 1  # windows until the states are looked at again, where there was nothing to copy

    def rest(self, is_resting: bool) -> bool:
        """Steps pass unseen from now on, or again all are seen. A copy cannot miss one: it ends, what it found stays."""
        if is_resting and self._copy is not None:
            self._copy = None
        self._is_resting = is_resting
        return is_resting

    def before(self) -> None:
        """Advance by this step; call when gradients are final and the rule has not run."""
        if self._copy is None:
            return
        try:
            if self._copy.is_disturbed():
                self._copy = None
            else:
                self._copy.advance()
        except Exception as error:  # noqa: BLE001  a rule that does not run on copies at every step
            self._give_up(error)

    def after(self, rows: list[Row]) -> None:
        """Call just after the rule has run. A copy begins with the states it has left, if some are short of FP32."""
        if self._twin is None or (self._copy is None and not self._may_begin):
            return
        try:
            if self._copy is not None:
                self._copy.mark()
            elif any(self._optimizer.state.get(row.param) for row in rows):
                self._may_begin = False  # once per window
                self._copy = _begin(self._optimizer, self._twin, rows, self._rng, self._found)
                if self._copy is None:
                    self._rest, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        except Exception as error:  # noqa: BLE001  as above
            self._give_up(error)

    def replan(self) -> None:
        """Parameters were added or removed: go on only if those looked at are where they were."""
        groups = self._optimizer.param_groups
        for row in self._copy.rows if self._copy is not None else ():
            members = groups[row.group]["params"] if row.group < len(groups) else ()
            if not any(row.param is member for member in members):
                self._copy = None
                return

    def close_window(self, batch: Batch) -> ShadowWindow | None:
        """Hand the sums to `batch` and start new ones."""
        self._rest -= 1
        self._may_begin = self._rest <= 0
        if self._is_resting:
            return self._found_last
        self._found_last = None if self._copy is None else self._copy.close(batch)
        return self._found_last

    def _give_up(self, error: Exception) -> None:
        logger.debug("update-watch: no state factor for %s: %r", type(self._optimizer).__name__, error)
        self._copy = self._twin = None


class StateFactor(NamedTuple):
    """What a window has shown of one tensor."""

    value: float | None
    error: float | None  # standard error, from its spread over elements
    steps: int  # that the FP32 copy has run


def read(window: ShadowWindow) -> dict[str, StateFactor]:
    """State factors by tensor. Runs on the background thread."""
    found = {}
    for name, (dot, want, dot2, dot_want, want2) in zip(window.names, window.sums.wait().reshape(-1, 5), strict=True):
        value = error = None
        if want > 0:
            value = float(dot / want)
            error = math.sqrt(max(float(dot2 - 2 * value * dot_want + value**2 * want2), 0.0)) / float(want)
        found[name] = StateFactor(value, error, window.steps)
    return found


# --- choosing -----------------------------------------------------------------------------------------


def _begin(
    optimizer: Optimizer, twin: Twin, rows: list[Row], rng: random.Random, found: dict[Any, Any]
) -> FullStates | None:
    """A copy of states of some rows that have them below FP32; None when there are none."""
    alike: list[tuple[Any, list[Row]]] = []
    for row in rows:
        state = optimizer.state.get(row.param)
        if state and short_states(row, state):
            key = (*form(row, state), local(row.param).dtype, row.step_likeness(state))
            likes = next((likes for other, likes in alike if other == key), None)
            if likes is None:
                alike.append((key, [row]))
            else:
                likes.append(row)
    alike.sort(key=lambda item: -len(item[1]))
    chosen: list[list[Row]] = []
    for _, likes in alike:
        if len(chosen) < _SPANS and not _dependence(optimizer, likes[0], found).follow:
            first = chosen[0][0] if chosen else likes[0]
            if form(first, optimizer.state[first.param]) == form(likes[0], optimizer.state[likes[0].param]):
                chosen.append(likes)
    if not chosen:
        return None
    spans = []
    left = _ROWS
    for i, likes in enumerate(reversed(chosen)):  # the smaller one first: what it does not need, the other may have
        count = min(len(likes), left // (len(chosen) - i))
        left -= count
        spans.append([likes[k * len(likes) // count] for k in range(count)])
    needs_weight = any(_dependence(optimizer, likes[0], found).decay for likes in chosen)
    return FullStates(optimizer, twin, spans, rng, needs_weight)


class _Dependence(NamedTuple):
    """How the states of a group depend on the weight."""

    follow: bool  # without decay too, as an average of the weights: in FP32 it would leave a weight that stalls behind
    decay: bool  # through the decay, which is part of the gradient: then the weight is needed at every step


def _dependence(optimizer: Optimizer, row: Row, found: dict[Any, Any]) -> _Dependence:
    """Found out on synthetic weights; once for all parameters alike."""
    if row.rule.scaled is not None:
        return _Dependence(follow=False, decay=True)  # the trial has shown that the weight acts through decay alone
    ndim = min(row.param.dim(), 2)
    key = ("dependence", id(optimizer), row.group, ndim, row.scheme.addend)
    if key not in found:
        trial = optimizer, row.group, (48,) if ndim < 2 else (6, 8), row.scheme.addend
        found[key] = _Dependence(*(_differ_with_weight(*trial, decay) for decay in (0.0, 1.0)))
    dependence: _Dependence = found[key]
    return dependence


def _differ_with_weight(optimizer: Optimizer, group: int, shape: tuple[int, ...], carrier: str, decay: float) -> bool:
    """Whether a state, other than the remainders of the weight in `carrier`, differs where the weight does."""
    start = torch.linspace(-1, 1, 48, device="cpu").reshape(shape)
    grad = torch.linspace(0.1, 1, 48, device="cpu").reshape(shape)
    ends: list[dict[str, Tensor]] = []
    try:
        quiet = undisturbed(optimizer, torch.device("cpu"))
        with quiet, quiet:
            for shift in (0.0, 0.5):
                trial = SyntheticParameter(optimizer, group, start + shift, torch.float32, weight_decay=decay)
                for scale in (1.0, -0.5, 0.25):
                    trial.step(scale * grad)
                states = trial.state.items()
                ends.append({k: v.double() for k, v in states if isinstance(v, Tensor) and k != carrier})
    except ReplayError:
        return True
    return any(not torch.allclose(ends[0][k], ends[1][k], rtol=_SAME, atol=1e-30) for k in ends[0])
