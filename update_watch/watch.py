"""`watch`: attach to a model's optimizers, and reports of what arrived come out.

Two torch hooks per optimizer see every step (`tap`); `Watched` measures it on the device; at the end of a window one
vector per device leaves for a background thread, where it is judged and handed to the sinks.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import endings
from update_watch.evidence import TensorEvidence
from update_watch.judge.alerts import Alerts
from update_watch.judge.diagnosis import Diagnosis
from update_watch.judge.verdict_memory import check_state
from update_watch.measure.accumulators.averages import Averages
from update_watch.measure.accumulators.gradient_accumulation import AccumulationWindow
from update_watch.measure.accumulators.reference_states import ShadowWindow
from update_watch.measure.accumulators.replicas import Checksums
from update_watch.measure.identity import masters
from update_watch.measure.identity.optimizer_parts import Parts
from update_watch.measure.identity.partitions import Piece, chain, wrappers
from update_watch.measure.parameters import names_of
from update_watch.measure.tap import PlainTorch, StepTap, unwrap
from update_watch.measure.transfer import Batch
from update_watch.measure.watched_optimizer import Watched, describe, share_turns
from update_watch.measure.windows import Window, read
from update_watch.ranks.exchange import Ranks
from update_watch.report import Report
from update_watch.thresholds import Thresholds
from update_watch.worker import Sink, Sinks, Worker, warn

logger = logging.getLogger("update_watch")
_STATE_VERSION = 1


class Watch:
    """A running watch; made by `watch`. Also a context manager that closes itself."""

    def __init__(
        self,
        model: Any,
        optimizers: Sequence[Any],
        window: int,
        samples: int,
        sinks: Sequence[Sink],
        thresholds: Thresholds,
        averages: Mapping[str, Any],
        seed: int,
        step: Callable[[], int] | None,
        join: Any = True,
        check_replicas: bool = False,
    ) -> None:
        self.window, self.samples = window, samples
        self.last: Report | None = None
        self._model, self._step = model, step
        self._named = _named(model)
        self._names = names_of(self._named)
        self._ranks = Ranks(join)
        self._checksums = Checksums() if check_replicas else None
        self._rng = random.Random(seed + 1_000_003 * self._ranks.rank)  # replicas look at different elements
        self._found: dict[Any, Any] = {}  # what probes found out
        self._instead: dict[int, str] = {}  # id of a parameter that no optimizer holds -> what is said of it
        self._pieces: dict[int, Sequence[Piece]] = {}  # id of a flat tensor that is stepped -> what lies in it
        self._parts: dict[int, Parts] = {}  # id of an optimizer -> the parts it is stepped in
        self._watched: dict[tuple[int, int], Watched] = {}  # all of them, by optimizer and part
        self._seconds, self._base_step = 0.0, 0
        self._closed = False
        self._is_closing_window = False
        self._windows = 0  # closed so far
        self._diagnosis, self._alerts = Diagnosis(thresholds), Alerts(thresholds)
        self._sinks = Sinks(list(sinks))
        self._judge = Worker("judging", self._judge_window)
        self._post = Worker("sink", self._sinks)
        with PlainTorch():
            self._averages = Averages(averages, self._named, samples, self._rng)
        self._tap = StepTap(self._before, self._after, self._fail)
        self._handles: list[Any] = []
        for optimizer in optimizers:
            self.attach(optimizer)
        endings.add(self)

    # --- attaching -------------------------------------------------------------------------------

    def attach(self, optimizer: Any) -> None:
        """Watch one more optimizer; one that is watched already stays as it is. Wrappers are looked through.

        Raises:
            TypeError: there is no torch optimizer in it.
            RuntimeError: the watch is closed.
        """
        if self._closed:
            raise RuntimeError("Watch.attach: this watch is closed; make another with update_watch.watch")
        for one in chain(optimizer):
            self._attach(one)

    def _attach(self, optimizer: Any) -> None:
        inner = unwrap(optimizer)
        if id(inner) not in self._parts:
            held = [param for group in inner.param_groups for param in group["params"]]
            if not held or any(id(param) not in self._names for param in held):
                self._named = _named(self._model)  # parameters made since
                self._names.update(names_of(self._named))
                self._find_masters(inner, wrappers(optimizer))
            index, groups = len(self._parts), inner.param_groups

            def make(part: int, found: dict[Any, Any]) -> Watched:
                with PlainTorch(inner):
                    watched = Watched(
                        *(inner, index, self._names, self.samples, self._rng, found, self._pieces, part, groups)
                    )
                self._watched[id(inner), part] = watched
                share_turns(list(self._watched.values()))
                return watched

            parts = self._parts[id(inner)] = Parts(make(0, self._found), make)
            self._handles.append(inner.register_load_state_dict_post_hook(lambda _: parts.read_counters()))
        self._tap.attach(inner)

    def _find_masters(self, optimizer: Optimizer, wrapped_in: Sequence[Any]) -> None:
        """Name what the optimizer steps instead of the model's own tensors."""
        found = masters.find(self._named, self._names, optimizer, wrapped_in)
        self._names.update(found.names)
        self._instead.update(found.instead)
        self._pieces.update(found.pieces)

    def detach(self) -> None:
        """Remove every hook; `attach` puts them back."""
        self._tap.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for watched in self._watched.values():
            watched.accumulation.remove()
        self._watched.clear()
        self._parts.clear()

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
        if self._step is not None:
            return int(self._step())
        return self._base_step + max((w.steps for w in self._watched.values()), default=0)

    # --- in the step -----------------------------------------------------------------------------

    def _before(self, optimizer: Optimizer) -> Any:
        started = time.perf_counter()
        if id(optimizer) not in self._parts:  # detached in the step's closure
            return None
        watched = self._parts[id(optimizer)].current(optimizer)
        if watched.window_steps >= self.window:  # one that was waited for did not step
            self._close_window()
        if watched.index == 0 and watched.part == 0:
            self._averages.look()
        measured = watched.before()
        self._seconds += time.perf_counter() - started
        return watched, measured

    def _after(self, optimizer: Optimizer, snapshot: Any) -> None:
        if snapshot is None:
            return
        started = time.perf_counter()
        watched, measured = snapshot
        watched.after(measured)
        if self._is_window_full(watched):
            self._close_window()
        self._seconds += time.perf_counter() - started

    def _is_window_full(self, watched: Watched) -> bool:
        # optimizers that step in turn end their windows together
        return watched.window_steps >= self.window and all(
            other.window_steps != self.window - 1 for other in self._watched.values()
        )

    def _fail(self, error: Exception) -> None:
        """An error of ours: let go of training, say so once."""
        self.detach()
        message = f"update-watch met an error of its own and stopped watching; training goes on unwatched: {error!r}"
        logger.error(message, exc_info=error)
        self._judge.put(self._ranks.leave)
        warn(message)

    # --- windows -----------------------------------------------------------------------------------

    def _close_window(self) -> None:
        self._windows += 1
        steps = max((w.window_steps for w in self._watched.values()), default=0)
        cohorts: list[Any] = []
        others: list[TensorEvidence] = []
        skipped: list[Any] = []
        shadows: list[ShadowWindow] = []
        accumulations: list[AccumulationWindow] = []
        batch = Batch()
        for key, optimizer_parts in self._parts.items():
            for unused in optimizer_parts.forget_unused():
                unused.accumulation.remove()
                del self._watched[key, unused.part]
        with torch.no_grad():
            for watched in self._watched.values():
                parts = watched.close_window(batch)
                cohorts += parts[0]
                others += parts[1]
                skipped += parts[2]
                shadow = watched.shadow.close_window(batch)
                shadows += [] if shadow is None else [shadow]
                accumulation = watched.accumulation.close_window(batch)
                accumulations += [] if accumulation is None else [accumulation]
            averages = tuple(self._averages.close_window(batch))
            rows = [row for watched in self._watched.values() for row in watched.rows]
            whole = [row for row in rows if row.piece is None]
            checksums = () if self._checksums is None else tuple(self._checksums.take(whole, batch))
            batch.send()
        held = {id(row.param) for row in rows}
        seen: set[int] = set()
        for _, tensor in self._named:
            if id(tensor) in held or id(tensor) in seen or self._instead.get(id(tensor)) == "":
                continue
            seen.add(id(tensor))
            reason = self._instead.get(id(tensor), "")
            identity = describe(tensor, self._names[id(tensor)])
            others.append(
                TensorEvidence(**identity, steps=steps, reason=reason, optimizer_group="0/0" if reason else "")
            )
        order = {self._names[id(tensor)][0]: i for i, (_, tensor) in reversed(list(enumerate(self._named)))}
        cost = 1e3 * self._seconds / steps if steps else None
        self._seconds = 0.0
        sums = (
            tuple(cohorts),
            tuple(others),
            order,
            cost,
            tuple(skipped),
            averages,
            tuple(shadows),
            tuple(accumulations),
            checksums,
        )
        self._judge.put(Window(self.step, steps, *sums))

    def _judge_window(self, window: Window | Callable[[], None]) -> None:
        if not isinstance(window, Window):
            window()
            return
        try:
            evidence = self._ranks.join(read(window))
            self._alerts.is_logging = self._ranks.rank == 0 or not self._ranks.is_joining
            report = self._alerts.update(self._diagnosis.judge(evidence))
        except Exception as error:
            self._tap.enabled = False
            self._fail(error)
            return
        self.last = report
        self._post.put(report)

    def flush(self, timeout: float | None = None) -> Report | None:
        """Close the window now and wait for device and sinks, at most `timeout` seconds. Returns the last report."""
        if any(w.window_steps for w in self._watched.values()) or (self._windows == 0 and self._watched):
            self._is_closing_window = True
            try:
                with PlainTorch(*(watched.optimizer for watched in self._watched.values())):
                    self._close_window()
            except Exception as error:
                self._fail(error)
            finally:
                self._is_closing_window = False
        self._settle(timeout)
        return self.last

    def _settle(self, timeout: float | None) -> None:
        """Wait for device and sinks, at most `timeout` seconds."""
        started = time.monotonic()
        if self._judge.wait(timeout):
            left = None if timeout is None else max(timeout - (time.monotonic() - started), 0.0)
            self._post.wait(left)

    def close(self, timeout: float = 5.0) -> None:
        """Report the window that is open, detach everything, stop the threads. May be called again."""
        if self._closed:
            self._settle(timeout)
            return
        self._closed = True
        self._ranks.hurry(timeout / 2)
        try:
            if self._windows or any(w.window_steps for w in self._watched.values()):
                self.flush(timeout)
        finally:
            self.detach()
            if self._judge.wait(0.0):
                self._ranks.close()  # else the group goes when the process ends
                self._post.stop()
            else:
                self._judge.put(self._post.stop)  # behind the report that is still to come
            self._judge.stop()
            endings.remove(self)

    @property
    def is_measuring(self) -> bool:
        """Whether the training thread is in the middle of a measurement."""
        return self._tap.is_running or self._is_closing_window

    def leave_to_parent(self) -> None:
        """In a forked process: the one it was forked from goes on reporting, this copy does nothing more."""
        self._closed = True
        self._judge, self._post = Worker("judging", self._judge_window), Worker("sink", Sinks([]))
        self._tap.replace(self._tell_to_watch_anew)

    def _tell_to_watch_anew(self, optimizer: Optimizer) -> None:
        self.detach()
        message = (
            "update-watch: this process was forked from one that watches, and trains. What it trains is not watched: "
            "call update_watch.watch in it"
        )
        logger.warning(message)
        warn(message)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain data (safe to load weights-only): what verdicts and alerts remember between windows."""
        self._judge.wait(5.0)
        return {
            "version": _STATE_VERSION,
            "step": self.step,
            "diagnosis": self._diagnosis.state_dict(),
            "alerts": self._alerts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            TypeError, ValueError: data this version cannot read; nothing is changed then.
        """
        if not isinstance(state, Mapping) or state.get("version") != _STATE_VERSION:
            version = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"Watch.load_state_dict: version {version!r} cannot be read, {_STATE_VERSION} is expected; "
                "leave the state out to start the watch's memory anew"
            )
        check_state("Watch", state, _STATE_VERSION, {"diagnosis": Mapping, "alerts": Mapping, "step": int})
        if isinstance(state["step"], bool) or state["step"] < 0:
            raise ValueError(
                f"Watch.load_state_dict: step={state['step']!r} is not a step; pass what state_dict() gave"
            )
        self._judge.wait(5.0)
        alerts = self._alerts.state_dict()
        self._alerts.load_state_dict(state["alerts"])
        try:
            self._diagnosis.load_state_dict(state["diagnosis"])
        except (TypeError, ValueError):
            self._alerts.load_state_dict(alerts)  # all or nothing
            raise
        self._base_step = state["step"]


def watch(
    model: Any,
    optimizer: Any,
    *,
    window: int = 128,
    samples: int = 256,
    sinks: Iterable[Sink] = (),
    thresholds: Thresholds | None = None,
    averages: Mapping[str, Any] | None = None,
    seed: int = 0,
    step: Callable[[], int] | None = None,
    join: Any = True,
    check_replicas: bool = False,
) -> Watch:
    """Watch what the stored weights receive of the updates the optimizer computes.

    Args:
        model: a module, or (name, tensor) pairs.
        optimizer: one torch optimizer or a sequence of them; wrappers (Lightning, Accelerate) are looked through.
        window: optimizer steps per report.
        samples: elements looked at per parameter.
        sinks: callables that take a `Report`; they run on a background thread, a failing one is dropped.
        thresholds: limits of the verdicts.
        averages: further accumulators to watch, `{"ema": averaged_model}` or, where the decay cannot be told from the
            object, `{"ema": (averaged_model, 0.999)}`.
        seed: of the choice of samples. No global random state is used.
        step: gives the trainer's global step, to number reports; without it optimizer steps are counted.
        join: where torch.distributed runs, all ranks put together what they saw, and have the same reports. False: each
            rank reports its own shards. A process group: its ranks join. See docs/ranks.md.
        check_replicas: compare, once a window, what ranks store that should be the same to the bit; a tensor whose
            replicas differ is reported `broken`.

    Raises:
        ValueError, TypeError: for arguments that cannot be used; the message names argument, value and remedy.

    Example:
        >>> watch = uw.watch(model, optimizer)
        >>> train()
        >>> print(watch.flush().headline)
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"watch(window={window!r}): the number of optimizer steps per report must be 1 or more")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 4:
        raise ValueError(f"watch(samples={samples!r}): the number of elements per parameter must be 4 or more")
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        raise TypeError(f"watch(thresholds={thresholds!r}): expected update_watch.Thresholds or None")
    if isinstance(sinks, str) or not isinstance(sinks, Iterable):
        raise TypeError(f"watch(sinks={sinks!r}): expected a list of sinks, as in sinks=[Journal('run.jsonl')]")
    sinks = list(sinks)
    for sink in sinks:
        if not callable(sink):
            raise TypeError(
                f"watch(sinks=[{sink!r}]): a sink is a callable that takes a Report, such as a list's append"
            )
    if averages is not None and not isinstance(averages, Mapping):
        raise TypeError(
            f"watch(averages={_short(averages)}): expected names and averaged models, as {{'ema': ema_model}}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"watch(seed={seed!r}): expected a whole number")
    if step is not None and not callable(step):
        raise TypeError(f"watch(step={step!r}): expected a function that returns the trainer's step, or None")
    if isinstance(join, (str, int, float)) and not isinstance(join, bool):
        raise TypeError(f"watch(join={join!r}): expected True, False or a process group")
    if not isinstance(check_replicas, bool):
        raise TypeError(f"watch(check_replicas={check_replicas!r}): expected True or False")
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not optimizers:
        raise ValueError("watch(optimizer=[]): give at least one torch optimizer")
    for one in (member for optimizer in optimizers for member in chain(optimizer)):
        try:
            unwrap(one)
        except TypeError as error:
            raise TypeError(f"watch(optimizer={_short(one)}): {error}") from None
    return Watch(
        model,
        optimizers,
        window,
        samples,
        sinks,
        thresholds or Thresholds(),
        averages or {},
        seed,
        step,
        join,
        check_replicas,
    )


def _short(value: Any) -> str:
    """For messages: small values as they are, of others the type."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else type(value).__name__


def _named(model: Any) -> list[tuple[str, Tensor]]:
    if isinstance(model, torch.nn.Module):
        return list(model.named_parameters(remove_duplicate=False))
    try:
        pairs = [(str(name), tensor) for name, tensor in model]
    except (TypeError, ValueError):
        pairs = None  # type: ignore[assignment]
    if pairs is None or not all(isinstance(tensor, Tensor) for _, tensor in pairs):
        raise TypeError(
            f"watch(model={_short(model)}): expected a torch module or (name, tensor) pairs, as model.named_parameters()"
            " gives"
        )
    return pairs
