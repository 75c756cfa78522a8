"""The learning rate over a run as its trainer has it configured, for the forecast; None where that is not known beforehand."""

from __future__ import annotations

import logging
import math
from typing import Any

from update_watch.foresight.schedules import Schedule, schedule_of

logger = logging.getLogger("update_watch")


def of_lightning(trainer: Any) -> Schedule | None:
    """Of a Lightning Trainer whose training begins: one optimizer, one scheduler, and an end that is known."""
    try:
        configs = trainer.lr_scheduler_configs
        is_automatic = trainer.lightning_module.automatic_optimization
        if len(configs) != 1 or len(trainer.optimizers) != 1 or not is_automatic:
            return None
        (config,) = configs
        steps = float(trainer.estimated_stepping_batches)
        if config.reduce_on_plateau or not math.isfinite(steps) or steps < 1:
            return None
        batches = float(trainer.num_training_batches)
        summed = int(trainer.accumulate_grad_batches)
        if config.interval == "step":  # asked after the batches that step the optimizer, and there every `frequency`
            period = math.lcm(summed, int(config.frequency)) // summed
        elif math.isfinite(batches):
            period = math.ceil(batches / summed) * int(config.frequency)
        else:
            return None
        return schedule_of(config.scheduler, steps=int(steps), period=period, now=int(trainer.global_step))
    except Exception as error:
        logger.debug("update-watch: no forecast, the schedule is not known: %r", error)
        return None


def of_transformers(scheduler: Any, state: Any) -> Schedule | None:
    """Of HF's Trainer when its training begins: it steps its scheduler after every optimizer step."""
    try:
        inner = scheduler
        while hasattr(inner, "scheduler"):  # Accelerate's, which steps it once for each process
            if getattr(inner, "step_with_optimizer", False) and not inner.split_batches:
                return None
            inner = inner.scheduler
        if inner is None or state.max_steps < 1:
            return None
        return schedule_of(inner, steps=int(state.max_steps), now=int(state.global_step))
    except Exception as error:
        logger.debug("update-watch: no forecast, the schedule is not known: %r", error)
        return None
