"""DeepSpeed, where it holds no FP32 weights: without `bf16` in its configuration, and told to hold BF16 ones; the cures of its table."""

from __future__ import annotations

import os
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0", LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")

import deepspeed
import torch
from torch import Tensor

import update_watch as uw
from tests.support.trainers.runs import LR, STEPS, batches, net, paste, same, tell, weights

UNTOUCHED: dict[str, Any] = {}
LOW = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
SHARED = {"bf16": LOW, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


def train(
    name: str, config: dict[str, Any], cure: str = "", watched: bool = True, given: bool = False
) -> dict[str, Tensor]:
    model = net()
    first = weights(model)
    config = {"train_micro_batch_size_per_gpu": 8, **config}
    space = paste(cure, "deepspeed", model=model, config=config)
    optimizer = space.get("optimizer") or torch.optim.AdamW(model.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    watch = uw.watch(model, *([engine.optimizer] if given else []), window=STEPS) if watched else None
    for batch in batches():
        engine.backward(engine(batch))
        engine.step()
    if watch is not None:
        watch.close()
        tell(name, watch.last, watch.trainer, model, first)
    return weights(model)


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for name, config in {"plain": UNTOUCHED, "zero-1": SHARED}.items():
        plain, watched = train(name, config, watched=False), train(name, config)
        print("SAME", same(plain, watched))
        for cure in ("masters", "fp32_states", "kahan", "stochastic_rounding"):
            train(f"{name} {cure}", config, cure)
    third = {**SHARED, "zero_optimization": {"stage": 3}}
    train("zero-3 given", third, given=True)
    train("zero-3", third)
    train("zero-3 masters", third, "masters")
