"""The model under watch: its tensors by name, the optimizers that step them, and a window of all that was measured."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from update_watch.evidence import TensorEvidence
from update_watch.measure.accumulators.averages import Averages
from update_watch.measure.accumulators.gradient_accumulation import AccumulationWindow
from update_watch.measure.accumulators.reference_states import ShadowWindow
from update_watch.measure.accumulators.replicas import Checksums
from update_watch.measure.device.streams import StepStreams
from update_watch.measure.identity import masters
from update_watch.measure.identity.names import named_tensors, names_of
from update_watch.measure.identity.optimizer_parts import Parts
from update_watch.measure.identity.partitions import Piece, wrappers
from update_watch.measure.plain_torch import PlainTorch
from update_watch.measure.transfer import Batch
from update_watch.measure.turns import turns_of_optimizers
from update_watch.measure.watched_optimizer import Watched, describe
from update_watch.measure.window_evidence import Window


class WatchedModel:
    """Everything one watch measures."""

    def __init__(
        self, model: Any, samples: int, rng: random.Random, averages: Mapping[str, Any], check_replicas: bool
    ) -> None:
        self._model, self._samples, self._rng = model, samples, rng
        self._named = named_tensors(model)
        self._names = names_of(self._named)
        self._checksums = Checksums() if check_replicas else None
        self.found: dict[Any, Any] = {}  # what probes found out
        self._instead: dict[int, str] = {}  # id of a parameter that no optimizer holds -> what is said of it
        self._pieces: dict[int, Sequence[Piece]] = {}  # id of a flat tensor that is stepped -> what lies in it
        self._parts: dict[int, Parts] = {}  # id of an optimizer -> the parts it is stepped in
        self.watched: dict[tuple[int, int], Watched] = {}  # all of them, by optimizer and part
        self._handles: list[Any] = []
        self.streams = StepStreams()
        self.is_replaying = False  # of a CUDA graph that holds steps
        with PlainTorch():
            self._averages = Averages(averages, self._named, samples, rng)

    # --- which optimizers ------------------------------------------------------------------------

    def add(self, optimizer: Optimizer, wrapper: Any) -> None:
        """Plan for an optimizer, which came in `wrapper`; one that is known stays as it is."""
        if id(optimizer) in self._parts:
            return
        held = [param for group in optimizer.param_groups for param in group["params"]]
        if not held or any(id(param) not in self._names for param in held):
            self._named = named_tensors(self._model)  # parameters made since
            self._names.update(names_of(self._named))
            self._find_masters(optimizer, wrappers(wrapper))
        index, groups = len(self._parts), optimizer.param_groups

        def make(part: int, found: dict[Any, Any]) -> Watched:
            with PlainTorch(optimizer):
                watched = Watched(
                    *(optimizer, index, self._names, self._samples, self._rng, found, self._pieces, part, groups)
                )
            self.watched[id(optimizer), part] = watched
            self._share_turns()
            return watched

        parts = self._parts[id(optimizer)] = Parts(make(0, self.found), make)
        self._handles.append(optimizer.register_load_state_dict_post_hook(lambda _: parts.read_counters()))

    def _share_turns(self) -> None:
        """Let many optimizers take turns, as the tensors of one do."""
        every = self.watched.values()
        turns, shadowed = turns_of_optimizers(len(every), sum(len(watched.rows) for watched in every))
        for i, watched in enumerate(every):
            watched.turns, watched.is_shadowed = turns, i % shadowed == 0

    def _find_masters(self, optimizer: Optimizer, wrapped_in: Sequence[Any]) -> None:
        """Name what the optimizer steps instead of the model's own tensors."""
        found = masters.find(self._named, self._names, optimizer, wrapped_in)
        self._names.update(found.names)
        self._instead.update(found.instead)
        self._pieces.update(found.pieces)

    def clear(self) -> None:
        """Let go of all optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for watched in self.watched.values():
            watched.accumulation.remove()
        self.watched.clear()
        self._parts.clear()

    def stepping(self, optimizer: Optimizer) -> Watched | None:
        """The part of an optimizer that is about to be stepped; None for one that is not watched."""
        parts = self._parts.get(id(optimizer))
        return None if parts is None else parts.current(optimizer)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that are watched, once for each part."""
        return [watched.optimizer for watched in self.watched.values()]

    # --- in the step -----------------------------------------------------------------------------

    def before(self, watched: Watched) -> Any:
        """Measure what is about to be stepped; the result is for `Watched.after`."""
        if watched.index == 0 and watched.part == 0:
            self._averages.look()
        return watched.before(self.is_replaying)

    def after(self, watched: Watched, measured: Any) -> None:
        """Add the step that was just taken."""
        watched.after(measured)
        for device in watched.devices:
            self.streams.note(device)

    # --- windows -----------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps since attached."""
        return max((watched.steps for watched in self.watched.values()), default=0)

    @property
    def window_steps(self) -> int:
        """Steps in the window that is open."""
        return max((watched.window_steps for watched in self.watched.values()), default=0)

    def is_full(self, watched: Watched, window: int) -> bool:
        """Whether the window ends with the step `watched` has taken: optimizers that step in turn end theirs together."""
        return watched.window_steps >= window and all(
            other.window_steps != window - 1 for other in self.watched.values()
        )

    def close_window(
        self, step: int, seconds: float, observed: int | None = None, cost_share: float | None = None
    ) -> Window:
        """The window's sums, on their way to the host, and a new window.

        `seconds` the watch took in it on this thread, `observed` steps were looked at, `cost_share`: see `Report`.
        """
        steps = self.window_steps
        cohorts: list[Any] = []
        others: list[TensorEvidence] = []
        skipped: list[Any] = []
        shadows: list[ShadowWindow] = []
        accumulations: list[AccumulationWindow] = []
        batch = Batch()
        for key, optimizer_parts in self._parts.items():
            for unused in optimizer_parts.forget_unused():
                unused.accumulation.remove()
                del self.watched[key, unused.part]
        with torch.no_grad():
            for watched in self.watched.values():
                parts = watched.close_window(batch)
                cohorts += parts[0]
                others += parts[1]
                skipped += parts[2]
                shadow = watched.shadow.close_window(batch)
                shadows += [] if shadow is None else [shadow]
                accumulation = watched.accumulation.close_window(batch)
                accumulations += [] if accumulation is None else [accumulation]
            averages = tuple(self._averages.close_window(batch))
            rows = [row for watched in self.watched.values() for row in watched.rows]
            whole = [row for row in rows if row.piece is None]
            checksums = () if self._checksums is None else tuple(self._checksums.take(whole, batch))
            batch.send()
        others += self._unheld({id(row.param) for row in rows}, steps)
        order = {self._names[id(tensor)][0]: i for i, (_, tensor) in reversed(list(enumerate(self._named)))}
        return Window(
            step,
            steps,
            tuple(cohorts),
            tuple(others),
            order,
            1e3 * seconds / steps if steps else None,
            tuple(skipped),
            averages,
            tuple(shadows),
            tuple(accumulations),
            checksums,
            observed,
            cost_share,
        )

    def _unheld(self, held: set[int], steps: int) -> list[TensorEvidence]:
        """The model's tensors that no optimizer holds, and whose masters are not known."""
        found: list[TensorEvidence] = []
        seen: set[int] = set()
        for _, tensor in self._named:
            if id(tensor) in held or id(tensor) in seen or self._instead.get(id(tensor)) == "":
                continue
            seen.add(id(tensor))
            reason = self._instead.get(id(tensor), "")
            identity = describe(tensor, self._names[id(tensor)])
            found.append(
                TensorEvidence(**identity, steps=steps, reason=reason, optimizer_group="0/0" if reason else "")
            )
        return found
