"""Which optimizers are measured on BF16 weights, and whether any efficiency is wrong: a small model, watched as a user would.

Embedding, matrix, bias, norm and head, stored in BF16, trained on synthetic gradients with every optimizer of bench/coverage.py;
with bitsandbytes the embedding has 32-bit states, as transformers orders it. Beside the watch all tensors together take each
step once more on FP32 copies, whole: <applied, intended> / <intended, intended> over all elements is what `efficiency` has to be.
A rule that does not run on FP32 copies is counted and not compared here; for these see bench/bf16/remainders.py.

    python bench/bf16/coverage.py [--only TEXT] [--steps N] [--json FILE] [--quiet]

Exit status 1 where an efficiency is off by more than 0.05; of the sampled matrix, and by more than two of its standard errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import update_watch as uw
from bench.coverage import Case, all_cases
from update_watch.replay.absent import ReplayError
from update_watch.replay.rule_kind import find_rule
from update_watch.replay.twin import Run, Twin
from update_watch.report import Cause, Health

WRONG = 0.05
WHOLE = 2048  # elements of a tensor that is read whole, in a model of so few tensors
LOW = (torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Result:
    """What was found for one case."""

    name: str
    package: str
    known: int = 0  # tensors that were measured
    tensors: int = 0
    difference: float = 0.0  # largest, of an efficiency
    compared: int = 0
    reason: str = ""
    seconds: float = 0.0


class Model(nn.Module):
    """One of each kind of tensor; all small enough to be read whole, but the matrix of 64 x 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.up = nn.Linear(32, 64)
        self.mix = nn.Linear(64, 64, bias=False)
        self.norm = nn.RMSNorm(64)
        self.head = nn.Linear(64, 24, bias=False)


def measure(case: Case, steps: int) -> Result:
    """Train in BF16 under a watch, and beside it in FP32 for one step at a time."""
    started = time.perf_counter()
    result = Result(f"{case.name}({case.options})", case.package)
    torch.manual_seed(0)
    model = Model().to(torch.bfloat16)
    named = {name: p for name, p in model.named_parameters() if p.numel() <= case.limit}
    if case.package == "bitsandbytes":
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        manager.register_module_override(model.embedding, "weight", {"optim_bits": 32})
    optimizer: Optimizer | None = None
    for matrices in (False, True):  # some optimizers are for these alone
        named = {name: p for name, p in named.items() if p.dim() == 2 or not matrices}
        try:
            optimizer = case.make(list(named.values()))
            _ready(optimizer)
            _set_gradients(named)
            optimizer.step()
            optimizer = case.make(list(named.values()))
            _ready(optimizer)
            break
        except Exception as error:
            result.reason = result.reason or f"cannot be run here: {type(error).__name__}: {str(error)[:100]}"
            optimizer = None
    if optimizer is None:
        return result
    result.reason = ""
    sums: dict[str, list[tuple[float, float]]] = {name: [] for name in named}  # by step
    is_complete = True  # every step could be taken on copies
    with uw.watch(list(named.items()), optimizer, window=10**9, budget=None) as watch:
        for _ in range(steps):
            _set_gradients(named)
            before, kept = _values(named), {n: dict(optimizer.state.get(p) or {}) for n, p in named.items()}
            kept = {n: {k: v.detach().clone() if _is_plain(v) else v for k, v in s.items()} for n, s in kept.items()}
            intended = _intended(optimizer, named, kept)
            is_complete &= bool(intended)
            optimizer.step()
            for name, p in named.items():
                d = intended.get(name)
                applied = p.detach().double() - before[name]
                rest = (optimizer.state.get(p) or {}).get("kahan_comp")
                if isinstance(rest, Tensor):
                    earlier = kept[name].get("kahan_comp")
                    applied = applied + rest.double() - (0 if earlier is None else earlier.double())
                if d is not None:
                    sums[name].append((float((applied * d).sum()), float(d.square().sum())))
        report = watch.flush()
    result.tensors = len(named)
    for t in report.tensors if report is not None else ():
        is_unknown = t.health is Health.unknown and t.cause is Cause.not_replayable
        result.known += not is_unknown
        result.reason = result.reason or (t.advice if is_unknown else "")
        of_steps = sums[t.name]
        if t.efficiency is None or not is_complete or not any(want > 0 for _, want in of_steps):
            continue
        result.compared += 1
        difference = abs(t.efficiency - _efficiency(of_steps))
        if difference > WRONG and _skips_first(case.make(list(named.values())), named[t.name]):
            difference = abs(t.efficiency - _efficiency(of_steps[1:]))
        if t.numel <= WHOLE or difference > 2 * (
            t.efficiency_error or 0.0
        ):  # else it is a sample, and says how good a one
            result.difference = max(result.difference, difference)
    if report is None:
        result.reason = "the watch ended"
    result.seconds = time.perf_counter() - started
    return result


def _efficiency(of_steps: list[tuple[float, float]]) -> float:
    return sum(dot for dot, _ in of_steps) / sum(want for _, want in of_steps)


def _skips_first(optimizer: Optimizer, param: nn.Parameter) -> bool:
    """Whether the watch says nothing of the first step: the rule draws its states in it, or a number over all tensors."""
    group = next(i for i, g in enumerate(optimizer.param_groups) if any(param is p for p in g["params"]))
    return find_rule(optimizer, group, param.dim(), shape=tuple(param.shape), dtype=param.dtype).skips_first


def _ready(optimizer: Optimizer) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()


def _set_gradients(named: dict[str, nn.Parameter]) -> None:
    for i, p in enumerate(named.values()):
        p.grad = (torch.randn(p.shape) * 0.01 * 2.0**i).to(p.dtype)


def _values(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in named.items()}


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor


def _intended(
    optimizer: Optimizer, named: dict[str, nn.Parameter], states: dict[str, dict[str, Any]]
) -> dict[str, Tensor]:
    """The changes of all whole tensors together on FP32 copies; empty where the rule does not run on them."""
    names = {id(p): name for name, p in named.items()}
    runs, order = [], []
    for i, group in enumerate(optimizer.param_groups):
        eps = group.get("eps")
        if isinstance(eps, (tuple, list)) and None in eps:
            return {}  # an eps of the format, which a copy in FP32 does not have
        for p in group["params"]:
            state = {
                k: v.float() if _is_plain(v) and v.dtype in LOW and k != "kahan_comp" else v
                for k, v in states[names[id(p)]].items()
            }
            if "kahan_comp" in state:
                state["kahan_comp"] = torch.zeros_like(p, dtype=torch.float32)
            state = {k: v.clone() if _is_plain(v) else v for k, v in state.items()}
            runs.append(Run(i, p.detach().float(), p.grad.float(), state, may_draw=True))
            order.append(names[id(p)])
    starts = [run.param.clone() for run in runs]
    try:
        results = Twin(optimizer).replay(runs)
    except ReplayError:
        return {}
    return {
        name: result.param.double() - start.double() + _rest(result)
        for name, result, start in zip(order, results, starts, strict=True)
    }


def _rest(result: Run) -> Tensor | float:
    rest = result.state.get("kahan_comp")
    return rest.double() if isinstance(rest, Tensor) else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="cases whose package or name holds this")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quiet", action="store_true", help="totals only")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    results = []
    with torch.compiler.set_stance("force_eager"):
        for case in all_cases():
            if arguments.only.lower() not in f"{case.package}.{case.name}".lower():
                continue
            r = measure(case, arguments.steps)
            results.append(r)
            if not arguments.quiet:
                wrong = " WRONG" if r.difference > WRONG else ""
                print(
                    f"{r.package + '.' + r.name:<70} {r.known}/{r.tensors} known, {r.compared} compared,"
                    f" off by {r.difference:.3f}{wrong} {r.seconds:4.1f} s  {r.reason[:150]}",
                    flush=True,
                )
    for package in dict.fromkeys(r.package for r in results):
        mine = [r for r in results if r.package == package]
        ran = [r for r in mine if r.tensors]
        known = [r for r in ran if r.known == r.tensors]
        wrong = [r.name for r in mine if r.difference > WRONG]
        print(f"{package}: {len(mine)} cases, {len(ran)} run here, {len(known)} known, {len(wrong)} wrong: {wrong}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([dataclasses.asdict(r) for r in results], file, indent=1)
    return int(any(r.difference > WRONG for r in results))


if __name__ == "__main__":
    sys.exit(main())
