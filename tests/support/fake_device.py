"""Run as a script by test_device.py: a watched step on a fake device, whose operators are recorded.

Under FakeTensorMode every host read of a device tensor raises; `DeviceOnly` raises on copies between host and device.
The fake device is registered once per process, hence the process of its own. Prints operators per watched step.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import update_watch as uw
from update_watch.measure import parameters
from update_watch.measure.accumulators import state_factor

DEVICE = "fakegpu"
STEPS = 24


class DeviceOnly(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if not name.startswith(("prim.device", "profiler.")):
            self.ops[name] += 1
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            kinds = {t.device.type for t in given if not (t.device.type == "cpu" and t.dim() == 0)}
            kinds |= {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
            if len(kinds) > 1:
                raise AssertionError(f"host/device copy in {name}")
        return out


def probes_outside(real: torch.optim.Optimizer) -> None:
    """Probes compare values, which fake tensors do not have: they look at a real optimizer on the CPU."""
    find_rule, scheme = parameters.find_rule, parameters.find_scheme

    def real_rule(_: Any, group: int, ndim: int, **options: Any) -> Any:
        with unset_fake_temporarily():
            return find_rule(real, group, ndim, **options)

    def real_scheme(_: Any, *arguments: Any) -> Any:
        with unset_fake_temporarily():
            return scheme(real, *arguments)

    parameters.find_rule, parameters.find_scheme = real_rule, real_scheme
    parameters._find_properties = lambda *_: None
    state_factor._differ_with_weight = lambda *_: False


def main(count: int, fused: bool, seeded: bool) -> None:
    options = {"fused": True} if fused else {"foreach": True}
    real = torch.optim.AdamW([torch.nn.Parameter(torch.randn(64, 64, dtype=torch.bfloat16))], lr=1e-3, **options)
    probes_outside(real)
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = torch.optim.AdamW(params, lr=1e-3, **options)
        watch = uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=10**6, budget=None)
        if seeded:  # a host read in the step, to show that it would be seen
            watched = next(iter(watch._model.watched.values()))
            before = watched.before

            def reading(*given: Any) -> Any:
                float(params[0].sum())
                return before(*given)

            watched.before = reading  # type: ignore[method-assign]
        for _ in range(2):
            optimizer.step()
        watch.enabled = False
        with DeviceOnly() as plain:
            optimizer.step()
        watch.enabled = True
        total: collections.Counter[str] = collections.Counter()
        for _ in range(STEPS):
            with DeviceOnly() as one:
                optimizer.step()
            total += one.ops
    added = {name: n / STEPS - plain.ops[name] for name, n in total.items()}
    error = watch._tap.error
    reasons = (
        sorted({row.reason for row in next(iter(watch._model.watched.values())).rows if row.reason})
        if not error
        else []
    )
    found = {"ops": {k: v for k, v in added.items() if v}, "error": repr(error) if error else "", "reasons": reasons}
    print(json.dumps(found))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        backend_registration._setup_privateuseone_for_python_backend(DEVICE)
        main(int(sys.argv[1]), sys.argv[2] == "fused", "seeded" in sys.argv)
