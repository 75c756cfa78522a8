"""Forecasts made early in a run, held against what then happened.

    python bench/forecast.py [--only WORDS ...] [--steps 1000] [--seeds N] [--first N] [--held-out] [--keep FOLDER] [--json FILE]

Small language models, really trained in BF16 or FP16 to the end of their schedule: AdamW (moments in BF16 and in FP32), SGD with
momentum, Lion, Muon; cosine, linear, warm-up and decay, steps, inverse square root, and schedules that end too high to stall
anything. At 20%, 40% and 60% of the run the forecast of `uw.watch(schedule=...)` says for each tensor at which step its efficiency
passes 0.8, between which steps it may, and what it will be over the last twentieth of the run; the truth is the efficiency of all
elements in FP64, in windows of a twentieth of the run. One line for each run and time:

    within 10%   tensors whose step was foretold within 10% of the steps that were left, of those that pass 0.8 by forecast or truth and
                 of which the forecast was sure of the step; where one of both says "not before the end", the end is its step
    unsure       of those that pass, the ones whose step it said it does not know
    right        of all tensors, sure or not, and whether they pass or go on moving, those whose most likely step was right so
    between      of all tensors, those whose step lies between the earliest and the latest that were said, to half a window
    end          mean difference, largest difference of the efficiency at the end; tensors of which it lies within what was said
    false        tensors said to stall for certain that were above 0.8 at the end; of healthy runs, warnings

`--held-out`: other data, other learning rates than those the forecaster was made with. `--keep`: trained runs are kept in this
folder, and not trained anew where they are there.

Exit status 1 unless at least 90% are within 10%, between, and within the range of the end, the end is off by at most 0.1 on average,
and nothing is false.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import update_watch as uw
from bench.shared.full_comparison import Exact, FullComparison
from bench.shared.regimes import Training, text_training
from update_watch.judge.alerts import Alerts
from update_watch.judge.forecast import Forecaster
from update_watch.report import Report
from update_watch.thresholds import Thresholds

LIMIT, WITHIN, NEAR, END = 0.8, 0.9, 0.1, 0.1
WINDOWS = 20
TIMES = (0.2, 0.4, 0.6)

SHAPES: dict[str, Callable[[float], float]] = {  # of the share of the run that has passed
    "cosine to a tenth": lambda x: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * x)),
    "linear to a hundredth": lambda x: 1 - 0.99 * x,
    "warm-up, stable, decay": lambda x: min(1.0, (x + 0.005) / 0.05) if x < 0.7 else 1 - 0.98 * (x - 0.7) / 0.3,
    "steps of a fifth": lambda x: 0.2 ** int(3 * x),
    "inverse square root": lambda x: (1 + 60 * x) ** -0.5,
    "cosine to two thirds": lambda x: 2 / 3 + 1 / 3 * 0.5 * (1 + math.cos(math.pi * x)),
}
HEALTHY = "cosine to two thirds"


@dataclasses.dataclass(frozen=True)
class Run:
    kind: str
    shape: str
    fp16: bool = False
    high: float = 3.0  # times the rate at which tensors lie on the edge

    @property
    def name(self) -> str:
        return f"{self.kind}{' FP16' if self.fp16 else ''}, {self.shape}"


RUNS = (
    *(Run(kind, shape) for kind in ("adamw", "momentum", "lion") for shape in SHAPES if shape != HEALTHY),
    *(Run("muon", shape) for shape in ("cosine to a tenth", "warm-up, stable, decay")),
    *(Run("adamw, FP32 moments", shape) for shape in ("linear to a hundredth", "warm-up, stable, decay")),
    *(Run(kind, "linear to a hundredth", fp16=True) for kind in ("adamw", "momentum")),
    Run("adamw", HEALTHY, high=30.0),
    Run("momentum", HEALTHY, high=10.0),
)
HELD_OUT_RATE = 5 / 3  # of the rates of the others


@dataclasses.dataclass(frozen=True)
class Recording:
    """A run that was trained to its end: its reports, and the truth of each window."""

    name: str
    shape: str
    steps: int
    reports: tuple[Report, ...]
    truths: tuple[dict[str, Exact], ...]

    @property
    def schedule(self) -> uw.Schedule:
        return uw.Schedule(lambda step: SHAPES[self.shape](step / self.steps), steps=self.steps)

    @property
    def window(self) -> int:
        return self.steps // WINDOWS

    def save(self, path: Path) -> None:
        data = {
            **{name: getattr(self, name) for name in ("name", "shape", "steps")},
            "reports": [report.to_dict() for report in self.reports],
            "truths": [{name: dataclasses.asdict(exact) for name, exact in truth.items()} for truth in self.truths],
        }
        path.write_text(json.dumps(data))

    @classmethod
    def load(cls, path: Path) -> Recording:
        data = json.loads(path.read_text())
        truths = tuple({name: Exact(**exact) for name, exact in truth.items()} for truth in data["truths"])
        return cls(data["name"], data["shape"], data["steps"], tuple(map(Report.from_dict, data["reports"])), truths)


def record(run: Run, steps: int, seed: int, rate: float = 1.0) -> Recording:
    """Train to the end, watched, beside the comparison of all elements."""
    torch.manual_seed(seed)
    # FP16 holds 3 bits more; there the loss is scaled by 2^10, which SGD does not undo
    format_scale = (1 / 8 if run.kind != "momentum" else 2.0**-13) if run.fp16 else 1.0
    training: Training = text_training(
        run.kind,
        blocks=2,
        dtype=torch.float16 if run.fp16 else torch.bfloat16,
        base=run.high * rate * format_scale,
        rate=lambda t, n: SHAPES[run.shape](t / n),
    )(0, steps)
    for _ in range(8):
        training.gradients(0)
        training.step()
    comparison = FullComparison(list(training.model.named_parameters()), training.optimizers, training.rules)
    reports: dict[int, Report] = {}
    truths: list[dict[str, Exact]] = []
    window = steps // WINDOWS
    with uw.watch(
        *(training.model, training.optimizers),
        window=window,
        sinks=[lambda report: reports.update({report.step: report})],
        budget=None,
        seed=seed,
    ) as watch:
        for t in range(steps):
            training.gradients(t)
            with comparison.step():
                training.step()
            if (t + 1) % window == 0:
                truths.append(comparison.close_window())
        watch.flush()
    return Recording(run.name, run.shape, steps, tuple(reports[step] for step in sorted(reports)), tuple(truths))


@dataclasses.dataclass(frozen=True)
class Held:
    """One tensor, forecast at one time."""

    tensor: str
    time: float
    foretold: int | None  # step at which it passes the limit
    earliest: int | None
    latest: int | None
    happened: int | None
    until: int  # the last step: None above is "not before"
    left: int  # steps
    window: int  # steps, to half of which the truth is known
    is_sure: bool
    end_off: float
    is_end_covered: bool

    @property
    def passes(self) -> bool:
        return self.foretold is not None or self.happened is not None

    @property
    def is_near(self) -> bool:
        foretold, happened = (self.until if step is None else step for step in (self.foretold, self.happened))
        return abs(foretold - happened) <= NEAR * self.left

    @property
    def is_between(self) -> bool:
        earliest, latest, happened = (
            self.until if step is None else step for step in (self.earliest, self.latest, self.happened)
        )
        return earliest - self.window / 2 <= happened <= latest + self.window / 2

    @property
    def is_false(self) -> bool:
        return self.happened is None and self.latest is not None and self.latest < self.until - self.window


def hold(recording: Recording) -> tuple[list[Held], int]:
    """What each forecast said, held against the truth; and how many warnings of what is ahead there were."""
    limits = Thresholds()
    forecaster, alerts = Forecaster(recording.schedule, limits), Alerts(limits)
    alerts.is_logging = False
    held, warnings = [], 0
    for report in recording.reports:
        told = alerts.update(forecaster.add(report))
        warnings += sum(alert.title.startswith("AHEAD") for alert in told.alerts)
        time = report.step / recording.steps
        if time in TIMES:
            held += _held(time, told, recording.truths, recording.window)
    return held, warnings


def _held(time: float, report: Report, truths: Sequence[dict[str, Exact]], window: int) -> list[Held]:
    if report.forecast is None:
        return []
    found = []
    for t in report.forecast.tensors:
        course = [truth[t.name].efficiency for truth in truths]
        now, end = course[report.step // window - 1], course[-1]
        if now is None or end is None or now < LIMIT:
            continue  # stalled already: nothing is to be foretold
        found.append(
            Held(
                *(t.name, time, t.stalling_step, t.earliest, t.latest, _passing(course, window)),
                *(report.forecast.until, report.forecast.until - report.step, window, not t.doubt),
                abs(min(t.final_efficiency, 1.0) - min(end, 1.0)),
                t.final_low <= end <= t.final_high,
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


def line(held: list[Held], warnings: int = 0) -> dict[str, Any]:
    passing = [h for h in held if h.passes]
    return {
        "tensors": len(held),
        "passing": sum(h.is_sure for h in passing),
        "within": sum(h.is_near for h in passing if h.is_sure),
        "unsure": sum(not h.is_sure for h in passing),
        "right": sum(h.is_near for h in held),
        "between": sum(h.is_between for h in held),
        "end_mean": statistics.fmean(h.end_off for h in held) if held else 0.0,
        "end_max": max((h.end_off for h in held), default=0.0),
        "covered": sum(h.is_end_covered for h in held),
        "false": sum(h.is_false for h in held) + warnings,
    }


def show(name: str, found: dict[str, Any]) -> None:
    print(
        f"{name:50} {found['tensors']:7} {found['within']:4}/{found['passing']:<4} {found['unsure']:6} {found['right']:6} {found['between']:7}"
        f" {found['end_mean']:7.3f} {found['end_max']:5.2f} {found['covered']:7} {found['false']:5}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORDS", help="runs whose name contains one of these")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="of the seeds")
    parser.add_argument("--held-out", action="store_true", help="other data and rates")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep trained runs here, and take them from here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the lines here too")
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    runs = [run for run in RUNS if not given.only or any(words in run.name for words in given.only)]
    if not runs:
        parser.error(f"--only {' '.join(given.only)}: no run has this in its name")
    if given.steps % WINDOWS:
        parser.error(f"--steps must be a multiple of {WINDOWS}")
    print(
        f"{'run, share of it that had passed':50} {'tensors':>7} within 10% unsure  right between     end  most covered false"
    )
    everything: list[Held] = []
    lines: dict[str, Any] = {}
    wrong = 0
    for run in runs:
        held, warnings = [], 0
        for seed in range(given.first, given.first + given.seeds):
            found, told = hold(_recording(run, given.steps, seed + 100 * given.held_out, given))
            held, warnings = held + found, warnings + (told if run.shape == HEALTHY else 0)
        everything, wrong = everything + held, wrong + warnings
        for time in TIMES:
            name = f"{run.name}, {time:.0%}"
            lines[name] = line([h for h in held if h.time == time], warnings if time == TIMES[-1] else 0)
            show(name, lines[name])
    total = lines["all"] = line(everything, wrong)
    show("all", total)
    if given.json:
        given.json.write_text(json.dumps(lines, indent=1))
    shares = [
        (total["within"], total["passing"]),
        *((total[name], total["tensors"]) for name in ("between", "covered")),
    ]
    return int(any(a < WITHIN * b for a, b in shares) or total["end_mean"] > END or total["false"] > 0)


def _recording(run: Run, steps: int, seed: int, given: argparse.Namespace) -> Recording:
    path = given.keep and given.keep / f"{run.name.replace(',', '').replace(' ', '-')}-{steps}-{seed}.json"
    if path and path.exists():
        return Recording.load(path)
    recording = record(run, steps, seed, HELD_OUT_RATE if given.held_out and run.shape != HEALTHY else 1.0)
    if path:
        given.keep.mkdir(parents=True, exist_ok=True)
        recording.save(path)
    return recording


if __name__ == "__main__":
    sys.exit(main())
