"""Which trainer is at work: for the words of advice, and for nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

# package -> key in `cures.TRAINERS`; a trainer before those that it uses itself
_PACKAGES = {
    "trl": "trl",
    "transformers.trainer": "transformers",
    "torchtune": "torchtune",
    "torchtitan": "torchtitan",
    "composer": "composer",
    "lightning.pytorch": "lightning",
    "pytorch_lightning": "lightning",
    "lightning.fabric": "fabric",
    "lightning_fabric": "fabric",
    "accelerate": "accelerate",
    "deepspeed": "deepspeed",
}


def trainer_at_work(optimizers: Iterable[Any]) -> str:
    """The trainer that calls, or whose wrapper an optimizer wears; "torch" where neither tells."""
    modules = {*_calling(), *(type(optimizer).__module__ for optimizer in optimizers)}
    for package, trainer in _PACKAGES.items():
        if any(module == package or module.startswith(package + ".") for module in modules):
            return trainer
    return "torch"


def _calling() -> Iterator[str]:
    """Names of the modules whose functions are being run."""
    frame = sys._getframe(1)
    while frame is not None:
        yield str(frame.f_globals.get("__name__", ""))
        frame = frame.f_back  # type: ignore[assignment]
