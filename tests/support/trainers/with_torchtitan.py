"""torchtitan's Trainer, watched before its `train()` as docs say; the cures of its table."""

from __future__ import annotations

import os
import sys

os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")

import tests.support.trainers.tiny_titan  # noqa: F401  before anything of torchtitan's

# isort: split
from torch import Tensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import ConfigManager
from torchtitan.train import main

import update_watch as uw
from tests.support.trainers.runs import STEPS, paste, same, tell, weights
from update_watch.cures import Cure, code

BF16 = "--training.dtype bfloat16"


def train(
    name: str, cure: str = "", settings: str = BF16, config: str = "tiny", watched: bool = True
) -> dict[str, Tensor]:
    text = code(Cure(cure), "torchtitan") if cure else ""
    known = OptimizersContainer._resolve_optimizer_factory
    if text.startswith("--"):
        settings = f"{settings} {text}"
    else:
        paste(cure, "torchtitan", OptimizersContainer=OptimizersContainer)
    chosen = ["--module", "tests.support.trainers.tiny_titan", "--config", config, "--debug.seed", "1"]
    trainer = ConfigManager().parse_args([*chosen, *settings.split()]).build()
    OptimizersContainer._resolve_optimizer_factory = staticmethod(known)
    model = trainer.model_parts[0]
    first = weights(model)
    watch = uw.watch(model, window=STEPS, budget=None) if watched else None
    trainer.train()
    if watch is not None:
        watch.close()
        tell(name, watch.last, watch.trainer, model, first)
    trainer.close()
    return weights(model)


if __name__ == "__main__":
    if sys.argv[1:]:  # as torchtitan is started
        main()
        sys.exit()
    plain = train("plain", watched=False)
    print("SAME", same(plain, train("plain")))
    for one in ("masters", "fp32_states", "kahan", "stochastic_rounding"):
        train(f"plain {one}", one)
    train("decay", settings=f"{BF16} --optimizer.implementation for-loop", config="decaying")
    train("decay fused_decay", "fused_decay", config="decaying")
