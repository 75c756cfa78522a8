"""What `watch` may be called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from update_watch.measure.identity.names import short
from update_watch.measure.identity.partitions import chain
from update_watch.thresholds import Thresholds
from update_watch.wrappers import unwrap


def check(
    optimizer: Any,
    window: Any,
    samples: Any,
    budget: Any,
    sinks: Any,
    thresholds: Any,
    averages: Any,
    seed: Any,
    step: Callable[[], int] | None,
    join: Any,
    check_replicas: Any,
) -> list[Any]:
    """The optimizers in `optimizer`.

    Raises:
        ValueError, TypeError: for arguments that cannot be used; the message names argument, value and remedy.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(
            f"watch(window={window!r}): the optimizer steps per report must be a whole number of 1 or more"
        )
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 4:
        raise ValueError(f"watch(samples={samples!r}): the elements per parameter must be a whole number of 4 or more")
    is_number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if budget is not None and not (is_number and 0 < budget <= 1):
        raise ValueError(
            f"watch(budget={short(budget)}): the share of the time between steps must be above 0 and at most 1; "
            "None looks at every step"
        )
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        raise TypeError(f"watch(thresholds={thresholds!r}): expected update_watch.Thresholds or None")
    if isinstance(sinks, str) or not isinstance(sinks, Iterable):
        raise TypeError(f"watch(sinks={sinks!r}): expected a list of sinks, as in sinks=[Journal('run.jsonl')]")
    for sink in sinks:
        if not callable(sink):
            raise TypeError(
                f"watch(sinks=[{sink!r}]): a sink is a callable that takes a Report, such as a list's append"
            )
    if averages is not None and not isinstance(averages, Mapping):
        raise TypeError(
            f"watch(averages={short(averages)}): expected names and averaged models, as {{'ema': ema_model}}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"watch(seed={seed!r}): expected a whole number")
    if step is not None and not callable(step):
        raise TypeError(f"watch(step={step!r}): expected a function that returns the trainer's step, or None")
    if isinstance(join, (str, int, float)) and not isinstance(join, bool):
        raise TypeError(f"watch(join={join!r}): expected True, False or a process group")
    if not isinstance(check_replicas, bool):
        raise TypeError(f"watch(check_replicas={check_replicas!r}): expected True or False")
    if optimizer is None:
        return []
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not optimizers:
        raise ValueError(
            "watch(optimizer=[]): give at least one torch optimizer, or None: what steps the model is found"
        )
    for one in (member for optimizer in optimizers for member in chain(optimizer)):
        try:
            unwrap(one)
        except TypeError as error:
            if not isinstance(one, Optimizer):
                raise TypeError(f"watch(optimizer={short(one)}): {error}") from None
    return optimizers
