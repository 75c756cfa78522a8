"""`watch`: attach to a model's optimizers, and reports of what arrived come out.

Hooks see every step (`tap`); it is measured on the device; a window's vector leaves for a thread that judges it.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch.optim import Optimizer

from update_watch import endings, run_journal
from update_watch.foresight.schedules import schedule_of
from update_watch.judge.alerts import Alerts
from update_watch.judge.diagnosis import Diagnosis
from update_watch.judge.forecast.outlook import Outlook
from update_watch.measure.device.streams import StepStreams, is_capturing
from update_watch.measure.hooks.tap import StepTap
from update_watch.measure.identity.partitions import chain
from update_watch.measure.plain_torch import PlainTorch
from update_watch.measure.watched_model import WatchedModel
from update_watch.measure.window_evidence import Window, read
from update_watch.ranks.joining import Ranks
from update_watch.report import Report
from update_watch.thresholds import Thresholds
from update_watch.watching import arguments, closing, graphs, memory, resting
from update_watch.watching.attention import Attention
from update_watch.watching.discovery import Discovery
from update_watch.watching.selection import Selection
from update_watch.watching.silence import Silence
from update_watch.worker import Sink, Sinks, Worker, warn
from update_watch.wrappers import unwrap

logger = logging.getLogger("update_watch")


class Watch(run_journal.Shown, memory.Remembering):
    """A running watch; made by `watch`. Also a context manager that closes itself."""

    def __init__(
        self,
        model: Any,
        optimizers: Sequence[Any],
        window: int,
        samples: int,
        budget: float | None,
        sinks: Sequence[Sink],
        thresholds: Thresholds,
        averages: Mapping[str, Any],
        seed: int,
        step: Callable[[], int] | None,
        join: Any = True,
        check_replicas: bool = False,
        selection: Selection | None = None,
        schedule: Any = None,
    ) -> None:
        self.window, self.samples, self._step = window, samples, step
        self.last: Report | None = None
        self._ranks = Ranks(join)
        rng = random.Random(seed + 1_000_003 * self._ranks.rank)  # replicas look at different elements
        self._model = WatchedModel(model, samples, rng, averages, check_replicas, window, budget is None)
        self._attention = Attention(budget, window, lambda: self._ranks.is_joining)
        self._closed = self._is_closing_window = self._has_failed = False
        self._base_step = self._windows = 0  # windows closed so far
        self._selection = selection or Selection()
        self._diagnosis, self._alerts = Diagnosis(thresholds), Alerts(thresholds)
        self._outlook = Outlook(None if schedule is None else schedule_of(schedule), thresholds)
        self._judge = Worker("judging", self._attention.beside(self._judge_window))
        self._post = Worker("sink", self._attention.beside(Sinks(list(sinks), lambda: self._ranks.rank == 0)))
        self._tap = StepTap(self._before, self._after, self._fail, graphs.say_captured, self._wants, self._passed)
        self._tap.spend = self._attention.spend
        self._discovery = Discovery(self._model, self._tap, self._attach)
        put = lambda window: self._ranks.is_joining or self._judge.put(window)  # noqa: E731
        close = lambda: None if self._ranks.is_joining else self._close_window()  # noqa: E731
        self._silence = Silence(self._model, window, put, close, self._discovery, lambda: self._tap.enabled)
        resting.Rests(self._tap, self._model, self._attention, self._silence.end)
        self._attach_all([one for optimizer in optimizers for one in chain(optimizer)])
        endings.add(self, self._model.has)

    # --- attaching -------------------------------------------------------------------------------

    def attach(self, optimizer: Any) -> None:
        """Watch one more optimizer; one that is watched already stays as it is. Wrappers are looked through.

        Raises:
            TypeError: there is no torch optimizer in it.
            RuntimeError: the watch is closed.
        """
        if self._closed:
            raise RuntimeError("Watch.attach: this watch is closed; make another with update_watch.watch")
        self._attach_all(chain(optimizer))

    def _attach_all(self, optimizers: Sequence[Any]) -> None:
        for one in optimizers:  # what is none is said before anything is attached
            unwrap(one)
        try:
            for one in optimizers:
                self._attach(one)
            self._discovery.start()
            self._silence.start()
        except Exception as error:
            self._fail(error)

    def _attach(self, optimizer: Any, outside: Sequence[Optimizer] = ()) -> None:
        inner = unwrap(optimizer)
        self.hear([optimizer])
        if not self._model.has(inner):
            endings.warn_if_watched(inner)
            if self._model.step:  # its rate may be another one
                self._attention.wake()
        self._model.add(inner, optimizer, outside)
        self._tap.attach(inner)

    def detach(self) -> None:
        """Remove every hook; `attach` puts them back."""
        self._base_step += self._model.step
        self._discovery.stop()
        self._silence.stop()
        self._tap.detach()
        self._model.clear(for_good=self._closed)

    @property
    def enabled(self) -> bool:
        """False: steps pass unseen, as in a learning-rate finder."""
        return self._tap.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._tap.enabled = value

    @property
    def step(self) -> int:
        """The step reports are numbered by: the trainer's global step if it was given, else steps counted here."""
        return int(self._step()) if self._step is not None else self._base_step + self._model.step

    # --- in the step -----------------------------------------------------------------------------

    def _wants(self, optimizer: Optimizer) -> bool:
        """Whether to look at the step that begins: not while another thread closes the watch, as nobody would report it."""
        self._silence.end()
        watched = self._model.stepping(optimizer)
        if self._closed or watched is None:
            return not self._closed
        is_remade = watched.step and not watched.steps  # for every step, by some: none of them comes round
        return self._attention.looks(0 if is_remade else id(optimizer), watched.window_steps)

    def _passed(self, optimizer: Optimizer) -> None:
        """A step is over that was not looked at."""
        watched = self._model.stepping(optimizer)
        if watched is not None and self._model.pass_by(watched):
            self._attention.wake()

    def _before(self, optimizer: Optimizer) -> Any:
        self._tap.mend(self._model.renew)
        outside = self._tap.outside(optimizer)
        watched = self._model.stepping(optimizer, outside)
        if watched is None:  # detached in the step's closure
            return None
        if self._attention.may_close(watched.window_step):  # one that was waited for did not step
            self._close_window()
        watched.is_resting = not self._attention.is_full
        return watched, self._model.before(watched, outside)

    def _after(self, optimizer: Optimizer, snapshot: Any) -> None:
        if snapshot is None:
            return
        watched, measured = snapshot
        self._attention.saw(self._model.after(watched, measured))
        if self._model.is_full(watched, self.window) and self._attention.may_close(watched.window_steps):
            self._close_window()

    def replayed(self, *optimizers: Any) -> AbstractContextManager[None]:
        """Put it around the replay of a CUDA graph that steps of these optimizers (none given: of all) were captured in."""
        return graphs.replayed(self._tap, self._model, optimizers)

    def _fail(self, error: Exception) -> None:
        """An error of ours: let go of training, say so once. What comes of it later is not told."""
        if self._has_failed:
            return
        self._has_failed, self._tap.enabled = True, False
        self.detach()
        message = f"update-watch met an error of its own and stopped watching; training goes on unwatched: {error!r}"
        logger.error(message, exc_info=error)
        self._judge.put(self._ranks.leave)
        warn(message)

    # --- windows -----------------------------------------------------------------------------------

    def _close_window(self) -> None:
        self._windows += 1
        self._judge.put(self._model.close_window(self.step, *self._attention.close_window()))
        self._silence.listen()
        self._discovery.let_go(self._model.release())

    def _judge_window(self, window: Window | Callable[[], None]) -> None:
        if not isinstance(window, Window):
            return window()
        try:
            evidence = self._selection.of(self._ranks.join(read(window)))
            self._alerts.is_logging = self._ranks.rank == 0 or not self._ranks.is_joining
            report = self._outlook.add(self._diagnosis.judge(evidence, self.trainer))
            report = self._alerts.update(report, self.trainer, self.told_as)
        except Exception as error:
            self._fail(error)
            return
        self.last = report
        self._attention.judged(report)
        if not self._closed:
            endings.stand_first()
        self._post.put(report)

    def flush(self, timeout: float | None = None) -> Report | None:
        """Close the window now and wait for device and sinks, at most `timeout` seconds. Returns the last report."""
        if is_capturing():  # whatever is done now becomes a part of the graph
            warn("update-watch: Watch.flush inside the capture of a CUDA graph does nothing; call it before or after")
            return self.last
        if self._model.window_steps or (not self._silence.lasts and self._windows == 0 and self._model.watched):
            self._is_closing_window = True
            try:
                plain = PlainTorch(*self._model.optimizers)
                with closing.alone(self._tap, timeout), self._model.streams.resumed(), plain, plain:
                    self._tap.mend(self._model.renew)
                    if self._model.window_steps or self._windows == 0 or self._ranks.is_joining:
                        self._close_window()
            except Exception as error:
                self._fail(error)
            except BaseException:  # Ctrl-C
                self._tap.is_torn = True
                raise
            finally:
                self._is_closing_window = False
        self._silence.flush()
        self._settle(timeout)
        return self.last

    def _settle(self, timeout: float | None) -> None:
        """Wait for device and sinks, at most `timeout` seconds."""
        started = time.monotonic()
        try:
            self._model.streams.settle(timeout)
        except Exception as error:  # a kernel of somebody's has failed; training meets that error itself
            self._fail(error)
        if self._judge.wait(timeout):
            self._post.wait(None if timeout is None else max(timeout - (time.monotonic() - started), 0.0))

    def close(self, timeout: float = 5.0) -> None:
        """Report the window that is open, detach everything, stop the threads. May be called again."""
        if self._closed:
            return self._settle(timeout)
        self._closed = True
        self._ranks.hurry(timeout / 2)
        try:
            if self._windows or self._model.window_steps or self._silence.lasts:
                self.flush(timeout)
        finally:
            endings.remove(self)  # first: an interrupt may end what follows
            self._step = closing.stopped(self._step)
            with closing.alone(self._tap, timeout):
                self.detach()
            if self._judge.wait(0.0):  # else the group goes when the process ends
                self._ranks.close()
                self._post.stop(None, timeout=min(timeout, 0.5))
            else:  # behind the report that is still to come
                self._judge.put(lambda: self._post.stop(None))
            self._judge.stop()

    @property
    def is_measuring(self) -> bool:
        """Whether the training thread is in the middle of a measurement."""
        return self._tap.is_running or self._is_closing_window

    def leave_to_parent(self) -> None:
        """In a forked process: the one it was forked from goes on reporting, this copy does nothing more."""
        self._judge, self._post = Worker("judging", self._judge_window), Worker("sink", Sinks([]))
        self._closed, self._model.streams = True, StepStreams()
        self._tap.wants = self._tap.rests = None  # a closed watch wants no step
        self._tap.spend = lambda _: None
        self._tap.lock = threading.RLock()  # the thread that may have it is not here
        self._tap.replace(lambda optimizer: endings.say_forked(self.detach, optimizer))


def watch(
    model: Any,
    optimizer: Any = None,
    *,
    window: int = 128,
    samples: int = 256,
    budget: float | None = 0.01,
    sinks: Iterable[Sink] = (),
    thresholds: Thresholds | None = None,
    averages: Mapping[str, Any] | None = None,
    schedule: Any = None,
    seed: int = 0,
    step: Callable[[], int] | None = None,
    join: Any = True,
    check_replicas: bool = False,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    journal: str | os.PathLike[str] | None = None,
    name: str = "",
) -> Watch:
    """Watch what the stored weights receive of the updates the optimizer computes.

    Args:
        model: a module, or (name, tensor) pairs.
        optimizer: none, one or a sequence; wrappers are looked through. What is given is planned at once; any other optimizer
            of the process that steps tensors of the model, or masters of them, is found at its first step.
        window: optimizer steps per report.
        samples: elements looked at per parameter.
        budget: share of the time between steps that the watch may take after 256 steps, once every tensor has a verdict (or
            after four windows): it then looks at fewer steps, and reports say at how many. None: at every step; on a CPU
            from then on at a part of more than 320 tensors in each window.
        sinks: callables that take a `Report`, on a background thread, of several ranks on rank 0; a failing one is dropped.
        thresholds: limits of the verdicts and alerts.
        averages: further accumulators to watch, `{"ema": averaged_model}`, or with their decay `{"ema": (model, 0.999)}`.
        schedule: `uw.Schedule(rate, steps)` or a torch scheduler that knows its end: reports then hold a forecast.
        seed: of the choice of samples. No global random state is used.
        step: gives the trainer's global step, to number reports; else optimizer steps are counted.
        join: all ranks put together what they saw. False: each reports its own shards. A process group: its ranks join.
        check_replicas: compare, once a window, what ranks store that should be the same; `broken` where replicas differ.
        include, exclude: names with wildcards ("*norm*") of tensors that are reported, or not; everything is watched.
        journal: file to keep the run in ("run.jsonl"): what `update-watch report` and `top` read. Rank 0 writes it.
        name: of the model, in alerts and the log; else that of its class is told where the process has several watches.

    Raises:
        ValueError, TypeError: for arguments that cannot be used; the message names argument, value and remedy.

    Example:
        >>> watch = uw.watch(model, optimizer)
        >>> train()
        >>> print(watch.flush().headline)
    """
    sinks = list(sinks) if isinstance(sinks, Iterable) and not isinstance(sinks, str) else sinks
    optimizers = arguments.check(
        optimizer, window, samples, budget, sinks, thresholds, averages, seed, step, join, check_replicas
    )
    sinks = run_journal.after(sinks, journal, optimizers, join, model)
    return Watch(
        *(model, optimizers, window, samples, budget, sinks, thresholds or Thresholds(), averages or {}),
        *(seed, step, join, check_replicas, Selection(include, exclude), schedule),
    ).kept_in(journal, name, model, optimizers)
