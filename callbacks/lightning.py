"""One line in Lightning: `Trainer(callbacks=[UpdateWatch()])`.

Translates the Trainer's hooks; everything numerical is `update_watch.watch`. When the Trainer calls what:

    on_fit_start        names of the parameters (FSDP2 shows other objects after a sanity check)
    on_train_start      weights, optimizer state and callback state are restored: attach, audit
    on_train_batch_*    look only at steps between the two: a learning-rate finder started mid-fit is not training
    on_train_end        last report; on_exception: let go (teardown is not called then)

Works with the Trainers of `lightning` and of `pytorch_lightning`.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from update_watch.callbacks.averages import average_models
from update_watch.callbacks.on_stall import OnStall, StallResponse, end_in_good_order
from update_watch.callbacks.options import AUTO, OnAudit, Options
from update_watch.callbacks.schedules import of_lightning
from update_watch.callbacks.session import (
    Names,
    Session,
    Sink,
    become,
    counts_to_show,
    harmless,
    run_numbers,
    wandb_sink,
)
from update_watch.callbacks.whole_counts import WholeCounts
from update_watch.foresight.schedules import Schedule
from update_watch.report import Report
from update_watch.thresholds import Thresholds

INSTALL_HINT = "UpdateWatch for Lightning needs lightning: pip install 'update-watch[lightning]'"


def _callback_class() -> Any:
    """The Callback class of the namespace in use; of both when both are loaded."""
    namespaces = ("lightning.pytorch", "pytorch_lightning")
    loaded = [sys.modules[name].Callback for name in namespaces if hasattr(sys.modules.get(name), "Callback")]
    if loaded:
        return loaded[0] if len(loaded) == 1 else type("Callback", tuple(loaded), {})
    for name in namespaces:
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    raise ImportError(INSTALL_HINT)


_Callback = _callback_class()
_LIGHTNINGS = ("log", "log_dict")  # attributes that every Trainer sets when it begins, bound to its module


class UpdateWatch(_Callback):  # type: ignore[misc, valid-type]  # known only when it runs
    """Tells whether the stored weights receive what the optimizer intends, and if not, why.

    Example:
        trainer = Trainer(callbacks=[UpdateWatch()])
        trainer.fit(model)
        print(callback.last.headline)

    Reports are numbered like the x axis of Lightning's loggers: batches that stepped, counted from 0.

    Args:
        window: optimizer steps per report.
        samples: elements looked at per parameter.
        sinks: functions that take a `Report`, called on a background thread of rank 0.
        thresholds: limits of the verdicts and alerts; None for the defaults.
        averages: further averaged models by name, as a module or as the path of an attribute of the LightningModule;
            with its decay where the module does not tell, as in {"ema": ("ema", 0.999)}. Those of Lightning's
            WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging are found without it.
        seed: of the choice of samples. No global random state is used.
        on_stall: what to do when a tensor stalls. "warn": log it, nothing else. "stop": save a checkpoint and end the
            run in good order. "raise": raise StalledError. A function: called with the Report on rank 0, in the
            training thread; the run is stopped as with "stop" when it returns True.
        progress_bar: show `efficiency` and `stalled` in the progress bar.
        print_audit: say in one to three lines, when training begins, what will stall, or that nothing will; "full": the whole audit.
        on_audit: what is done with it: "warn"; "raise" `update_watch.StallExpected` where something will stall, which ends
            the training before its first step; or a function of the `Audit`.
        check_replicas: compare once a window what ranks should store alike; a tensor that differs is `broken`.
        include: names with wildcards ("*norm*") of the tensors that are reported; everything is watched.
        exclude: of those that are not.
        schedule: what reports forecast along: "auto", the trainer's where it is known beforehand; an `update_watch.Schedule(rate, steps)`,
            as where rates are set by hand; None: nothing is forecast.
        budget: share of the time between steps that watching may take once every tensor has a verdict; None: see every step.
        journal: file that `update-watch report` and `top` read; "auto": update_watch.jsonl beside the logs (the first logger's folder); None: none is kept.

    Attributes:
        last: the last Report, or None; on rank 0, also after fit. Processes that `fit` spawns keep theirs.
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
        super().__init__()
        self._options = Options(
            *(window, samples, sinks, thresholds, averages, seed, on_stall, progress_bar, print_audit, check_replicas),
            *(budget, journal, include, exclude, on_audit, schedule),
        )
        self.last: Report | None = None
        self._is_automatic = False
        self._state: dict[str, Any] = {}
        self._model: weakref.ref[Any] | None = None  # whose state `_state` is; None: a checkpoint's
        self._names: Names | None = None
        self._session: Session | None = None
        self._response: StallResponse | None = None
        self._counts = WholeCounts(None)
        self._step = 0  # of the batch that runs, or ran last

    @classmethod
    def _of_environment(cls) -> UpdateWatch:
        """One that stands back where the Trainer has another."""
        callback = cls()
        callback._is_automatic = True
        return callback

    def on_init_end(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's Trainer was given this callback, and calls this first: it becomes the one made for that Trainer."""
        become(self, "transformers")
        return self.on_init_end(*args, **kwargs)

    # --- the fit begins ------------------------------------------------------------------------------

    @harmless
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take down the parameters' names."""
        self._names = None if self._is_spare(trainer) else Names(pl_module)

    @harmless
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the Trainer's optimizers, and audit."""
        self._end(trainer)
        if self._names is None or trainer.fast_dev_run:
            return
        averages = average_models(trainer.callbacks, self._options.averages, pl_module)
        is_leader = trainer.is_global_zero
        dashboards = [wandb_sink(run, "trainer/global_step") for run in _wandb_runs(trainer)] if is_leader else []
        self._step = _logged_step(trainer)
        session = Session(
            self._options,
            self._names,
            trainer.optimizers,
            lambda: self._step,
            averages,
            dashboards,
            is_leader,
            *(_log_folder(trainer), "lightning", self._options.schedule_or(lambda: of_lightning(trainer))),
        )
        self._session = session
        self._counts = WholeCounts(trainer.progress_bar_callback)
        session.watch.enabled = False
        is_same_model = self._model is None or self._model() is pl_module
        if self._state and is_same_model:
            session.restore(self._state)
        self._model = weakref.ref(pl_module)
        any_rank = functools.partial(trainer.strategy.reduce_boolean_decision, all=False)
        self._response = StallResponse(
            self._options.on_stall,
            self._options.window,
            trainer.global_step,
            trainer.world_size,
            is_leader,
            any_rank,
        )
        session.audit(averages, dashboards, any_rank)

    def _is_spare(self, trainer: Any) -> bool:
        """Whether it was added by the environment to a Trainer that has one from its user."""
        return self._is_automatic and any(isinstance(c, UpdateWatch) and c is not self for c in trainer.callbacks)

    # --- steps -----------------------------------------------------------------------------------------

    @harmless
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Steps count from here. Optimizers made since are watched too."""
        if self._session is not None:
            self._step = _logged_step(trainer)
            self._session.follow(trainer.optimizers)
            self._session.watch.enabled = True

    @harmless
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Optimizers made in the middle of a batch: watched from their second step."""
        if self._session is not None and self._session.watch.enabled:
            self._session.follow(trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what arrived; act on stalls."""
        reports = self._collect(trainer, pl_module, batch_idx)
        if self._session is not None and self._response is not None:
            for report in reports or ():
                self._response.hear(report)
            if self._response.is_stop(trainer.global_step):
                end_in_good_order(trainer)

    @harmless
    def _collect(self, trainer: Any, pl_module: Any, batch_idx: int) -> list[Report]:
        """The reports that came, logged."""
        session = self._session
        if session is None:
            return []
        session.watch.enabled, session.has_begun = False, True
        reports = session.take()
        for report in reports:
            self.last = report
            _log(trainer, report)
        # Lightning forgets what was logged at the end of an epoch
        if self._options.progress_bar and self.last is not None and (reports or batch_idx == 0):
            numbers = {"efficiency": self.last.efficiency, **counts_to_show(self.last)}
            for name, value in numbers.items():
                if value is not None:
                    pl_module.log(
                        name,
                        float(value),
                        prog_bar=True,
                        logger=False,
                        on_step=True,
                        on_epoch=False,
                        rank_zero_only=True,
                    )
        return reports

    # --- the fit ends -----------------------------------------------------------------------------------

    @harmless
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the last window, let go of the optimizers."""
        self._end(trainer)

    @harmless
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the optimizers."""
        self._end(trainer)
        self._let_go()

    @harmless
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Report the last window, let go of the optimizers; Lightning does not call `teardown` after an error."""
        self._end(trainer)
        self._let_go()

    def _let_go(self) -> None:
        """Of the module, which whoever reads `last` after fit would keep in memory."""
        self._names = None
        for name in _LIGHTNINGS:
            self.__dict__.pop(name, None)

    def _end(self, trainer: Any) -> None:
        self._counts.end()
        session, self._session, self._response = self._session, None, None
        if session is None:
            return
        try:
            for report in session.finish():
                self.last = report
                _log(trainer, report)
            self._state = session.watch.state_dict()
        finally:
            session.close()

    # --- state ------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Under which key a checkpoint holds the state."""
        return "UpdateWatch(automatic)" if self._is_automatic else "UpdateWatch"

    def state_dict(self) -> dict[str, Any]:
        """Plain data, safe to load weights-only: what verdicts and alerts remember between windows."""
        return dict(self._session.watch.state_dict() if self._session is not None else self._state)

    @harmless
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before or after `on_fit_start`, and in the middle of a fit by a learning-rate finder."""
        self._state, self._model = dict(state_dict), None
        if self._session is not None:
            self._session.restore(self._state)

    def __getstate__(self) -> dict[str, Any]:
        """Without threads, hooks and references: strategies that spawn processes pickle their callbacks."""
        fresh = {
            "_session": None,
            "_response": None,
            "_counts": WholeCounts(None),
            "_names": None,
            "_model": None,
            "_state": self.state_dict(),
        }
        return {**{name: value for name, value in self.__dict__.items() if name not in _LIGHTNINGS}, **fresh}


def _logged_step(trainer: Any) -> int:
    """The x axis of Lightning's loggers; it is `global_step` only where one optimizer steps once per batch."""
    loop = trainer.fit_loop.epoch_loop
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def _log_folder(trainer: Any) -> str | None:
    """Where the first logger of this run writes; asked of the logger, as the Trainer's own answer is a collective."""
    for one in trainer.loggers[:1]:
        folder = getattr(one, "log_dir", None)
        if folder is None and one.save_dir is not None:
            version = one.version if isinstance(one.version, str) else f"version_{one.version}"
            folder = os.path.join(one.save_dir, str(one.name), version)
        return folder if isinstance(folder, str) else None
    return None


def _is_wandb(trainer_logger: Any) -> bool:
    return any(kind.__name__ == "WandbLogger" for kind in type(trainer_logger).__mro__)


def _wandb_runs(trainer: Any) -> list[Any]:
    return [one.experiment for one in trainer.loggers if _is_wandb(one)]


def _log(trainer: Any, report: Report) -> None:
    """The run's numbers, through every logger; W&B has them from its sink."""
    numbers = run_numbers(report)
    for one in trainer.loggers:
        if not _is_wandb(one):
            one.log_metrics(numbers, step=report.step)
