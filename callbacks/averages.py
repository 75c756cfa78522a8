"""The averaged models of a training: those that the user named, and those of a trainer's own callbacks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

logger = logging.getLogger("update_watch")


def average_models(callbacks: Iterable[Any], chosen: Mapping[str, Any] | None, model: Any) -> dict[str, Any]:
    """Averaged models by name: those the user named, and those of Lightning's averaging callbacks.

    A text names an attribute of the model ("ema" or "teacher.net"), alone or as the first of (text, decay). One that is
    not there is said and left out.
    """
    averages: dict[str, Any] = {}
    for name, value in (chosen or {}).items():
        found, *decay = value if isinstance(value, (tuple, list)) else [value]
        try:
            found = functools.reduce(getattr, found.split("."), model) if isinstance(found, str) else found
        except AttributeError:
            logger.warning(
                "UpdateWatch(averages={%r: %r}): %s has no attribute %r; give the path of the averaged model on it, or "
                "the averaged model itself",
                *(name, value, type(model).__name__, found),
            )
            continue
        averages[name] = (found, *decay) if decay else found
    for callback in callbacks:
        # WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging of either namespace
        averaged = vars(callback).get("_average_model")
        if isinstance(averaged, torch.nn.Module):
            kind = type(callback).__name__
            base = "ema" if "EMA" in kind else "swa" if "Stochastic" in kind else "average"
            name, number = base, 2
            while name in averages:
                name, number = f"{base}{number}", number + 1
            averages[name] = _BegunLate(averaged) if base == "swa" else averaged
    return averages


class _BegunLate(torch.nn.Module):
    """An averaged model, which is made at the start and begun in the last part of a training."""

    begins_late = True

    def __init__(self, average: torch.nn.Module) -> None:
        super().__init__()
        self.module = average
