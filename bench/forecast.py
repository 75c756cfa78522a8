"""Forecasts made early in a run, held against what then happened.

    python bench/forecast.py [--only WORDS ...] [--steps 1000] [--seeds N] [--json FILE]

Small language models, really trained in BF16 to the end of their schedule: AdamW, SGD with momentum, Lion, Muon; cosine, linear,
warm-up and decay, steps, inverse square root. At 20%, 40% and 60% of the run the forecast of `uw.watch(schedule=...)` says for each
tensor at which step its efficiency passes 0.8 and what it will be at the end; the truth is the efficiency of all elements in
FP64, in windows of a twentieth of the run. One line for each run and time:

    within 10%   tensors whose step was foretold within 10% of the steps that were left, of those that pass 0.8 by forecast or truth
    end          mean and largest difference of the efficiency at the end
    covered      tensors whose efficiency at the end lies within the stated error (none at first)
    false        tensors foretold to be under 0.8 at the end that are above 0.9 then

Exit status 1 if fewer than 90% of the tensors of all runs are within 10%, or the end is off by more than 0.1 on average.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import update_watch as uw
from bench.shared.full_comparison import Exact, FullComparison
from bench.shared.regimes import Training, text_training
from update_watch.report import Report, TensorReport

LIMIT, WITHIN, NEAR, END = 0.8, 0.9, 0.1, 0.1
WINDOWS = 20
TIMES = (0.2, 0.4, 0.6)

SHAPES: dict[str, Callable[[float], float]] = {  # of the share of the run that has passed
    "cosine to a tenth": lambda x: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * x)),
    "linear to a hundredth": lambda x: 1 - 0.99 * x,
    "warm-up, stable, decay": lambda x: min(1.0, (x + 0.005) / 0.05) if x < 0.7 else 1 - 0.98 * (x - 0.7) / 0.3,
    "steps of a fifth": lambda x: 0.2 ** int(3 * x),
    "inverse square root": lambda x: (1 + 60 * x) ** -0.5,
}
KINDS = ("adamw", "momentum", "lion", "muon")
HIGH = {"adamw": 3.0, "momentum": 3.0, "lion": 3.0, "muon": 3.0}  # over the rates at which tensors lie on the edge


@dataclasses.dataclass(frozen=True)
class Held:
    """One tensor, forecast at one time."""

    tensor: str
    time: float
    foretold: int | None  # step at which it passes the limit
    happened: int | None
    left: int  # steps
    end_off: float
    error: float | None
    is_false: bool

    @property
    def passes(self) -> bool:
        return self.foretold is not None or self.happened is not None

    @property
    def is_near(self) -> bool:
        if self.foretold is None or self.happened is None:
            return False
        return abs(self.foretold - self.happened) <= NEAR * self.left


def run(kind: str, shape: str, steps: int, seed: int) -> list[Held]:
    """Train to the end; what each forecast said, held against the truth."""
    torch.manual_seed(seed)
    training: Training = text_training(kind, blocks=2, base=HIGH[kind], rate=lambda t, n: SHAPES[shape](t / n))(
        0, steps
    )
    for _ in range(8):
        training.gradients(0)
        training.step()
    window = steps // WINDOWS
    schedule = uw.Schedule(lambda step: SHAPES[shape](step / steps), steps=steps)
    comparison = FullComparison(list(training.model.named_parameters()), training.optimizers, training.rules)
    reports: dict[int, Report] = {}
    truths: list[dict[str, Exact]] = []

    def keep(report: Report) -> None:
        reports[report.step] = report

    with uw.watch(
        *(training.model, training.optimizers), window=window, schedule=schedule, sinks=[keep], budget=None, seed=seed
    ) as watch:
        for t in range(steps):
            training.gradients(t)
            with comparison.step():
                training.step()
            if (t + 1) % window == 0:
                truths.append(comparison.close_window())
        watch.flush()
    rates = [schedule.rate(t) for t in range(steps - window, steps)]
    held = []
    for time in TIMES:
        report = reports[round(time * WINDOWS) * window]
        ratios = [rate / schedule.rate(report.step) for rate in rates]
        held += _held(time, report, truths, window, {t.name: _over(t, ratios) for t in report.tensors})
    return held


def _over(t: TensorReport, ratios: list[float]) -> float | None:
    """The efficiency over steps at these multiples of the present rate, each weighing by its movement."""
    if t.lr is None or t.movement_histogram is None:
        return None
    known = [(ratio * ratio, t.efficiency_at(t.lr * ratio) or 0.0) for ratio in ratios]
    return sum(weight * efficiency for weight, efficiency in known) / sum(weight for weight, _ in known)


def _held(
    time: float, report: Report, truths: list[dict[str, Exact]], window: int, ends: Mapping[str, float | None]
) -> list[Held]:
    """`ends`: the efficiency foretold for the last window, by tensor."""
    if report.forecast is None:
        return []
    found = []
    for t in report.forecast.tensors:
        course = [truth[t.name].efficiency for truth in truths]
        now, end, said = course[report.step // window - 1], course[-1], ends[t.name]
        if now is None or end is None or said is None or now < LIMIT:
            continue  # stalled already: nothing is to be foretold
        found.append(
            Held(
                t.name,
                time,
                t.stalling_step,
                _passing(course, window),
                report.forecast.until - report.step,
                abs(min(said, 1.0) - min(end, 1.0)),
                report.forecast.error,
                said < LIMIT and end > 0.9,
            )
        )
    return found


def _passing(course: list[float | None], window: int) -> int | None:
    """The step from which on it stays below the limit, between the middles of two windows."""
    if course[-1] is None or course[-1] >= LIMIT:
        return None
    for i in range(len(course) - 2, -1, -1):
        now, after = course[i], course[i + 1]
        if now is not None and after is not None and now >= LIMIT:
            return round(window * (i + 0.5 + (now - LIMIT) / (now - after)))
    return 0


def line(held: list[Held]) -> dict[str, Any]:
    passing = [h for h in held if h.passes]
    stated = [h for h in held if h.error is not None]
    return {
        "tensors": len(held),
        "passing": len(passing),
        "within": sum(h.is_near for h in passing),
        "end_mean": statistics.fmean(h.end_off for h in held) if held else 0.0,
        "end_max": max((h.end_off for h in held), default=0.0),
        "covered": sum(h.end_off <= (h.error or 0.0) + 0.02 for h in stated),
        "stated": len(stated),
        "false": sum(h.is_false for h in held),
    }


def show(name: str, found: dict[str, Any]) -> None:
    print(
        f"{name:44} {found['tensors']:7} {found['within']:4}/{found['passing']:<4} {found['end_mean']:8.3f}"
        f" {found['end_max']:6.2f} {found['covered']:5}/{found['stated']:<5} {found['false']:5}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORDS", help="runs whose name contains one of these")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the lines here too")
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    runs = {f"{kind}, {shape}": (kind, shape) for kind in KINDS for shape in SHAPES}
    names = [name for name in runs if not given.only or any(words in name for words in given.only)]
    if not names:
        parser.error(f"--only {' '.join(given.only)}: no run has this in its name")
    if given.steps % WINDOWS:
        parser.error(f"--steps must be a multiple of {WINDOWS}")
    print(
        f"{'run, share of it that had passed':44} {'tensors':>7} {'within 10%':>10} {'end':>7} {'most':>6} {'covered':>10} {'false':>6}"
    )
    everything: list[Held] = []
    lines = {}
    for name in names:
        held = [h for seed in range(given.seeds) for h in run(*runs[name], given.steps, seed)]
        everything += held
        for time in TIMES:
            lines[f"{name}, {time:.0%}"] = found = line([h for h in held if h.time == time])
            show(f"{name}, {time:.0%}", found)
    total = lines["all"] = line(everything)
    show("all", total)
    if given.json:
        Path(given.json).write_text(json.dumps(lines, indent=1))
    is_missed = total["within"] < WITHIN * total["passing"] or total["end_mean"] > END
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
