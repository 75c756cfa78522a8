"""The learning rate over a run, as a trainer's schedulers know it beforehand: what forecasts are made along."""

from __future__ import annotations

import math
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from update_watch.foresight.schedules import Schedule, schedule_of

_MOST = 20_000  # calls of a scheduler that are tried out when training begins; one call takes some 10 us


def coming_rates(scheduler: Any, steps: float, every: int = 1) -> Schedule | None:
    """The schedule of a run of `steps` optimizer steps whose scheduler is called after every so many of them.

    None where it is not known beforehand: no end, rates that depend on the loss, a scheduler that cannot be tried out.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's wrapper
    if scheduler is None or not math.isfinite(steps) or steps < 1 or every < 1:
        return None
    calls = math.ceil(steps / every)
    try:
        if isinstance(scheduler, LambdaLR):
            pairs = list(zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True))
            call = Schedule(lambda at: max(float(base) * float(share(at)) for base, share in pairs), calls)
            call.rate(0)
        elif calls <= _MOST:
            call = schedule_of(scheduler, calls)
        else:
            return None
    except Exception:  # a scheduler of somebody's: no forecast, and nothing else
        return None
    return Schedule(lambda step: call.rate(min(step // every, calls)), int(steps))


def of_lightning(trainer: Any) -> Schedule | None:
    """The schedule of the one optimizer that a Trainer has; None where it has several, or no scheduler."""
    if len(trainer.optimizers) != 1 or len(trainer.lr_scheduler_configs) != 1:
        return None
    config, steps = trainer.lr_scheduler_configs[0], trainer.estimated_stepping_batches
    epochs = trainer.max_epochs or -1
    if config.interval == "epoch" and epochs < 1:
        return None
    pace = math.ceil(steps / epochs) if config.interval == "epoch" and math.isfinite(steps) else 1
    return coming_rates(config.scheduler, steps, pace * config.frequency)
