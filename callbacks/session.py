"""What the trainer callbacks have in common: options, one watched run, the numbers for loggers, the audit."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import run_journal
from update_watch.audit.table import StallExpected
from update_watch.callbacks.options import AUTO, Options
from update_watch.kinds import without_wrappers
from update_watch.report import Health, Report, weighted_mean
from update_watch.watch import Watch, watch
from update_watch.wording import above_progress_bars
from update_watch.wrappers import unwrap

logger = logging.getLogger("update_watch")

Sink = Callable[[Report], Any]
Method = TypeVar("Method", bound=Callable[..., Any])
FLUSH_SECONDS = 10.0  # waited for the last window at the end of training


class Names:
    """(name, tensor) pairs of a model: those of the moment it is made, what the optimizers hold that is new, and what
    has taken the place of an ordinary tensor.

    A model sharded by FSDP2 shows other tensors between a validation and the next step; by then the right ones
    are known, and they are no ordinary ones. Names lose the parts that only stand for a wrapper (`torch.compile`, checkpointing).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self.name = model, type(model).__name__
        self._pairs = dict(_clean(model))
        self.optimizers: Sequence[Any] = ()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        held = {id(p) for opt in self.optimizers for group in opt.param_groups for p in group["params"]}
        held -= {id(tensor) for tensor in self._pairs.values()}
        for name, tensor in _clean(self._model):
            if name not in self._pairs or id(tensor) in held or (_is_plain(tensor) and _is_plain(self._pairs[name])):
                self._pairs[name] = tensor
        return iter(list(self._pairs.items()))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _clean(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    pairs: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
    short = [without_wrappers(name) for name, _ in pairs]
    return pairs if len(set(short)) < len(short) else list(zip(short, (t for _, t in pairs), strict=True))


class Inbox(deque[Report]):
    """Reports that wait for the training thread; a sink that is called on every rank, as every rank's callback asks for them."""

    on_every_rank = True

    def __call__(self, report: Report) -> None:
        self.append(report)


class Session:
    """A watched run: the watch, and the reports that wait for the training thread."""

    def __init__(
        self,
        options: Options,
        names: Names,
        optimizers: Iterable[Any],
        step: Callable[[], int],
        averages: Mapping[str, Any],
        sinks: Sequence[Sink] = (),
        is_leader: bool = True,
        folder: str | os.PathLike[str] | None = None,
        trainer: str = "",
        schedule: Any = None,
    ) -> None:
        """Only the leader (rank 0) feeds the user's sinks, and keeps the journal: in `folder` unless it has a path.

        Raises:
            TypeError: none of the optimizers can be watched.
        """
        self._inbox = Inbox()  # appended to by the watch's thread
        self._is_leader = is_leader
        self.has_begun = False  # a batch or step is over: there is something to report of
        self._options = options
        self.optimizers = list(optimizers)
        watchable = watchable_of(self.optimizers)
        if not watchable and all(map(_is_placeholder, self.optimizers)):
            logger.warning(
                "update-watch: the trainer has no optimizer; one that steps the model is watched from its first step"
            )
        elif not watchable:
            kinds = ", ".join(type(o).__name__ for o in self.optimizers) or "none"
            raise TypeError(f"no torch optimizer with step hooks among the trainer's optimizers ({kinds})")
        self._names = names
        names.optimizers = watchable
        settings = options.for_watch()
        self._journal = _journal_path(options.journal, folder) if is_leader else None
        if self._journal is not None:
            self._kept = run_journal.keep(
                self._journal, watchable, trainer, name=self._journal.parent.name, model=names.name
            )
            sinks = [*sinks, self._kept]
        settings["sinks"] = [self._inbox, *sinks, *options.sinks] if is_leader else [self._inbox]
        settings |= {"step": step, "schedule": schedule}
        try:
            self.watch: Watch = watch(names, watchable or None, averages=dict(averages), **settings)
        except (TypeError, ValueError) as error:
            if not averages:
                raise
            logger.warning("update-watch: averaged models are not watched: %s", error)
            self.watch = watch(names, watchable or None, **settings)
        self.watch.trainer = trainer or "torch"

    def follow(self, optimizers: Sequence[Any]) -> None:
        """Watch these optimizers from now on; does nothing while they are the ones that are watched.

        The window that is open when they change is dropped.
        """
        if len(optimizers) == len(self.optimizers) and all(map(_is, optimizers, self.optimizers)):
            return
        self.optimizers = list(optimizers)
        self._names.optimizers = watchable_of(optimizers)
        self.watch.detach()  # lets go of the old ones and of their state
        for optimizer in self._names.optimizers:
            self.watch.attach(optimizer)

    def take(self) -> list[Report]:
        """The reports that came since the last call, oldest first."""
        reports = []
        while self._inbox:
            reports.append(self._inbox.popleft())
        return reports

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what an earlier run remembered; what cannot be read is left out, and said."""
        try:
            self.watch.load_state_dict(state)
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("update-watch: the checkpoint's memory of earlier windows is not used: %s", error)

    def audit(self, averages: Mapping[str, Any], dashboards: Sequence[Any], any_rank: Callable[[bool], bool]) -> None:
        """Print on rank 0 what will stall, or that nothing will, and tell the dashboards. Called on every rank.

        Args:
            any_rank: whether it is true on any rank: what ends the run on rank 0 ends it on all, or they would wait for it.

        Raises:
            StallExpected: something will stall, and `on_audit` is "raise"; or the user's function raised an error.
        """
        error = self._audited(averages, dashboards) if self._is_leader else None
        if self._options.on_audit != "warn" and any_rank(error is not None) and error is None:
            error = StallExpected("rank 0's audit ends the run (on_audit): its log says what is expected to stall")
        if error is not None:
            raise error

    def _audited(self, averages: Mapping[str, Any], dashboards: Sequence[Any]) -> StallExpected | None:
        if not self._names.optimizers:
            return None
        try:
            found, text = _audit(self._names, averages, self.watch.trainer, self._options.print_audit == "full")
            if self._options.print_audit:
                with above_progress_bars():
                    print(text, flush=True)
            facts = {"window": self._options.window, "samples": self._options.samples, "audit": found.to_dict()}
            for sink in dashboards:
                sink.describe(facts)
        except Exception as error:
            logger.warning("update-watch: no audit: %r", error)
            return None
        try:
            if self._options.on_audit == "raise":
                found.check()
            elif callable(self._options.on_audit):
                self._options.on_audit(found)
        except StallExpected as error:
            return error
        except Exception as error:
            expected = StallExpected(str(error))
            expected.__cause__ = error
            return expected
        return None

    def finish(self, timeout: float = FLUSH_SECONDS) -> list[Report]:
        """Report the open window, if training has begun; the reports that were not taken yet."""
        if self.has_begun:
            self.watch.flush(timeout)
        return self.take()

    def close(self) -> None:
        """Let go of the optimizers, whatever happens; close the journal, and say how to open it."""
        try:
            self.watch.close()
        finally:
            self.watch.detach()
        if self._journal is not None:
            self._kept.close()
            if self.watch.last is not None:
                with above_progress_bars():
                    print(run_journal.how_to_open(self._journal, self.watch.last), flush=True)


def _journal_path(chosen: str | os.PathLike[str] | None, folder: str | os.PathLike[str] | None) -> Path | None:
    if chosen is None or (chosen == AUTO and folder is None):
        return None
    return Path(folder or "", run_journal.NAME) if chosen == AUTO else Path(chosen)


def become(callback: Any, trainer: str) -> None:
    """Make a callback that was given to another trainer than its own the callback for that trainer.

    Both have one name, and users take the import they saw last.
    """
    options = dict(vars(callback._options))
    callback.__class__ = importlib.import_module(f"update_watch.callbacks.{trainer}").UpdateWatch
    callback.__init__(**options)


def harmless(method: Method) -> Method:
    """An error of ours in a callback's method ends the watching, not the training."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except StallExpected:  # a gate that the user asked for
            raise
        except Exception as error:
            logger.error("update-watch: stopped watching, training goes on: %r", error, exc_info=error)
            session, self._session = self._session, None
            if session is not None:
                session.watch.detach()
            return None

    return guarded  # type: ignore[return-value]


def _is(a: object, b: object) -> bool:
    return a is b


def watchable_of(optimizers: Iterable[Any]) -> list[Optimizer]:
    """The torch optimizers behind `optimizers`; what has no step hooks is left out and said once."""
    found = []
    for optimizer in optimizers:
        try:
            inner = unwrap(optimizer)
        except TypeError as error:
            logger.warning("update-watch: an optimizer is not watched: %s", error)
            continue
        if not _is_placeholder(inner):
            found.append(inner)
    return found


def _is_placeholder(optimizer: Any) -> bool:
    """What Lightning puts in place of no optimizer."""
    return type(optimizer).__name__ == "_MockOptimizer"


def counts_to_show(report: Report) -> dict[str, int]:
    """`stalled` where anything is known, and `unknown` where anything is not: no 0 that was not measured."""
    counts, at_rest = report.counts, (Health.frozen, Health.idle)
    is_known = any(t.health not in (Health.unknown, *at_rest) for t in report.tensors)
    shown = {"stalled": counts["stalled"]} if is_known or not counts["unknown"] else {}
    return shown | ({"unknown": counts["unknown"]} if counts["unknown"] else {})


def run_numbers(report: Report) -> dict[str, float]:
    """A handful of numbers for any logger; what is not known is left out, as verdicts of a window of which nothing was looked at.
    Keys as in docs/metrics.md."""
    healths = ("healthy", "stalling", "stalled", "broken", "unknown") if report.observed_steps != 0 else ()
    displacement = weighted_mean((t.displacement_efficiency, t.numel) for t in report.tensors)
    values: dict[str, float | None] = {
        "efficiency": report.efficiency,
        "net_progress": displacement,
        **{f"tensors_{health}": float(report.counts[health]) for health in healths},
        "skipped_steps": float(report.skipped_steps),
        "cost_ms": report.cost_ms,
    }
    return {f"update_watch/{name}": value for name, value in values.items() if value is not None}


def _audit(names: Names, averages: Mapping[str, Any], trainer: str, is_full: bool) -> tuple[Any, str]:
    """The audit, and what of it is shown: one to three lines, or all of it."""
    from update_watch.audit.audit import audit

    found = audit(names, names.optimizers, averages=dict(averages))
    tensors = f"update-watch: {sum(1 for _ in names):,} tensors watched"
    if is_full:
        return found, f"{tensors}.\n{found}"
    text = found.in_short(trainer)
    return found, f"{tensors}. {text}" if text else f"{tensors}; nothing in their formats will stall."


def wandb_sink(run: Any, step_key: str) -> Any:
    """A sink that logs everything to this W&B run."""
    from update_watch.dashboards import WandbSink

    return WandbSink(run, step_key=step_key)
