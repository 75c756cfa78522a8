"""What other ways to watch a training cost, and what each says of a stall: the table in the README.

    python bench/peers.py [--quick] [--steps N] [--no-cost]

Four trainings of one small language model with fused AdamW: weights in BF16 at a learning rate at which all tensors stall,
one at which the norms alone do, and two in which nothing is lost although few bits change (Kahan summation; FP32 masters that
are copied into the BF16 model). Which tensors are stalled is measured beside them in FP64 (`shared.full_comparison`).
Each way watches each training and says which tensors do not train; ways that only log numbers say nothing, and a reader
would have to know. Packages that are not installed are left out and named. Cost: what each adds to an optimizer step, all of
them in every step (update-watch without its budget), in steps of two equal trainings that take turns to go first: the median,
and the middle half.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

import update_watch as uw
from bench.shared.full_comparison import FullComparison
from bench.shared.text_models import Block, LanguageModel, batch, letters

STALLED = 0.1
WARM_UP = 6  # pairs of steps
COST = "cost, in optimizer steps"


@dataclasses.dataclass
class Training:
    """One training: `weights` are the model's, `stepped` what the optimizer steps."""

    model: nn.Module
    optimizer: Any
    masters: list[nn.Parameter] | None = None
    rows: int | None = None  # of a batch; None: all

    def backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        tokens, following = batch(letters())
        self.model.loss(tokens[: self.rows], following[: self.rows]).backward()  # type: ignore[operator]
        if self.masters is not None:
            for master, p in zip(self.masters, self.model.parameters(), strict=True):
                assert p.grad is not None
                master.grad = p.grad.float()

    def step(self) -> None:
        self.optimizer.step()
        if self.masters is not None:
            with torch.no_grad():
                for master, p in zip(self.masters, self.model.parameters(), strict=True):
                    p.copy_(master)


def _model(width: int = 64, blocks: int = 2) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(256, width, [Block(width) for _ in range(blocks)]).bfloat16()


def _plain(lr: float) -> Training:
    model = _model()
    return Training(model, torch.optim.AdamW(model.parameters(), lr=lr, fused=True))


def _kahan() -> Training:
    from optimi import AdamW

    model = _model()
    return Training(model, AdamW(model.parameters(), lr=1e-5, kahan_sum=True))


def _masters() -> Training:
    model = _model()
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    return Training(model, torch.optim.AdamW(masters, lr=1e-5, fused=True), masters)


TRAININGS: dict[str, Callable[[], Training]] = {
    "stalled": lambda: _plain(1e-6),
    "norms stalled": lambda: _plain(3e-4),
    "healthy: Kahan": _kahan,
    "healthy: FP32 masters": _masters,
}


# --- ways to watch ------------------------------------------------------------------------------------
# A way is a function from a training to (before, after, says): called before and after each step, and at the end: the
# names of the tensors it says do not train, or None where it only logs.

Way = Callable[[Training], tuple[Callable[[], Any], Callable[[], Any], Callable[[], "set[str] | None"]]]


def _nothing() -> None:
    return None


def update_watch(training: Training, **options: Any) -> Any:
    watch = uw.watch(training.model, training.optimizer, window=32, **options)

    def says() -> set[str]:
        report = watch.flush()
        watch.close()
        assert report is not None
        return {t.name for t in report.tensors if t.health is uw.Health.stalled}

    return _nothing, _nothing, says


def clone_and_subtract(training: Training) -> Any:
    """What one writes first: all weights cloned, the norm of the difference read per tensor; frozen if it is ever 0."""
    named = list(training.model.named_parameters())
    still = {name for name, _ in named}
    held: dict[str, Tensor] = {}

    def before() -> None:
        held.update({name: p.detach().clone() for name, p in named})

    def after() -> None:
        for name, p in named:
            if (p.detach().float() - held[name].float()).norm().item() > 0:
                still.discard(name)

    return before, after, lambda: still


def norm_of_intended(training: Training) -> Any:
    """Composer's OptimizerMonitor on torch's AdamW: the step is made again of the state, its norm and the weight's are logged."""

    def after() -> None:
        for group in training.optimizer.param_groups:
            for p in group["params"]:
                state = training.optimizer.state[p]
                step = float(state.get("step", group.get("step", 1)))
                first, second = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
                rate = group["lr"] / (1 - first**step)
                root = (state["exp_avg_sq"] / (1 - second**step)).sqrt().add_(group["eps"])
                update = state["exp_avg"] * rate / root
                for value in (update, p.detach(), p.grad, state["exp_avg"]):
                    value.norm().item()

    return _nothing, after, lambda: None


def statistics_of_everything(training: Training) -> Any:
    """OLMo's way: extremes, mean and norm of weights, gradients, moments and the intended update, per tensor."""

    def after() -> None:
        for group in training.optimizer.param_groups:
            for p in group["params"]:
                state = training.optimizer.state[p]
                root = state["exp_avg_sq"].sqrt().add_(group["eps"])
                update = state["exp_avg"] / root * group["lr"]
                for value in (p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"]):
                    size = value.abs()
                    _ = size.min().item(), size.max().item(), value.mean().item(), value.norm().item()
                _ = update.norm().item(), update.abs().max().item()

    return _nothing, after, lambda: None


def wandb_watch(training: Training) -> Any:
    import wandb

    folder = tempfile.mkdtemp()
    run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True))
    run.watch(training.model, log="all", log_freq=1)

    def after() -> None:
        run.log({"step": 1})

    def says() -> None:
        run.unwatch(training.model)
        run.finish()

    return _nothing, after, says


def torchmortem(training: Training) -> Any:
    from torchmortem import Autopsy

    autopsy = Autopsy(training.model, optimizer=training.optimizer)
    autopsy.attach()
    modules = {name: module for name, module in training.model.named_modules()}

    def says() -> set[str]:
        autopsy.detach()
        report = autopsy.get_report()
        if report is None:
            return set()
        found = [f for f in report.findings if "stagna" in f"{f.detector} {f.category} {f.title}".lower()]
        layers = {layer for one in found for layer in one.affected_layers}
        return {f"{layer}.weight" if layer in modules else layer for layer in layers}

    return _nothing, lambda: autopsy.step(loss=0.0), says


def gradtracer(training: Training) -> Any:
    from gradtracer import FlowTracker
    from gradtracer.analyzers.velocity import detect_stagnation

    tracker = FlowTracker(training.model, optimizer=training.optimizer, include_bias=True)

    def says() -> set[str]:
        tracker.detach()
        return {one["name"] for one in detect_stagnation(tracker.history)}

    return _nothing, lambda: tracker.step(loss=0.0), says


def neurolens(training: Training) -> Any:
    from neurolens.monitor import Monitor

    class Viewer:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    monitor = Monitor(training.model, training.optimizer, Viewer(), every=0.0)
    return _nothing, monitor.step, lambda: None  # draws the size of each update; judges none


def trainsight(training: Training) -> Any:
    from trainsight.integrations.pytorch import TrainSightHook

    class Dashboard:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    hook = TrainSightHook(training.model, Dashboard(), sample_interval=1)
    hook.attach()

    def says() -> None:
        hook.detach()

    return _nothing, _nothing, says


WAYS: dict[str, tuple[Way, str]] = {  # with the package it needs; "": own code
    "**update-watch**": (update_watch, ""),
    "clone all weights, subtract": (clone_and_subtract, ""),
    "norms of the intended update, as Composer": (norm_of_intended, ""),
    "statistics of everything, as OLMo": (statistics_of_everything, ""),
    "wandb.watch (all, every step)": (wandb_watch, "wandb"),
    "torchmortem": (torchmortem, "torchmortem"),
    "gradtracer": (gradtracer, "gradtracer"),
    "neurolens": (neurolens, "neurolens"),
    "trainsight": (trainsight, "trainsight"),
}


EACH_STEP: dict[str, Way] = {"**update-watch**": lambda training: update_watch(training, budget=None)}  # for its cost
HOOKS = {"wandb.watch (all, every step)", "torchmortem", "gradtracer", "trainsight"}  # in forward and backward passes


# --- running and telling ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Said:
    """What a way said of one training, beside the truth."""

    named: set[str] | None
    stalled: set[str]
    error: str = ""

    @property
    def words(self) -> str:
        if self.error:
            return self.error
        if self.named is None:
            return "numbers only"
        right, wrong = len(self.named & self.stalled), len(self.named - self.stalled)
        if not self.stalled:
            return "silent" if not wrong else f"accuses {wrong}"
        found = f"{right} of {len(self.stalled)} named" if right else "silent"
        return f"{found}, accuses {wrong} more" if wrong else found


def stalled_tensors(make: Callable[[], Training], steps: int) -> set[str]:
    """Names of tensors of which under a tenth of the intended movement arrives, by all elements in FP64."""
    training = make()
    if training.masters is not None or type(training.optimizer) is not torch.optim.AdamW:
        return set()  # what is rounded away is kept elsewhere
    comparison = FullComparison(list(training.model.named_parameters()), [training.optimizer], ["adamw"])
    torch.manual_seed(1)
    for _ in range(steps):
        training.backward()
        with comparison.step():
            training.step()
    found = comparison.close_window()
    return {name for name, exact in found.items() if exact.efficiency is not None and exact.efficiency < STALLED}


def watched(way: Way, make: Callable[[], Training], steps: int) -> set[str] | None:
    training = make()
    before, after, says = way(training)
    torch.manual_seed(1)
    for _ in range(steps):
        training.backward()
        before()
        training.step()
        after()
    return says()


def cost(way: Way, hooks: bool, pairs: int, blocks: int) -> list[float]:
    """Quartiles of the time that watching adds to a fused step, as shares of its median; 2.1M parameters a block.

    Two equal trainings take turns to go first, and each pair of steps is subtracted, so that what else the machine does falls
    on both. The first pairs warm up and do not count. What hooks add to the backward pass counts where a way has hooks
    there; elsewhere it would be noise.
    """

    def make() -> Training:
        model = _model(512, blocks)
        # a row is enough for gradients, and what passes take is not timed but for hooks
        return Training(model, torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True), rows=1)

    alone, with_it = make(), make()
    before, after, says = way(with_it)
    added, plain = [], []
    for pair in range(WARM_UP + pairs):
        took: dict[bool, tuple[float, float]] = {}
        for watched in (False, True) if pair % 2 else (True, False):
            training = with_it if watched else alone
            began = time.perf_counter()
            training.backward()
            middle = time.perf_counter()
            if watched:
                before()
            training.step()
            if watched:
                after()
            took[watched] = middle - began, time.perf_counter() - middle
        if pair >= WARM_UP:
            (back, step), (watched_back, watched_step) = took[False], took[True]
            plain.append(step)
            added.append(watched_step - step + (watched_back - back if hooks else 0.0))
    says()
    return [quartile / statistics.median(plain) for quartile in statistics.quantiles(added, n=4)]


def table(steps: int, pairs: int, blocks: int) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and packages that are missing; without costs where there are no `pairs` of steps to time."""
    truth = {name: stalled_tensors(make, steps) for name, make in TRAININGS.items()}
    rows, missing = [], []
    for name, (way, package) in WAYS.items():
        if package and importlib.util.find_spec(package) is None:
            missing.append(package)
            continue
        cells = [name]
        for training, make in TRAININGS.items():
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    said = Said(watched(way, make, steps), truth[training])
            except Exception as error:  # noqa: BLE001  it is the answer
                said = Said(None, truth[training], f"fails: {type(error).__name__}")
            cells.append(said.words)
        if pairs:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    low, middle, high = cost(EACH_STEP.get(name, way), name in HOOKS, pairs, blocks)
                cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
            except Exception as error:  # noqa: BLE001
                cells.append(type(error).__name__)
        rows.append(cells)
        print(" | ".join(cells), file=sys.stderr, flush=True)
    return rows, missing


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--no-cost", action="store_true", help="what each says, without timings")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    torch.set_num_threads(2)
    steps, pairs, blocks = (32, 6, 1) if arguments.quick else (arguments.steps, 24, 6)
    rows, missing = table(steps, 0 if arguments.no_cost else pairs, blocks)
    head = ["", *TRAININGS, *([] if arguments.no_cost else [COST])]
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")
    if missing:
        print(f"not installed: {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
