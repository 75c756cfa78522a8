"""One line in Hugging Face's Trainer (transformers 5 or later): `Trainer(..., callbacks=[UpdateWatch()])`.

Translates the Trainer's events; everything numerical is `update_watch.watch`. Gradient accumulation, clipping and
Accelerate's wrapped optimizer need no care of ours: torch's own step hooks fire once per real update.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from update_watch.callbacks.averages import average_models
from update_watch.callbacks.on_stall import OnStall, StallResponse
from update_watch.callbacks.options import AUTO, OnAudit, Options
from update_watch.callbacks.packed_state import packed, unpacked
from update_watch.callbacks.schedules import of_transformers
from update_watch.callbacks.session import (
    Names,
    Session,
    Sink,
    become,
    counts_to_show,
    harmless,
    logger,
    run_numbers,
    wandb_sink,
)
from update_watch.foresight.schedules import Schedule
from update_watch.report import Report
from update_watch.thresholds import Thresholds

try:
    from transformers.trainer_callback import CallbackHandler, ExportableState, TrainerCallback
except ImportError as error:
    raise ImportError(
        "UpdateWatch for the Hugging Face Trainer needs transformers: pip install 'update-watch[transformers]'"
    ) from error


class UpdateWatch(TrainerCallback, ExportableState):
    """Tells whether the stored weights receive what the optimizer intends, and if not, why.

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[UpdateWatch()])
        trainer.train()
        print(callback.last.headline)

    Reports are numbered by the Trainer's `global_step`. Their run-level numbers go to `state.log_history` (and so into
    trainer_state.json); everything goes to the W&B run, where the Trainer reports to one.

    Args:
        window: optimizer steps per report.
        samples: elements looked at per parameter.
        sinks: functions that take a `Report`, called on a background thread of rank 0.
        thresholds: limits of the verdicts and alerts; None for the defaults.
        averages: averaged models by name, as a module or as the path of an attribute of the model; with its decay where
            the module does not tell, as in {"ema": ("ema", 0.999)}.
        seed: of the choice of samples. No global random state is used.
        on_stall: what to do when a tensor stalls. "warn": log it, nothing else. "stop": save a checkpoint and end the
            run in good order. "raise": raise StalledError. A function: called with the Report on rank 0, in the
            training thread; the run is stopped as with "stop" when it returns True.
        progress_bar: add `efficiency` and `stalled` to the lines the Trainer prints.
        print_audit: say in one to three lines, when training begins, what will stall, or that nothing will; "full": the whole audit.
        on_audit: what is done with it: "warn"; "raise" `update_watch.StallExpected` where something will stall, which ends
            the training before its first step; or a function of the `Audit`.
        check_replicas: compare once a window what ranks should store alike; a tensor that differs is `broken`.
        include: names with wildcards ("*norm*") of the tensors that are reported; everything is watched.
        exclude: of those that are not.
        schedule: what reports forecast along: "auto", the trainer's where it is known beforehand; an `update_watch.Schedule(rate, steps)`,
            as where rates are set by hand; None: nothing is forecast.
        budget: share of the time between steps that watching may take once every tensor has a verdict; None: see every step.
        journal: file that `update-watch report` and `top` read; "auto": update_watch.jsonl beside the checkpoints (output_dir); None: none is kept.

    Attributes:
        last: the last Report, or None; on rank 0, also after training.
        memory: what verdicts and alerts remember between windows, kept in checkpoints.
        left_out: options that a callback made from a checkpoint is without.
    """

    def __init__(
        self,
        window: int = 128,
        samples: int = 256,
        sinks: Sequence[Sink] = (),
        thresholds: Thresholds | None = None,
        averages: Mapping[str, Any] | None = None,
        seed: int = 0,
        on_stall: OnStall = "warn",
        progress_bar: bool = True,
        print_audit: bool | Literal["full"] = True,
        check_replicas: bool = False,
        budget: float | None = 0.01,
        journal: str | os.PathLike[str] | None = AUTO,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        on_audit: OnAudit = "warn",
        schedule: Schedule | Literal["auto"] | None = "auto",
    ) -> None:
        self._options = Options(
            *(window, samples, sinks, thresholds, averages, seed, on_stall, progress_bar, print_audit, check_replicas),
            *(budget, journal, include, exclude, on_audit, schedule),
        )
        self.last: Report | None = None
        self.memory: dict[str, Any] = {}
        self.left_out: list[str] = []
        self._has_begun = False
        self._session: Session | None = None
        self._response: StallResponse | None = None
        self._is_in_step = False
        self._trackers: list[TrainerCallback] = []

    state_key = "UpdateWatch"  # Lightning's Trainer reads it before anything else

    def setup(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's Trainer was given this callback, and calls this first: it becomes the one made for that Trainer."""
        become(self, "lightning")
        return self.setup(*args, **kwargs)

    @harmless
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach: weights, optimizer state and the Trainer's state are restored."""
        self._end(args, state, control)
        self._has_begun = True
        if self.left_out and state.is_world_process_zero:
            logger.warning(
                "update-watch: the callback is made anew from the checkpoint, without its %s: none can hold them. To keep"
                " those that you give, leave out restore_callback_states_from_checkpoint=True",
                ", ".join(self.left_out),
            )
        # the Trainer looks up every stateful callback here when it saves, also after resuming a run without this one
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        model, is_leader = kwargs["model"], state.is_world_process_zero
        averages = average_models((), self._options.averages, model)
        dashboards = [wandb_sink(run, "train/global_step") for run in _wandb_runs(args)] if is_leader else []
        names = Names(model)
        self._trackers = _trackers() if is_leader else []
        self._is_in_step = False
        step = functools.partial(self._global_step, state)
        self._session = Session(
            self._options,
            names,
            [kwargs["optimizer"]],
            step,
            averages,
            dashboards,
            is_leader,
            *(
                args.output_dir,
                "trl" if type(args).__module__.startswith("trl.") else "transformers",
                self._options.schedule_or(lambda: of_transformers(kwargs.get("lr_scheduler"), state)),
            ),
        )
        any_rank = functools.partial(_any_rank, device=args.device)
        self._response = StallResponse(
            self._options.on_stall,
            self._options.window,
            state.global_step,
            args.world_size,
            is_leader,
            any_rank,
        )
        memory = (stored[-1] if isinstance(stored, list) else stored).get("attributes", {}).get("memory")
        if state.global_step > 0 and memory:
            self._session.restore(unpacked(memory))
        self._session.audit(averages, dashboards, any_rank)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The update that comes is counted by the Trainer when it is done."""
        self._is_in_step = True
        if not self._has_begun:
            self._has_begun = True
            logger.warning(
                "update-watch: added when training had begun, the callback watches the next one only; give it to the Trainer"
            )

    def _global_step(self, state: Any) -> int:
        return int(state.global_step) + self._is_in_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Take note of what arrived; act on stalls."""
        self._is_in_step = False
        is_last = control.should_training_stop or state.global_step >= state.max_steps
        reports = self._collect(args, state, control, kwargs.get("optimizer"), is_last)
        if self._session is not None and self._response is not None:
            for report in reports or ():
                self._response.hear(report)
            if self._response.is_stop(state.global_step):
                logger.warning("update-watch: training is stopped with a checkpoint because tensors stalled")
                control.should_training_stop = control.should_save = True
        return control

    @harmless
    def _collect(self, args: Any, state: Any, control: Any, optimizer: Any, is_last: bool) -> list[Report]:
        """The reports that came, noted; after the last step that of the window that is open, before the summary."""
        if self._session is None:
            return []
        self._session.has_begun = True
        if optimizer is not None:
            self._session.follow([optimizer])
        reports = self._session.finish() if is_last else self._session.take()
        for report in reports:
            self._note(args, state, control, report)
        return reports

    def _note(self, args: Any, state: Any, control: Any, report: Report) -> None:
        self.last = report
        numbers = run_numbers(report)
        epoch = {} if state.epoch is None else {"epoch": state.epoch}
        state.log_history.append({**numbers, **epoch, "step": report.step})
        then = copy.copy(state)  # trackers log under the state's step; reports come some steps late
        then.global_step = report.step
        for tracker in list(self._trackers):
            try:
                tracker.on_log(args, then, control, logs=dict(numbers))
            except Exception as error:
                self._trackers.remove(tracker)
                logger.warning("update-watch: %s takes none of its numbers: %r", type(tracker).__name__, error)

    @harmless
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add to the line that is printed; the Trainer's progress bar and printer come after this callback."""
        if self._options.progress_bar and self.last is not None and logs is not None and "loss" in logs:
            if self.last.efficiency is not None:
                logs["efficiency"] = round(self.last.efficiency, 4)
            logs.update(counts_to_show(self.last))

    @harmless
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the last window where a loop ended early, let go of the optimizer."""
        self._is_in_step = False
        self._end(args, state, control)

    def _end(self, args: Any, state: Any, control: Any) -> None:
        session, self._session = self._session, None
        if session is not None:
            try:
                for report in session.finish():
                    self._note(args, state, control, report)
                self.memory = session.watch.state_dict()
            finally:
                session.close()

    def state(self) -> dict[str, Any]:
        """For the Trainer's checkpoint: plain data.

        With `restore_callback_states_from_checkpoint=True` the Trainer makes a new callback from this, without sinks,
        thresholds, averages and functions, which no checkpoint can hold; training begins with a warning then.
        """
        kept = {name: _plain(getattr(self._options, name)) for name in _KEPT}
        left_out = [name for name in _LEFT_OUT if getattr(self._options, name)]
        left_out += [name for name, value in kept.items() if value is _NOT_PLAIN]
        args = {name: value for name, value in kept.items() if value is not _NOT_PLAIN}
        memory = self._session.watch.state_dict() if self._session is not None else self.memory
        return {"args": args, "attributes": {"memory": packed(memory), "left_out": left_out}}


_LEFT_OUT = ("sinks", "thresholds", "averages")
_KEPT = tuple(field.name for field in dataclasses.fields(Options) if field.name not in _LEFT_OUT)
_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """An option as a checkpoint holds it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    return value if value is None or isinstance(value, (str, int, float)) else _NOT_PLAIN


def _trackers() -> list[TrainerCallback]:
    """The Trainer's own callbacks for what it reports to, but for W&B, which has a sink of its own.

    No event hands a callback its neighbours; the handler that calls it is on the stack.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    callbacks = frame.f_locals["self"].callbacks if frame is not None else []
    kinds = ((one, type(one)) for one in callbacks)
    return [
        one
        for one, kind in kinds
        if kind.__module__.startswith("transformers.integrations") and kind.__name__ != "WandbCallback"
    ]


def _any_rank(flag: bool, *, device: Any) -> bool:
    if not torch.distributed.is_initialized():
        return flag
    votes = torch.tensor([float(flag)], device=device)
    torch.distributed.all_reduce(votes)
    return bool(votes.item())


def _wandb_runs(args: Any) -> list[Any]:
    """The run the Trainer reports to; its own W&B callback has started it by now."""
    if "wandb" not in (args.report_to or ()):
        return []
    import wandb

    return [wandb.run] if wandb.run is not None else []
