"""A training that ends and goes on at another number of ranks: weights, optimizer and watch from one checkpoint.

Cases for `cases.launch`; what follows the colon is "kind,from,to": how the model is shared, and checkpoints' names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import update_watch as uw
from tests.support.ranks.cases import SAMPLES, Case, Net, Reports, ddp, fsdp2, watched_truth

LR = 2e-4  # low: every tensor is stalling
FIRST, THEN = 4, 44  # steps: too few for a verdict without what the watch remembers, and enough
MARGIN = 0.1  # efficiencies of another training, on other batches, come as near to each other

FOLDER = "RANK_RESUME_FOLDER"  # in the environment, of the checkpoints


def _case(kind: str) -> Case:
    if kind == "fsdp2":
        case = fsdp2(48, 61, 40)  # uneven
    elif dist.get_world_size() == 1:  # nobody wraps a model for one process
        net = Net(48, 64, 40)
        case = Case(net, torch.optim.AdamW(net.parameters()), 48)
    else:
        case = ddp()
        case.named = list(case.model.named_parameters())  # "module.layers.0.weight"
    for group in case.optimizer.param_groups:
        group["lr"] = LR
    return case


def _path(name: str) -> Path:
    return Path(os.environ[FOLDER], f"{name}.pt")


def begin(arguments: str) -> dict[str, Any]:
    """ "kind,to": 48 steps, and a checkpoint."""
    kind, to = arguments.split(",")
    case = _case(kind)
    watch = uw.watch(case.model, case.optimizer, window=FIRST + THEN, samples=SAMPLES, budget=None)
    watched_truth(case, FIRST + THEN)
    report = watch.flush()
    assert report is not None
    state = watch.state_dict()
    _save(case, state, to, [t.efficiency for t in report.tensors])
    watch.close()
    return {"state": state, "reports": [report.to_dict()]}


def go_on(arguments: str, remembers: bool = True) -> dict[str, Any]:
    """ "kind,from,to": all from the checkpoint; windows of 4 and 44 steps, and a checkpoint.

    A tensor that is stalling stays so until its efficiency is well above what it was; to one that nobody remembers it
    would be good enough.
    """
    kind, begun, to = arguments.split(",")
    saved = torch.load(_path(begun), weights_only=True)
    case = _case(kind)
    set_state_dict(
        case.model,
        case.optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    low, high = min(saved["efficiencies"]), max(saved["efficiencies"])
    limits = uw.Thresholds(stalling=low - MARGIN, stalling_exit=min(high + MARGIN, 1.0))
    reports = Reports()
    watch = uw.watch(
        case.model, case.optimizer, window=1000, samples=SAMPLES, thresholds=limits, sinks=[reports], budget=None
    )
    if remembers:
        watch.load_state_dict(saved["watch"])
    watched_truth(case, FIRST, seed=2)
    watch.flush()
    truth = watched_truth(case, THEN, seed=3)
    watch.flush()
    state = watch.state_dict()
    if to:
        _save(case, state, to, saved["efficiencies"])
    watch.close()
    return {
        "before": saved["watch"],
        "state": state,
        "reports": [r.to_dict() for r in reports],
        "truth": {name.removeprefix("module."): values for name, values in truth.items()},
        "joined": watch._ranks.joined,
    }


def begin_anew(arguments: str) -> dict[str, Any]:
    """Weights and optimizer from the checkpoint, a watch that remembers nothing."""
    return go_on(f"{arguments},", remembers=False)


def _save(case: Case, state: dict[str, Any], name: str, efficiencies: list[float | None]) -> None:
    assert json.loads(json.dumps(state)) == state
    model, optimizer = get_state_dict(
        case.model, case.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        values = {"model": model, "optimizer": optimizer, "watch": state, "efficiencies": efficiencies}
        torch.save(values, _path(name))
    dist.barrier()
