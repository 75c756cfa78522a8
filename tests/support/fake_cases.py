"""Run as a script by test_device_cases.py: cases on a fake device, one process each. Prints one line of JSON.

python tests/support/fake_cases.py soak STEPS | compiled | offloaded
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW, Optimizer
from torch.utils import backend_registration

import update_watch as uw
from tests.support.fake_device import DEVICE, probes_outside
from tests.support.fake_window import Crossings
from update_watch.replay.twin import ReplayError, Run, Twin


def on_device(count: int) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(8, 64, device=DEVICE, dtype=torch.bfloat16)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def watched(params: list[torch.nn.Parameter], optimizer: Optimizer, window: int) -> uw.Watch:
    watch = uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=window, budget=None)
    watch._judge.put = lambda window: True  # type: ignore[method-assign]  # fake sums cannot be judged
    return watch


def told(watch: uw.Watch) -> dict[str, Any]:
    error = watch._tap.error
    rows = [row for one in watch._model.watched.values() for row in one.rows]
    return {"error": repr(error) if error else "", "reasons": sorted({row.reason for row in rows if row.reason})}


def soak(steps: int) -> dict[str, Any]:
    """Many steps: what the interpreter holds after two, three and four quarters of them.

    The mode's own cache of operators, which grows with every new one, is off. In whole spans of the ledger (8 windows of 16
    steps) each quarter ends in the same phase.
    """
    probes_outside(AdamW([torch.nn.Parameter(torch.randn(8, 64, dtype=torch.bfloat16))], fused=True))
    mode = FakeTensorMode()
    mode.cache_enabled = False
    with mode:
        params = on_device(2)
        optimizer = AdamW(params, fused=True)
        watch = watched(params, optimizer, 16)
        blocks, objects = [], []
        for i in range(steps):
            optimizer.step()
            if i + 1 in (steps // 2, steps // 4 * 3, steps):
                gc.collect()
                blocks.append(sys.getallocatedblocks())
                objects.append(len(gc.get_objects()))
        found, seen = told(watch), watch.step
        watch.detach()
    return {**found, "blocks": blocks, "objects": objects, "seen": seen}


def _run() -> Run:
    state = {k: torch.zeros(4, device=DEVICE) for k in ("exp_avg", "exp_avg_sq")}
    step = torch.zeros((), device=DEVICE)
    return Run(0, torch.ones(4, device=DEVICE), torch.ones(4, device=DEVICE), {"step": step, **state})


def compiled() -> dict[str, Any]:
    """As `torch.compile` of the step leaves states that existed before: counters on the device, `capturable` off."""
    found = {}
    for name, options in {"foreach": {"foreach": True}, "single": {"foreach": False}}.items():
        optimizer = AdamW([torch.nn.Parameter(torch.randn(4, dtype=torch.bfloat16))], **options)
        twin = Twin(optimizer)
        with FakeTensorMode():
            problems = []
            for count in (1, 2):
                try:
                    if count == 1:
                        twin.replay([_run()])
                    else:
                        twin.replay_steps([_run()], iter([twin.settings([0])] * 2))
                except ReplayError as error:
                    problems.append(str(error))
        found[name] = problems
    return found


class Offloaded(Optimizer):
    """Keeps its momentum in host memory, as optimizers that offload to the CPU do."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros(p.shape, device="cpu", dtype=p.dtype)
                state["momentum"].mul_(0.9).add_(p.grad.to("cpu"))
                p.sub_(state["momentum"].to(p.device), alpha=group["lr"])


def offloaded() -> dict[str, Any]:
    probes_outside(Offloaded([torch.nn.Parameter(torch.randn(8, 64, dtype=torch.bfloat16))]))
    with FakeTensorMode():
        params = on_device(3)
        optimizer = Offloaded(params)
        watch = watched(params, optimizer, 8)
        watch.enabled = False
        with Crossings() as plain:
            optimizer.step()
        watch.enabled = True
        crossed = 0
        for _ in range(20):
            with Crossings() as one:
                optimizer.step()
            if watch._model.watched and next(iter(watch._model.watched.values())).window_steps:
                crossed += one.crossings.total() - plain.crossings.total()
        found, seen = told(watch), watch.step
        watch.detach()
    return {**found, "crossed": crossed, "steps": seen}


if __name__ == "__main__":
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    case = {"soak": lambda: soak(int(sys.argv[2])), "compiled": compiled, "offloaded": offloaded}[sys.argv[1]]
    print(json.dumps(case()))
