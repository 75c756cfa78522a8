"""The model under watch: its tensors by name, the optimizers that step them, and a window of all that was measured."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from itertools import chain, count
from typing import Any

import torch
from torch.optim import Optimizer

from update_watch.measure import ledger_plan
from update_watch.measure.accumulators.averages import Averages
from update_watch.measure.accumulators.gradient_accumulation import AccumulationWindow
from update_watch.measure.accumulators.reference_states import ShadowWindow
from update_watch.measure.accumulators.replicas import Checksums, ChecksumWindow
from update_watch.measure.device import joint_reads
from update_watch.measure.device.streams import StepStreams
from update_watch.measure.device.turns import turns_of_optimizers
from update_watch.measure.identity.belonging import Belonging
from update_watch.measure.identity.names import members_of
from update_watch.measure.identity.optimizer_parts import Parts
from update_watch.measure.ledger.ledger import Ledger
from update_watch.measure.ledger.sheet import Line, SheetWindow
from update_watch.measure.plain_torch import PlainTorch
from update_watch.measure.transfer import Batch
from update_watch.measure.watched_optimizer import Watched
from update_watch.measure.window_evidence import Window

_QUIET = 2  # windows without a step, after which an optimizer whose tensors others step is let go of
_REMADE = 8  # optimizers of the same tensors, one after the other, of which older ones are let go of at once
Key = tuple[int, int]  # id of an optimizer, part of it


class WatchedModel:
    """Everything one watch measures."""

    def __init__(
        self,
        model: Any,
        samples: int,
        rng: random.Random,
        averages: Mapping[str, Any],
        check_replicas: bool,
        window: int,
        in_panels: bool = False,
    ) -> None:
        """`in_panels`: of many tensors on a CPU windows may be of a part."""
        self._samples, self._rng, self._windows = samples, rng, (window, in_panels)
        self._belonging = Belonging(model)
        self._checksums = Checksums() if check_replicas else None
        self.found: dict[Any, Any] = {}  # what probes found out
        self._parts: dict[int, Parts] = {}  # id of an optimizer -> the parts it is stepped in
        self.watched: dict[Key, Watched] = {}  # all of them, by optimizer and part
        self._lead: Key | None = None  # steps with every step of the run
        self._handles: dict[int, Any] = {}
        self._ledger = Ledger(random.Random(rng.random()))
        self._is_ledger_old = True  # since optimizers came, went or answer for other tensors
        self.streams = StepStreams()
        self.is_replaying = False  # of a CUDA graph that holds steps
        plain = PlainTorch()
        with plain, plain:
            self._averages = Averages(averages, self._belonging.named.pairs, samples, rng)

    # --- which optimizers ------------------------------------------------------------------------

    def adopts(self, optimizer: Optimizer, outside: Sequence[Optimizer] = ()) -> bool | None:
        """Whether an optimizer steps this model's tensors or masters of them; None: that cannot be told yet.

        `outside`: those within whose steps it steps.
        """
        return id(optimizer) in self._parts or self._belonging.is_ours(optimizer, self._stepped(outside), self.step)

    def _stepped(self, but: Sequence[Optimizer] = ()) -> frozenset[int]:
        """Ids of all tensors that optimizers step, but for those of some."""
        outer = set(map(id, but))
        return frozenset().union(*(watched.ids for key, watched in self.watched.items() if key[0] not in outer))

    def has(self, optimizer: Optimizer) -> bool:
        """Whether it is watched."""
        return id(optimizer) in self._parts

    def add(self, optimizer: Optimizer, wrapper: Any, outside: Sequence[Optimizer] = ()) -> None:
        """Plan for an optimizer, which came in `wrapper`; one that is known stays as it is."""
        if id(optimizer) in self._parts:
            return
        self._belonging.claim(optimizer, wrapper, self._stepped(outside), self.step)
        groups = optimizer.param_groups
        index = next(i for i in count() if all(i != other.index for other in self.watched.values()))
        earlier = self._earlier(set(map(id, members_of(optimizer))))
        names, pieces = self._belonging.names, self._belonging.pieces

        def make(part: int, found: dict[Any, Any]) -> Watched:
            plain = PlainTorch(optimizer)
            with plain, plain:
                settings = self._samples, self._rng, found, pieces, part, groups, *self._windows
                watched = Watched(optimizer, index, names, *settings)
            key = id(optimizer), part
            if part == 0:
                watched.earlier, watched.earlier_in_window = earlier
            if self._lead is None or not self.watched[self._lead].ids.isdisjoint(watched.ids):
                self._lead = key
            self.watched[key] = watched
            self._is_ledger_old = True
            self._share_turns()
            return watched

        parts = self._parts[id(optimizer)] = Parts(make(0, self.found), make)
        # a wrapper that is an Optimizer without having been made as one has no such hooks
        with suppress(AttributeError):
            hook = optimizer.register_load_state_dict_post_hook(lambda _: parts.read_counters())
            self._handles[id(optimizer)] = hook

    def _share_turns(self) -> None:
        """Let many optimizers take turns, as the tensors of one do."""
        every = self.watched.values()
        distinct = {watched.ids: len(watched.rows) for watched in every}  # those of the same tensors step one by one
        turns, shadowed = turns_of_optimizers(len(distinct), sum(distinct.values()))
        for i, watched in enumerate(every):
            watched.turns, watched.is_shadowed = turns, i % shadowed == 0

    def _earlier(self, ids: set[int]) -> tuple[int, int]:
        """Steps of the run and of the open window before an optimizer's first one.

        One that steps the tensors of another goes on where that is; one that steps others makes the same step with it.
        """
        others = [one for one in self.watched.values() if not ids.isdisjoint(one.ids)]
        if others:
            return max(one.step for one in others), max(one.window_step for one in others)
        return max(self.step - 1, 0), max(self.window_steps - 1, 0)

    def renew(self) -> None:
        """Begin a new window and throw away the one that is open; may be interrupted, and is called again then."""
        for watched in self.watched.values():
            watched.renew()
        self._averages.close_window(Batch(), goes_on=False)  # and nobody reads it
        self._ledger, self._is_ledger_old = Ledger(random.Random(self._rng.random())), True

    def clear(self, for_good: bool = False) -> None:
        """Let go of all optimizers; `for_good`: of the model and its averages too, whose memory may be wanted elsewhere."""
        while self._handles:
            self._handles.popitem()[1].remove()
        for watched in self.watched.values():
            watched.accumulation.remove()
        self.watched.clear()
        for key in self._parts:
            self._belonging.disown(key)
        self._parts.clear()
        self._lead, self._is_ledger_old = None, True
        self._ledger.plan(())  # what happens from now on is not seen
        if for_good:
            nothing = Averages({}, [], self._samples, self._rng)
            self._belonging, self._averages, self._checksums = Belonging(()), nothing, None

    def release(self) -> list[Optimizer]:
        """Let go of the optimizers that have not stepped for some windows while others stepped all their tensors."""
        every = [(key, parts.all) for key, parts in self._parts.items()]
        quiet = [(key, all_parts) for key, all_parts in every if min([p.quiet_windows for p in all_parts]) >= _QUIET]
        stepped = {key for one in self.watched.values() if quiet and not one.quiet_windows for key in one.ids}
        gone = {key: parts[0].optimizer for key, parts in quiet if all([part.ids <= stepped for part in parts])}
        self._let_go(gone, stepped)
        return list(gone.values())

    def release_remade(self, optimizer: Optimizer) -> list[Optimizer]:
        """Let go of all but the latest of many optimizers that step exactly the tensors of this one."""
        ids = self._parts[id(optimizer)].all[0].ids
        alike = [parts for parts in self._parts.values() if parts.all[0].ids == ids]
        gone = [parts.all[0].optimizer for parts in alike[:-_REMADE]]
        self._let_go(map(id, gone), ids)
        return gone

    def _let_go(self, gone: Iterable[int], stepped: Set[int]) -> None:
        for key in gone:
            for part in self._parts.pop(key).all:
                part.accumulation.remove()
                del self.watched[key, part.part]
                self._belonging.forget_masters(part.ids - stepped)
            if key in self._handles:
                self._handles.pop(key).remove()
            self._belonging.disown(key)
            self._is_ledger_old = True
            # its id may be another one's soon
            for known in [k for k in self.found if key in k]:
                del self.found[known]
        if self._lead not in self.watched:
            self._lead = next(reversed(self.watched), None)

    def stepping(self, optimizer: Optimizer, outside: Sequence[Optimizer] = ()) -> Watched | None:
        """The part of an optimizer that is about to be stepped; None for one that is not watched.

        `outside`: those within whose steps it steps. What both hold is judged by the inner one's rule.
        """
        parts = self._parts.get(id(optimizer))
        current = None if parts is None else parts.current(optimizer)
        if current is not None:
            for outer in outside:
                for part in self._parts[id(outer)].all if id(outer) in self._parts else ():
                    self._is_ledger_old |= part.exclude(self._belonging.covered_by(current.ids))
        return current

    def only(self) -> Watched | None:
        """The part of an optimizer that is watched, where there is no other and no average is read just now."""
        return next(iter(self.watched.values())) if len(self.watched) == 1 and not self._averages.are_read else None

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that are watched, once for each part."""
        return [watched.optimizer for watched in self.watched.values()]

    # --- which tensors ---------------------------------------------------------------------------

    def _look_at_identity(self, step: int) -> None:
        """At the end of a window: what has left the model since a step, and which copies are no masters."""
        for key in self._belonging.supposed():
            parts = self._parts[key].all
            each = zip(*((part.ids, part.fed(), part.zeros()) for part in parts), strict=True)
            doubtful = self._belonging.doubt(
                key, max(part.window_steps for part in parts), *(set().union(*found) for found in each)
            )
            for part in parts if doubtful else ():
                part.exclude(part.ids & doubtful)
        gone = self._belonging.refresh(step, self._stepped())
        if gone:
            for watched in self.watched.values():
                watched.exclude(gone)

    def _plan_ledger(self) -> None:
        is_old, self._is_ledger_old = self._is_ledger_old, False
        ledger_plan.plan(self._ledger, self._belonging, self.watched, is_old)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The model's; the same list as long as they are the same."""
        return self._belonging.named.tensors()

    def lines(self) -> list[Line]:
        """The model's tensors and their masters, for the ledger."""
        return ledger_plan.lines_of(self._belonging)

    # --- in the step -----------------------------------------------------------------------------

    def before(self, watched: Watched, outside: Sequence[Optimizer] = ()) -> Any:
        """Measure what is about to be stepped; the result is for `after`."""
        key = id(watched.optimizer), watched.part
        if key == self._lead:
            self._averages.look()
        if self._is_ledger_old and (watched.steps or len(self.watched) == 1):  # else others may be met in this step
            self._plan_ledger()
        around = [one for one in self.watched if any(one[0] == id(outer) for outer in outside)]
        with joint_reads.joined():
            sheets = self._ledger.before(key, around, self.step + 1, key == self._lead)
            return watched.before(self.is_replaying), sheets

    def pass_by(self, watched: Watched) -> bool:
        """Let a step go by unseen. Returns whether something has changed that should be looked at."""
        key = id(watched.optimizer), watched.part
        self._ledger.miss(key, key == self._lead)
        if key == self._lead:
            self._averages.pass_by()
        return watched.pass_by()

    def after(self, watched: Watched, seen: Any) -> bool:
        """Measure what was stored. Returns as `pass_by`."""
        measured, sheets = seen
        with joint_reads.joined():
            self._ledger.after(sheets)
            has_changed = watched.after(measured)
        self.streams.note(watched.devices)
        return has_changed

    # --- windows -----------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Of the run, as far as it was seen."""
        return max((watched.step for watched in self.watched.values()), default=0)

    @property
    def window_steps(self) -> int:
        """Steps in the window that is open."""
        return max((watched.window_step for watched in self.watched.values()), default=0)

    def is_full(self, watched: Watched, window: int) -> bool:
        """Whether the window ends with the step `watched` has taken: optimizers that step in turn end theirs together."""
        return watched.window_step >= window and all(
            other.window_step != window - 1 for other in self.watched.values() if not other.quiet_windows
        )

    def close_window(
        self, step: int, seconds: float, observed: int | None, cost_share: float | None, is_full: bool
    ) -> Window:
        """The window's sums, on their way to the host, and a new window.

        `seconds` the watch took in it on this thread, `observed` steps were looked at, `cost_share`: see `Report`. `is_full`: in
        the new one all tensors are to be looked at, however many there are.
        """
        steps = self.window_steps
        self._lead = max(self.watched, key=lambda key: self.watched[key].window_steps, default=None)
        self._look_at_identity(step - steps)
        parts: list[tuple[list[Any], ...]] = [([], [], [], [])]
        shadows: list[ShadowWindow | None] = []
        accumulations: list[AccumulationWindow | None] = []
        batch = Batch()
        for key, optimizer_parts in self._parts.items():
            for unused in optimizer_parts.forget_unused():
                unused.accumulation.remove()
                del self.watched[key, unused.part]
                self._is_ledger_old = True
        if self._lead not in self.watched:
            self._lead = next(iter(self.watched), None)
        with torch.no_grad():
            for watched in self.watched.values():
                parts.append(watched.close_window(batch, is_full))
                shadows.append(watched.shadow.close_window(batch))
                accumulations.append(watched.accumulation.close_window(batch))
            averages = tuple(self._averages.close_window(batch))
            checksums: tuple[ChecksumWindow, ...] = ()
            if self._checksums is not None:
                rows = [row for watched in self.watched.values() for row in watched.rows]
                checksums = tuple(self._checksums.take([row for row in rows if row.piece is None], batch))
            ledger = self._ledger.close_window(batch)
            batch.send()
        self._plan_ledger()
        cohorts, others, skipped, resting = (list(chain.from_iterable(kind)) for kind in zip(*parts, strict=True))
        others += self._belonging.unheld(frozenset().union(*(one.row_ids for one in self.watched.values())), steps)
        return Window(
            step,
            steps,
            tuple(cohorts),
            tuple(others),
            self._belonging.named.order(),
            1e3 * seconds / steps if steps else None,
            tuple(skipped),
            averages,
            tuple([shadow for shadow in shadows if shadow is not None]),
            tuple([accumulation for accumulation in accumulations if accumulation is not None]),
            checksums,
            observed,
            cost_share,
            ledger,
            tuple(resting),
        )

    def silent_window(self, reason: str, ledger: tuple[SheetWindow, ...]) -> Window:
        """A window without a step. `reason`: what is said of its tensors."""
        return Window(
            self.step, 0, (), self._belonging.unstepped(reason), self._belonging.named.order(), None, ledger=ledger
        )
