"""Run as a script by test_device_only.py: whole windows on a fake device, every operator and every crossing recorded.

    python tests/support/fake_window.py COUNT IMPLEMENTATION [none] [overflow] [accumulate] [copy] [read] [then-read]

Unlike fake_device.py it goes through window ends, rehearses decay, leaves gradients out and skips steps. `copy` and `read`
plant what must not be there, `then-read` in a second, smaller run. Prints one line of JSON.
"""

from __future__ import annotations

import collections
import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.optim import SGD, AdamW, Optimizer
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import update_watch as uw
from tests.support.fake_device import DEVICE, probes_outside
from update_watch.measure import parameters
from update_watch.replay import rule_properties, state_forms

WINDOW, WINDOWS = 16, 2
MAKE: dict[str, Any] = {
    "fused": lambda p: AdamW(p, lr=1e-3, fused=True),
    "foreach": lambda p: AdamW(p, lr=1e-3, foreach=True),
    "capturable": lambda p: AdamW(p, lr=1e-3, foreach=True, capturable=True),
    "sgd": lambda p: SGD(p, lr=1e-3, momentum=0.9, foreach=True),
}


class Crossings(TorchDispatchMode):
    """Counts operators, and those that touch host and device both. A 0-dim CPU tensor is a kernel's argument."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: collections.Counter[str] = collections.Counter()
        self.crossings: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if not name.startswith(("prim.device", "profiler.")):
            self.ops[name] += 1
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            kinds = {t.device.type for t in given if t.device.type != "cpu" or t.dim() > 0}
            kinds |= {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)}
            if len(kinds) > 1:
                self.crossings[name] += 1
        return out


def properties_outside(real: Optimizer) -> None:
    """As probes: on real values."""
    find_decay, find_states = rule_properties.find_decay, state_forms.find_states
    original = parameters._find_properties

    def real_properties(_: Any, group: int, dtype: torch.dtype, ndim: int) -> Any:
        with unset_fake_temporarily():
            return find_decay(real, group, dtype, ndim)

    def real_states(_: Any, group: int, __: Any) -> Any:
        with unset_fake_temporarily():
            return find_states(real, group, real.param_groups[0]["params"][0])

    rule_properties.find_decay, state_forms.find_states = real_properties, real_states  # type: ignore[assignment]  # of fewer names
    probes_outside(real)
    parameters._find_properties = original  # probes_outside leaves it out


def contribute(params: list[torch.nn.Parameter]) -> None:
    """What autograd does in two backward passes, hooks included: it has no engine for a device that is not there."""
    for param in params * 2:
        if param.grad is not None:
            for hook in (param._backward_hooks or {}).values():
                hook(param.grad)
            param.grad.add_(1)
            for hook in (param._post_accumulate_grad_hooks or {}).values():
                hook(param)


def main(count: int, implementation: str, extras: set[str]) -> dict[str, Any]:
    make = MAKE[implementation]
    real = make([torch.nn.Parameter(torch.randn(64, 64, dtype=torch.bfloat16))])
    properties_outside(real)
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = make(params)
        watch = uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=WINDOW, budget=None)
        watch.enabled = False
        for _ in range(2):
            optimizer.step()
        with Crossings() as plain:
            optimizer.step()
        watch.enabled = True
        watched = next(iter(watch._model.watched.values()))
        windows: list[Any] = []
        looked = 0
        watch._judge.put = windows.append  # type: ignore[method-assign, assignment]  # fake sums cannot be judged
        before = watched.before

        def planted(*given: Any) -> Any:
            if "read" in extras:
                float(params[0].sum())
            if "copy" in extras:
                params[0].detach().cpu()
            return before(*given)

        watched.before = planted  # type: ignore[method-assign]
        steps: collections.Counter[str] = collections.Counter()
        inside: collections.Counter[str] = collections.Counter()
        ends: list[dict[str, int]] = []
        for i in range(WINDOW * WINDOWS):
            if "none" in extras:
                params[i % count].grad = None
            if "overflow" in extras:
                optimizer.grad_scale = torch.ones((), device=DEVICE)
                optimizer.found_inf = torch.zeros((), device=DEVICE)
            with Crossings() as one:
                if "accumulate" in extras:
                    contribute(params)
                optimizer.step()
            looked += len(watched.accumulation._looks)
            if (i + 1) % WINDOW == 0:
                ends.append(dict(one.crossings))
            else:
                steps += one.ops
                inside += one.crossings
        rest = WINDOWS * (WINDOW - 1)
        decay = any(row.decouples_decay for row in watched.rows)
        cohorts = len(watched.cohorts)
        shadow = watched.shadow._copy
    error = watch._tap.error
    return {
        "ops": {name: n / rest - plain.ops[name] for name, n in steps.items()},
        "inside": dict(inside),
        "ends": ends,
        "windows": len(windows),
        "cohorts": cohorts,
        "decay": decay,
        "looked": 0 if watched.accumulation._is_over else looked,
        "shadow_steps": shadow.steps if shadow is not None else 0,
        "error": repr(error) if error else "",
        "reasons": sorted({row.reason for row in watched.rows if row.reason}),
    }


if __name__ == "__main__":
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    count, way, more = int(sys.argv[1]), sys.argv[2], set(sys.argv[3:])
    told = main(count, way, more - {"then-read"})
    if "then-read" in more:
        told["planted"] = main(4, way, {"read"})["error"]
    print(json.dumps(told))
