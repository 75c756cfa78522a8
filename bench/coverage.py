"""Which optimizers can be replayed, and whether any replay is wrong.

Every optimizer trains a small FP32 model with parameters of several ranks on synthetic gradients. Before every step
each parameter is replayed the way the probe says, as the watch would: samples of like parameters joined, or whole.
After it the replay is compared with the optimizer's own FP32 step. `error` is the largest difference as a share of
the parameter's largest update. An optimizer is wrong when something is reported as known and is off by more than 1e-4;
it counts as known when all parameters it can train are known. Half-way the probe is asked anew, as on attaching mid-run.

    python bench/coverage.py [--json FILE] [--only TEXT] [--steps N] [--compiled]

Rules that are compiled (torchao) run eagerly here, as their replays do; `--compiled` lets them compile (minutes).

Exit status 1 when the bar is missed: 110 of the classes of pytorch_optimizer known, none wrong, and the
elementwise optimizers of torch.optim exactly right.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import io
import json
import logging
import math
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.replay.absent import ReplayError
from update_watch.replay.rule import Kind, Rule
from update_watch.replay.rule_kind import find_rule
from update_watch.replay.twin import Run, Twin

SAMPLES = 256
WRONG = 1e-4  # of the largest update
ROUNDING = 2.0**-22  # of the stored value: what may differ in a state, whose change can be far smaller than itself
VECTOR = 16  # elements; torch's fused kernels compute the last `numel % VECTOR` by other instructions
BAR = 110  # of pytorch_optimizer's classes

Params = list[torch.nn.Parameter]
SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((), (7,), (512,), (40, 40), (128, 160), (4, 6, 5), (12, 3, 3, 3)),
    ((7,), (512,), (40, 40), (128, 160), (12, 3, 3, 3)),
    ((40, 40), (24, 40), (128, 160)),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to use one optimizer class."""

    package: str
    name: str
    make: Callable[[Params], Optimizer]
    options: str = ""
    limit: int = 10**6  # elements of the largest parameter


@dataclasses.dataclass
class Result:
    """What was found for one case; `kinds` by shape."""

    package: str
    name: str
    options: str
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)
    error: float = 0.0
    tail_error: float = 0.0  # the same in the last elements of a tensor, those of an incomplete vector
    state_error: float = 0.0  # beyond FP32 rounding, of the states whose replay the probe calls exact
    is_exact: bool = True  # every weight and state, outside tails
    reason: str = ""
    seconds: float = 0.0

    @property
    def is_known(self) -> bool:
        return bool(self.kinds) and not self.reason

    @property
    def is_wrong(self) -> bool:
        return not max(self.error, self.tail_error, self.state_error) <= WRONG


# --- the optimizers ---------------------------------------------------------------------------------


def torch_cases() -> Iterator[Case]:
    """Every class of torch.optim: single, foreach and fused, with each of its options."""
    options: dict[str, list[dict[str, Any]]] = {
        "Adadelta": [{"weight_decay": 0.1}],
        "Adafactor": [{"weight_decay": 0.1}],
        "Adagrad": [{"weight_decay": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}],
        "Adam": [{"amsgrad": True}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
        "AdamW": [{"amsgrad": True}, {"lr": torch.tensor(1e-3)}, {"betas": (0.0, 0.9)}],
        "Adamax": [{"weight_decay": 0.1}],
        "ASGD": [{"weight_decay": 0.1, "t0": 10.0}],
        "LBFGS": [],
        "Muon": [{"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}],
        "NAdam": [{"weight_decay": 0.1, "decoupled_weight_decay": True}],
        "RAdam": [{"weight_decay": 0.1, "decoupled_weight_decay": True}],
        "RMSprop": [{"centered": True}, {"momentum": 0.9}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}],
        "Rprop": [],
        "SGD": [
            {"momentum": 0.9},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            {"momentum": 0.9, "dampening": 0.5},
        ],
        "SparseAdam": [],
    }
    for name, variants in options.items():
        cls = getattr(torch.optim, name)
        known = inspect.signature(cls).parameters
        ways: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}] if "foreach" in known else [{}]
        ways += [{"fused": True}] if "fused" in known else []
        variants = [{}, *variants]
        variants += [{"maximize": True}] if "maximize" in known else []
        for way in ways:
            for variant in variants:
                if not (way.get("foreach") and "lr" in variant):  # refused by torch
                    yield _case("torch.optim", cls, {**way, **variant})


def pytorch_optimizer_cases() -> Iterator[Case]:
    """Every class that pytorch_optimizer registers."""
    import pytorch_optimizer.optimizer as package

    for key in sorted(package.OPTIMIZERS):
        cls = package.OPTIMIZERS[key]
        make = functools.partial(_make_any, cls)
        # of these a step of the package's own takes a second on larger matrices
        limit = 1000 if key in ("kron", "spectralsphere") else Case.limit
        yield Case("pytorch_optimizer", cls.__name__, make, limit=limit)


def other_cases() -> Iterator[Case]:
    """torch-optimi, lion-pytorch, schedulefree and torchao."""
    import lion_pytorch
    import optimi
    import schedulefree
    import torchao.optim

    for name in ("Adam", "AdamW", "Adan", "Lion", "RAdam", "Ranger", "SGD", "StableAdamW"):
        for options in (
            {},
            {"kahan_sum": True},
            {"decouple_lr": True, "weight_decay": 1e-5},
            {"foreach": False},
        ):
            yield _case("torch-optimi", getattr(optimi, name), {"lr": 1e-3, **options})
    yield _case("lion-pytorch", lion_pytorch.Lion, {})
    yield _case("lion-pytorch", lion_pytorch.Lion, {"weight_decay": 0.1, "decoupled_weight_decay": True})
    for name in dir(schedulefree):
        if inspect.isclass(cls := getattr(schedulefree, name)) and issubclass(cls, Optimizer):
            yield _case("schedulefree", cls, {})
            if "foreach" in inspect.signature(cls).parameters:
                yield _case("schedulefree", cls, {"foreach": False, "weight_decay": 0.1, "warmup_steps": 20})
    for name in ("Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8", "_AdamW"):
        yield _case("torchao", getattr(torchao.optim, name), {})
    yield _case("torchao", torchao.optim._AdamW, {"bf16_stochastic_round": True})


def bitsandbytes_cases() -> Iterator[Case]:
    """What of bitsandbytes steps tensors on this machine; nothing where it is not installed."""
    try:
        import bitsandbytes.optim as package
    except ImportError:
        return
    momentum = {"SGD", "LARS"}
    for name in sorted(n for n in dir(package) if inspect.isclass(getattr(package, n))):
        cls = getattr(package, name)
        if not issubclass(cls, Optimizer) or name.startswith(("Paged", "Global")):
            continue
        options = {"momentum": 0.9} if any(name.startswith(kind) for kind in momentum) else {}
        yield _case("bitsandbytes", cls, {"lr": 1e-3, **options})


def _case(package: str, cls: type[Optimizer], options: dict[str, Any]) -> Case:
    written = ", ".join(f"{k}={v}" for k, v in options.items())
    copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
    return Case(package, cls.__name__, lambda params: cls(params, **copied), written)


def _make_any(cls: type[Optimizer], params: Params) -> Optimizer:
    """An instance, whatever its constructor asks for."""
    known = inspect.signature(cls).parameters
    values = {"num_iterations": 1000, "num_data": 1000, "lr": 1e-3}
    needed = {k: v for k, v in values.items() if k in known and known[k].default is inspect.Parameter.empty}
    if "model" in known:
        model = torch.nn.Module()
        model.weights = torch.nn.ParameterList(params)  # type: ignore[assignment]
        return cls(model, **needed)
    try:
        return cls(params, **needed)
    except Exception:  # of the Muon family: matrices and the rest apart
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "use_muon": True},
            {"params": [p for p in params if p.dim() < 2], "use_muon": False},
        ]
        return cls([g for g in groups if g["params"]], **needed)


# --- measuring --------------------------------------------------------------------------------------


def measure(case: Case, steps: int) -> Result:
    """Train, replay and compare; the model is the richest one the optimizer can train at all."""
    started = time.perf_counter()
    result = Result(case.package, case.name, case.options)
    problem = ""
    for shapes in SHAPES:
        shapes = tuple(shape for shape in shapes if math.prod(shape) <= case.limit)
        try:
            trained = Training(case, shapes)
            for _ in range(3):
                trained.step()
        except Exception as error:
            problem = problem or f"cannot be run here: {type(error).__name__}: {str(error)[:120]}"
            continue
        trained = Training(case, shapes)
        for half in range(2):
            trained.ask(result)
            for _ in range(steps // 2):
                trained.compared_step(result, skipped=half == 1)
        break
    else:
        result.reason = problem
    result.seconds = time.perf_counter() - started
    return result


class Training:
    """An optimizer and its model, trained on synthetic gradients."""

    def __init__(self, case: Case, shapes: tuple[tuple[int, ...], ...]) -> None:
        torch.manual_seed(1)
        random.seed(1)
        self.generator = torch.Generator().manual_seed(2)
        self.params = [torch.nn.Parameter(self._normal(shape) * 0.05) for shape in shapes]
        self.drift = [self._normal(shape) for shape in shapes]
        self.optimizer = case.make(self.params)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.steps = 0
        self.rules: dict[Tensor, Rule] = {}
        self.drawn: dict[Tensor, Tensor] = {}
        self.groups = {p: i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}

    def ask(self, result: Result) -> None:
        """Probe anew, build the twin anew."""
        rules: dict[Any, Rule] = {}
        for param, group in self.groups.items():
            key = (group, param.shape)
            if self.steps and param.shape not in ((512,), (40, 40)):
                continue  # asked once
            if key not in rules:
                rules[key] = find_rule(self.optimizer, group, param.dim(), shape=tuple(param.shape))
            rule = self.rules[param] = rules[key]
            found = rule.kind.value + (" (rows)" if rule.rows else "")
            shape = "x".join(map(str, param.shape)) or "()"
            result.kinds[shape] = found if result.kinds.get(shape, found) == found else "unknown"
            if rule.kind is Kind.unknown:
                result.reason = result.reason or f"{shape}: {rule.reason}"
        known = any(rule.kind is not Kind.unknown for rule in self.rules.values())
        self.twin = Twin(self.optimizer) if known else None

    def step(self) -> None:
        self._set_gradients(False)
        self._step()

    def compared_step(self, result: Result, skipped: bool) -> None:
        self._set_gradients(skipped and self.steps % 5 == 4)
        random_states = torch.get_rng_state(), random.getstate()
        replayed = self._replay(result)
        assert torch.equal(torch.get_rng_state(), random_states[0]) and random.getstate() == random_states[1]
        torch.manual_seed(self.steps)  # what the step draws is not what the replay drew
        random.seed(self.steps)
        np.random.seed(self.steps)
        before = {param: self._values(param) for param in replayed}
        whole_before = {param: param.detach().clone() for param in replayed}
        self._step()
        for param, values in replayed.items():
            after = self._values(param)
            largest = float((param.detach() - whole_before[param]).abs().max())
            is_tail = self.drawn[param] >= param.numel() - param.numel() % VECTOR
            error = _difference(values[""], after[""], largest)
            result.error = max(result.error, float(error[~is_tail].amax()) if not is_tail.all() else 0.0)
            result.tail_error = max(result.tail_error, float(error[is_tail].amax()) if is_tail.any() else 0.0)
            for name in self.rules[param].exact_states & after.keys():
                start = before[param].get(name, torch.zeros(()))
                change = float((after[name] - start).abs().max())
                error = _difference(values[name], after[name], change)
                result.is_exact &= bool((error[~is_tail] == 0).all())
                error = error * ((values[name] - after[name]).abs() > after[name].abs() * ROUNDING)
                result.state_error = max(result.state_error, float(error.amax()))
        result.is_exact &= result.error == 0.0

    def _step(self) -> None:
        loss = torch.tensor(1.0 / (1 + self.steps))
        if inspect.signature(type(self.optimizer).step).parameters.keys() == {"self"}:
            self.optimizer.step()
        else:
            try:
                self.optimizer.step()
            except (TypeError, RuntimeError, ValueError):
                self.optimizer.step(lambda: loss)
        self.steps += 1

    def _set_gradients(self, skip_one: bool) -> None:
        loss_scale = 10.0 ** float(self._normal(())) if self.steps % 3 == 2 else 1.0
        for i, param in enumerate(self.params):
            drift = self.drift[i] if self.steps % 8 > 3 else 0.0  # as in a real run: noise, and for a while a direction
            grad = (self._normal(param.shape) + drift) * (0.01 * 3.0**i * loss_scale)
            keep = torch.rand(param.shape, generator=self.generator) > 0.1
            param.grad = grad * keep
        if skip_one:
            self.params[-1].grad = None

    def _normal(self, shape: Any) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator)

    # --- replaying as the watch does ----------------------------------------------------------------

    def _replay(self, result: Result) -> dict[Tensor, dict[str, Tensor]]:
        """The values to be expected at the drawn positions of every known parameter: "" the weight, then states."""
        alike: dict[Any, Params] = {}
        found: dict[Tensor, dict[str, Tensor]] = {}
        all_together: dict[Tensor, dict[str, Tensor]] = {}
        if any(rule.kind is Kind.together for rule in self.rules.values()):
            try:
                all_together = self._together()
            except ReplayError as error:
                result.reason = result.reason or str(error)
                return found
        for param, group in self.groups.items():
            rule, state = self.rules[param], self.optimizer.state.get(param) or {}
            if rule.kind is Kind.unknown or param.grad is None:
                continue
            assert self.twin is not None
            if rule.skips_first and not state:
                continue
            numel = param.numel()
            drawn = torch.randperm(numel, generator=self.generator)[:SAMPLES]
            self.drawn[param] = torch.cat([drawn, drawn.new_zeros(SAMPLES - len(drawn))])
            if misfit := rule.misfit(param, state):
                result.reason = result.reason or misfit
                continue
            if rule.kind is Kind.together:
                values = all_together[param]
                found[param] = {k: self._sampled(param, v) for k, v in values.items()}
                continue
            if rule.kind is Kind.whole:
                try:
                    done = self.twin.replay_whole(
                        group, param, param.grad, state, **rule.formats, may_draw=rule.may_draw
                    )
                except ReplayError as error:
                    result.reason = result.reason or str(error)
                    continue
                values = {"": done.param} | {k: done.state[k] for k in rule.exact_states if k in done.state}
                found[param] = {k: self._sampled(param, v) for k, v in values.items()}
                continue
            scalars = tuple((k, _plain(v)) for k, v in state.items() if k not in rule.element_states)
            present = tuple(k for k, v in state.items() if v is not None)
            key = (group, rule.rows, rule.element_states, scalars, present, id(param) if rule.apart else 0)
            alike.setdefault(key, []).append(param)
        runs = [self._joined(params) for params in alike.values()]
        try:
            results = self.twin.replay(runs) if self.twin is not None and runs else []
        except ReplayError as error:
            result.reason = result.reason or str(error)
            return found
        for params, done in zip(alike.values(), results, strict=True):
            for i, param in enumerate(params):
                values = {"": done.param} | {
                    k: done.state[k] for k in self.rules[param].exact_states if k in done.state
                }
                found[param] = {k: v.reshape(len(params), -1)[i] for k, v in values.items() if v is not None}
        return found

    def _together(self) -> dict[Tensor, dict[str, Tensor]]:
        assert self.twin is not None
        runs = [Run(group, p.detach(), p.grad, self.optimizer.state.get(p) or {}) for p, group in self.groups.items()]
        formats = next(rule.formats for rule in self.rules.values() if rule.kind is Kind.together)
        results = zip(self.groups, self.twin.replay_together(runs, **formats), strict=True)
        return {
            p: {"": r.param} | {k: r.state[k] for k in self.rules[p].exact_states if _is_of(r, k)} for p, r in results
        }

    def _joined(self, params: Params) -> Run:
        rule = self.rules[params[0]]
        shape = (len(params), SAMPLES) if rule.rows else (-1,)

        def join(tensors: list[Tensor]) -> Tensor:
            return torch.stack([self._sampled(p, t) for p, t in zip(params, tensors, strict=True)]).reshape(shape)

        state: dict[str, Any] = {}
        for name, value in (self.optimizer.state.get(params[0]) or {}).items():
            if name in rule.element_states and value is not None:
                state[name] = join([self.optimizer.state[p][name] for p in params]).float()
            else:
                state[name] = value.clone() if isinstance(value, Tensor) else value
        grads = [p.grad for p in params if p.grad is not None]
        param = join([p.detach() for p in params])
        return Run(self.groups[params[0]], param, join(grads), state, may_draw=rule.may_draw)

    def _sampled(self, param: Tensor, tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1)[self.drawn[param]]

    def _values(self, param: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state.get(param) or {}
        states = {k: state[k] for k in self.rules[param].element_states if isinstance(state.get(k), Tensor)}
        states = {k: v for k, v in states.items() if v.shape == param.shape}
        return {k: self._sampled(param, v) for k, v in ({"": param} | states).items()}


def _is_of(run: Run, name: str) -> bool:
    """Whether a replay has left one value per weight in this state."""
    return isinstance(run.state.get(name), Tensor) and run.state[name].shape == run.param.shape


def _plain(value: Any) -> Any:
    """What states of like parameters have in common; lists of tensors are each parameter's own."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else id(value)
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _difference(replayed: Tensor, stored: Tensor, largest: float) -> Tensor:
    """Per element, as a share of `largest`; equal values and NaNs on both sides do not differ."""
    same = (replayed == stored) | (replayed.isnan() & stored.isnan())
    error = (replayed.float() - stored.float()).abs() / largest
    return torch.where(same, torch.zeros(()), error.nan_to_num(nan=torch.inf))


# --- the table --------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose package or name holds TEXT")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps per case")
    parser.add_argument("--compiled", action="store_true", help="let rules that ask for it be compiled")
    parser.add_argument("--processes", type=int, help="at a time; default: one per core, at most 8")
    parser.add_argument("--quiet", action="store_true", help="totals only")
    arguments = parser.parse_args()
    _prepare()
    chosen = [
        index
        for index, case in enumerate(all_cases())
        if arguments.only.lower() in f"{case.package}.{case.name}".lower()
    ]
    results = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes or min(os.cpu_count() or 1, 8), context, _prepare) as pool:
        for result in pool.map(
            functools.partial(_measure_case, steps=arguments.steps, compiled=arguments.compiled), chosen
        ):
            results.append(result)
            if not arguments.quiet:
                print(_line(result), flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(
                [dataclasses.asdict(r) | {"known": r.is_known, "wrong": r.is_wrong} for r in results], file, indent=1
            )
    return _totals(results)


def all_cases() -> list[Case]:
    return [*torch_cases(), *pytorch_optimizer_cases(), *other_cases(), *bitsandbytes_cases()]


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the packages under test
    logging.disable(logging.WARNING)


def _measure_case(index: int, steps: int, compiled: bool) -> Result:
    stance = torch.compiler.set_stance("default" if compiled else "force_eager")
    with stance, redirect_stdout(io.StringIO()):  # some packages print
        return measure(all_cases()[index], steps)


def _line(result: Result) -> str:
    kinds = ", ".join(dict.fromkeys(result.kinds.values())) or "-"
    verdict = "WRONG " if result.is_wrong else ""
    name = f"{result.package}.{result.name}({result.options})"
    return f"{name:<78} {kinds:<32} {verdict}error {result.error:.1e} tail {result.tail_error:.1e} state {result.state_error:.1e} {result.seconds:4.1f} s  {result.reason}"


def _totals(results: list[Result]) -> int:
    is_missed = False
    for package in dict.fromkeys(r.package for r in results):
        mine = [r for r in results if r.package == package]
        known, wrong = [r for r in mine if r.is_known], [r for r in mine if r.is_wrong]
        print(f"{package}: {len(known)} of {len(mine)} known, {len(wrong)} wrong: {[r.name for r in wrong]}")
        is_missed |= bool(wrong)
        if package == "pytorch_optimizer" and len(mine) > BAR:
            is_missed |= len(known) < BAR
        if package == "torch.optim":
            elementwise = [r for r in known if set(r.kinds.values()) == {"elementwise"}]
            inexact = [f"{r.name}({r.options})" for r in elementwise if not r.is_exact]
            print(f"  elementwise: {len(elementwise)}, of those not exactly 0.0: {inexact}")
            is_missed |= bool(inexact)
    print("bar missed" if is_missed else "bar met")
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
