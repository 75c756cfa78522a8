"""Sees every step of a torch optimizer: just before its rule runs, and just after.

Two step hooks per optimizer. What makes it more than that:

- A step that is given a closure computes its gradients inside (Lightning's automatic optimization, LBFGS): at the
  pre-hook they are stale. So the pre-hook hands on a wrapped closure, and `before` runs when it first returns.
- A subclass whose `step` calls its parent's fires both hooks twice; wrapped optimizers (ZeRO) step inside a step. The
  frame that called the hook tells which step a hook belongs to. `_pre` and `_post` must therefore be called by torch
  itself: a decorator on them would add a frame and every step would be missed.
- A step that raises leaves its record behind; the next step replaces it.
- Another pre-hook registered after ours would run between our look and the rule, and may clip or unscale: the step is
  missed, and from the next one on ours is the last.
- A step that is captured in a CUDA graph runs later and often, without hooks: it passes unseen; see `around`.
- Training must not notice: an exception of ours ends in `on_error` and the tap lets go of everything.

Inside the hooks of a fused step under a GradScaler, and only there, `opt.found_inf` and `opt.grad_scale` exist.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer

from update_watch.measure.device import streams
from update_watch.measure.hooks.interrupts import Waiting
from update_watch.measure.hooks.registered import Hook, Hooked, RunningStep, nothing
from update_watch.measure.hooks.step_frames import hide_from_dynamo, is_in_step
from update_watch.measure.plain_torch import PlainTorch
from update_watch.wrappers import unwrap

logger = logging.getLogger("update_watch")

Before = Callable[[Optimizer], Any]
After = Callable[[Optimizer, Any], Any]
OnError = Callable[[Exception], Any]


class StepTap:
    """Calls `before(optimizer)` and `after(optimizer, snapshot)` around every step of the attached optimizers.

    `snapshot` is what `before` returned for this step. Both run in plain torch (`PlainTorch`) and are
    never traced by `torch.compile`. `before` sees this step's gradients, clipped and unscaled where that happens before the rule;
    gradients must not be read in `after`, since some rules overwrite them.

    An exception from either does not reach training: the tap detaches itself, ignores later `attach` calls, keeps the
    exception in `error` and calls `on_error(exception)`. That happens once.

    Steps captured in a CUDA graph are counted in `captured`, and `on_capture` is called at the first.
    Steps in which `before` could not run are counted in `missed`: a rule that never calls its closure, a hook of
    somebody else that takes the wrapped closure away, the first one after a pre-hook was added behind ours.
    """

    def __init__(
        self,
        before: Before,
        after: After,
        on_error: OnError | None = None,
        on_capture: Callable[[], Any] | None = None,
        wants: Callable[[Optimizer], bool] | None = None,
        passed: Callable[[Optimizer], Any] | None = None,
    ) -> None:
        self.enabled = True  # False: steps pass unseen
        self.missed = 0
        self.wants = wants  # asked whether a step is to be seen
        self.passed = passed  # told of one that was not, when it is over
        self.rests: Callable[[Optimizer], bool] | None = None  # asked before: whether it passes unseen, and
        self.rested: Callable[[Optimizer], Any] | None = None  # this is told of it. Not to be traced
        self.spend: Callable[[float], Any] = lambda _: None  # told the seconds that each hook took
        self.is_torn = False  # an interrupt has cut off a `before` or `after`: what they keep may be half done
        self.captured = 0  # steps that were recorded in a CUDA graph, not run
        self.error: Exception | None = None
        self._before, self._after, self._on_error, self._on_capture = before, after, on_error, on_capture
        self._hooked: dict[int, Hooked] = {}  # by id; the strong reference in it keeps the id from being reused
        self._live: dict[int, RunningStep] = {}
        self._leftover: list[Hook] = []  # replaced by a no-op, still to be removed
        self.lock = threading.RLock()  # held while one of our hooks runs; who closes windows from outside takes it too
        self._depth = 0  # of our hooks on the stack
        self._thread: int | None = None  # that steps
        self._snap = torch.compiler.disable(self._run_before)  # type: ignore[no-untyped-call]  # torch's
        self._begin = torch.compiler.disable(self._run_begin)  # type: ignore[no-untyped-call]
        self._finish = torch.compiler.disable(self._run_after)  # type: ignore[no-untyped-call]
        hide_from_dynamo(StepTap._pre, StepTap._enter, StepTap._post, StepTap._tell, streams.is_capturing)

    def attach(self, optimizer: Any) -> None:
        """See the steps of `optimizer`; wrappers are looked through, one that is attached stays as it is.

        Raises:
            TypeError: no torch optimizer is found in it.
        """
        opt = unwrap(optimizer)
        self._sweep()
        if id(opt) not in self._hooked and self.error is None:
            pre = Hook(opt, "_optimizer_step_pre_hooks", opt.register_step_pre_hook(self._pre))
            post = Hook(opt, "_optimizer_step_post_hooks", opt.register_step_post_hook(self._post))
            self._hooked[id(opt)] = Hooked(opt, pre, post)

    def detach(self, optimizer: Any = None) -> None:
        """Remove the hooks from `optimizer`, or from all. May be called again, from a hook and from another thread.

        A hook that torch may be iterating over right now becomes a no-op at once and is removed at the next `attach`
        or `detach`: removing it would raise in the training loop.
        """
        ids = list(self._hooked) if optimizer is None else [id(unwrap(optimizer))]
        for key in ids:
            hooked = self._hooked.pop(key, None)
            self._live.pop(key, None)
            if hooked is not None:
                self._leftover += [hooked.pre, hooked.post]
        for hook in self._leftover:
            hook.silence()
        self._sweep()

    @property
    def attached(self) -> tuple[Optimizer, ...]:
        """The optimizers whose steps are seen."""
        return tuple(hooked.optimizer for hooked in self._hooked.values())

    @property
    def is_running(self) -> bool:
        """Whether one of our hooks is on the stack."""
        return self._depth > 0

    def is_mid_step(self) -> bool:
        """Whether another thread is between the two hooks of a step."""
        return bool(self._live) and self._thread != threading.get_ident()

    @contextmanager
    def around(self, optimizer: Any) -> Iterator[None]:
        """See, as one step of `optimizer`, what happens inside: the replay of a graph that its step was captured in."""
        opt = unwrap(optimizer)
        step = RunningStep(sys._getframe())
        is_seen = self.enabled and id(opt) in self._hooked and not streams.is_capturing()
        if is_seen:
            self._run_before(opt, step)
        yield
        if is_seen and step.is_seen:
            self._run_after(opt, step)

    def outside(self, optimizer: Optimizer) -> list[Optimizer]:
        """The attached optimizers within whose steps this one steps."""
        running = [hooked.optimizer for key, hooked in self._hooked.items() if key in self._live]
        if not any(one is not optimizer for one in running):
            return []
        frames = set()
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            frames.add(frame)
            frame = frame.f_back
        return [one for one in running if one is not optimizer and self._live[id(one)].frame in frames]

    def mend(self, renew: Callable[[], None]) -> None:
        """Where an interrupt has cut a `before` or `after` off, `renew` what they keep: it may be half done."""
        if self.is_torn:
            renew()
            self.is_torn = False  # not before: an interrupt may come in there too

    def replace(self, before: Before) -> None:
        """From now on call `before` instead."""
        self._before = before

    def _sweep(self) -> None:
        if self._depth == 0 and self._thread in (None, threading.get_ident()) and not is_in_step(sys._getframe()):
            for hook in self._leftover:
                hook.handle.remove()
            self._leftover.clear()

    # --- the hooks: no decorators here, see above ----------------------------------------------------

    def _pre(self, opt: Optimizer, args: Any, kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._enter(opt, args, kwargs, sys._getframe(1))
        finally:
            self.spend(time.perf_counter() - began)

    def _enter(self, opt: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> Any:
        if not self.enabled:
            self._live.pop(id(opt), None)
            return None
        if streams.is_capturing():  # what we did here would be replayed, into memory that is no longer ours
            self._live.pop(id(opt), None)
            self.captured += 1
            if self.captured == 1 and self._on_capture is not None:
                self._on_capture()
            return None
        if self._is_nested(opt, frame):
            return None
        step = self._live[id(opt)] = RunningStep(frame)
        self._thread = threading.get_ident()
        if self.rests is not None:  # with little code: after a backward pass none of it is in the caches
            try:
                with self.lock:
                    step.is_resting = self.rests(opt)
            except Exception as error:  # noqa: BLE001  whatever it is, it must not reach training
                self._fail(error)
            if step.is_resting:
                return None
        position = 1 if len(args) > 1 else None
        closure = args[1] if position else kwargs.get("closure")
        is_later = callable(closure)
        self._begin(opt, step, is_later)
        if step.is_unwanted or not is_later:
            return None

        def observed(*closure_args: Any, **closure_kwargs: Any) -> Any:
            result = closure(*closure_args, **closure_kwargs)
            began = time.perf_counter()
            self._snap(opt, step)
            self.spend(time.perf_counter() - began)
            return result

        if position:
            return (args[0], observed, *args[2:]), kwargs
        return args, {**kwargs, "closure": observed}

    def _post(self, opt: Optimizer, args: Any, kwargs: Any) -> None:
        step = self._live.get(id(opt))
        if step is not None and step.frame is sys._getframe(1):
            began = time.perf_counter()
            try:
                if step.is_resting:
                    self._tell(self.rested, opt)
                else:
                    self._finish(opt, step)
            finally:  # till then it is the middle of the step
                self._live.pop(id(opt), None)
                self.spend(time.perf_counter() - began)
            if not step.is_resting and not self._is_last(opt):
                self._go_last(opt, step.frame)

    def _is_last(self, opt: Optimizer) -> bool:
        """Whether no hook of somebody else comes between ours and the rule; it could change gradients and settings."""
        hooked = self._hooked.get(id(opt))
        if hooked is None:
            return True
        for number in reversed(hooked.pre.hooks):
            if number == hooked.pre.handle.id:
                return True
            hook = hooked.pre.hooks[number]
            if hook is not nothing and not isinstance(getattr(hook, "__self__", None), StepTap):
                return False
        return True

    def _go_last(self, opt: Optimizer, frame: FrameType) -> None:
        """Move our pre-hook behind those that were registered since."""
        if not is_in_step(frame.f_back):  # else a hook steps: torch may be iterating over the hooks, and would raise
            hooked = self._hooked[id(opt)]
            hooked.pre.hooks.move_to_end(hooked.pre.handle.id)

    def _is_nested(self, opt: Optimizer, frame: FrameType | None) -> bool:
        """Whether this hook call lies inside an outer step of the same optimizer, rather than after one that raised."""
        step = self._live.get(id(opt))
        while step is not None and frame is not None:
            if frame is step.frame:
                return True
            frame = frame.f_back
        return False

    def _run_begin(self, opt: Optimizer, step: RunningStep, is_later: bool) -> None:
        """Ask about a step that begins, and look at it. `is_later`: when its closure has run."""
        step.is_unwanted = self._is_unwanted(opt)
        if not step.is_unwanted and not is_later and self._is_last(opt):
            self._run_before(opt, step)

    def _is_unwanted(self, opt: Optimizer) -> bool:
        try:
            with self.lock:
                return self.wants is not None and not self.wants(opt)
        except Exception as error:  # noqa: BLE001  whatever it is, it must not reach training
            self._fail(error)
            return True

    def _tell(self, passed: Callable[[Optimizer], Any] | None, opt: Optimizer) -> None:
        try:
            with self.lock:
                if passed is not None and self.error is None:
                    passed(opt)
        except Exception as error:  # noqa: BLE001  whatever it is, it must not reach training
            self._fail(error)

    def _run_before(self, opt: Optimizer, step: RunningStep) -> None:
        if step.is_seen or self.error is not None:
            return
        step.is_seen = True  # before the call: a closure called again must not try again
        step.snapshot = self._run(opt, self._before)

    def _run_after(self, opt: Optimizer, step: RunningStep) -> None:
        if step.is_unwanted:
            self._tell(self.passed, opt)
            return
        if not step.is_seen:
            self.missed += 1
            return
        self._run(opt, self._after, step.snapshot)

    def _run(self, opt: Optimizer, measure: Callable[..., Any], *more: Any) -> Any:
        inside, found, is_done = _Inside(self, opt), None, False
        try:
            with self.lock, inside, inside:
                found = measure(opt, *more)
                is_done = True
        except Exception as error:  # noqa: BLE001  whatever it is, it must not reach training
            self._fail(error)
        except BaseException:  # an interrupt that did not wait
            self.is_torn = self.is_torn or not is_done
            raise
        inside.interrupts.tell()
        return found

    def _fail(self, error: Exception) -> None:
        self.error = error
        self.detach()
        if self._on_error is None:
            logger.error("update-watch: a step hook failed and is removed: %r", error, exc_info=error)
            return
        try:
            self._on_error(error)
        except Exception as second:
            logger.error("update-watch: on_error failed: %r", second, exc_info=second)


class _Inside(PlainTorch):
    """One of our hooks is on the stack, and runs in plain torch. Ctrl-C waits."""

    __slots__ = ("_depth", "_tap", "interrupts")

    def __init__(self, tap: StepTap, opt: Optimizer) -> None:
        super().__init__(opt)
        self._tap, self._depth, self.interrupts = tap, tap._depth, Waiting()

    def change(self) -> None:
        self.interrupts.begin()
        self._tap._depth = self._depth + 1
        super().change()

    def undo(self) -> None:
        super().undo()
        self._tap._depth = self._depth
        self.interrupts.end()
