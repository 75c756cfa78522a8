"""Runs that blow up, and their healthy twins: how many steps ahead of the loss is it told, and is anything told of the twins?

    python bench/planted/divergence.py [--only WORDS ...] [--seeds N] [--first-seed N] [--window 16] [--keep FOLDER]

Small language models with attention, really trained, by AdamW, SGD with momentum and Lion. Planted: a learning rate that climbs without
end, quickly and slowly; one that is far too high from a good start on; the rates of attention's queries and keys alone climb; FP16
weights whose gradients, times a fixed scale of the loss, come to the top of the format; a gradient scaler whose steps overflow ever
more often; AdamW with BF16 moments that can only grow, under a climbing rate. Twins: warm-up, a long warm-up to a very high rate that
holds, spikes of the loss, rates that jump and restart, a fine-tuning start on other text, a batch that shrinks, FP16 and a scaler
without trouble, BF16 moments; and of those for one sign: a scale that holds, moments that follow, steps that overflow now and then.

The loss blows up where the mean of 8 steps stays a nat above its best so far, or is no number. One line a run: the step of that, the first
warning that the run diverges, how many steps ahead it was, and the signs in the report. `late`: fewer than 20 steps ahead, `missed`: not at
all, `at once`: lost within a window or before the fourth, which nothing can tell. Of twins, `silent`, `false`, or `ill`: warned of a loss that
ends 0.4 nats above its best and does not come back. Of runs planted for one sign `told` is that INFO, 20 steps before the loss where that is lost, else `untold`.

Exit status 1 where a twin is warned of, more than one in twenty is told of by INFO, a planted sign is not told, or fewer than three quarters of what blows up are told 20 steps ahead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import update_watch as uw
from bench.shared.text_models import AttentionBlock, LanguageModel, batch, letters, words
from update_watch.judge.alerts import Alerts
from update_watch.judge.forecast.divergences import Divergences
from update_watch.report import Report
from update_watch.thresholds import Thresholds

AHEAD, NAT = 20, 1.0  # steps; of the loss, above its best
ILL = 0.4  # nats, of the mean of 50 steps
FEWEST = 4  # windows, before which nothing can be told
ENOUGH = 0.75  # of those that blow up, told in time
WIDTH = 32
RATES = {"adamw": 3e-3, "sgd": 0.05, "lion": 3e-4}
SPREAD = (1.0, 0.5, 2.0)  # of the rates, over seeds
Rate = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Run:
    """`rate(t)` scales the learning rate; `loss_scale`: fixed, or "scaler"."""

    name: str
    rate: Rate
    kinds: tuple[str, ...] = ("adamw", "sgd", "lion")
    attention_rate: Rate | None = None  # of queries and keys
    dtype: torch.dtype = torch.float32
    loss_scale: float | str = 1.0
    spikes: Callable[[int], float] = lambda t: 1.0
    rows: Callable[[int], int] = lambda t: 8
    other_text_from: int | None = None
    warmed_up: int = 0  # steps before it is watched
    beta2: float = 0.95
    steps: int = 600
    can_be_told: bool = True  # False: it is lost within a window
    scale: Callable[[int], float] = lambda t: 1.0  # times `loss_scale`
    sign: str = ""  # what is planted is this alone
    has_fp16_logits: bool = False


def warm(t: int, over: int = 25) -> float:
    return min(1.0, (t + 1) / over)


def climb(start: int, doubling: int, warm_up: int = 25) -> Rate:
    return lambda t: warm(t, warm_up) * 2.0 ** (max(t - start, 0) / doubling)


def _shrinks(t: int) -> float:
    """A loss whose gradients shrink, by a thousand over 600 steps; Adam's updates know nothing of it."""
    return float(2.0 ** (-max(t - 100, 0) / 50))


def _no_number(t: int, every: int) -> float:
    """A loss that is no number in every so many steps, of the second half alone if these are few."""
    return math.inf if t % every == every - 1 and (every > 10 or t >= 300) else 1.0


FP16, BF16 = torch.float16, torch.bfloat16
RUNS = (
    Run("rate climbs slowly", climb(100, 40)),
    Run("rate climbs quickly", climb(300, 15), steps=500),
    Run("warm-up without end", lambda t: (t / 30) ** 2.5, steps=800),
    Run("far too high", lambda t: warm(t) if t < 200 else 2000.0, steps=300, can_be_told=False),
    Run("queries and keys climb", warm, attention_rate=climb(100, 25), has_fp16_logits=True),
    Run("FP16 and a fixed scale", climb(100, 40), ("sgd",), dtype=FP16, loss_scale=2.0**10),
    Run("a scaler", climb(100, 40), ("adamw",), loss_scale="scaler"),
    Run("moments that only grow", climb(100, 40), ("adamw",), dtype=BF16, beta2=0.999),
    Run(
        "FP16, its scale rises",
        *(warm, ("sgd",)),
        dtype=FP16,
        loss_scale=2.0**6,
        scale=lambda t: 2.0 ** (max(t - 100, 0) / 40),
        sign="fp16_range",
    ),
    Run("moments that stay behind", warm, ("adamw",), dtype=BF16, beta2=0.999, spikes=_shrinks, sign="state"),
    Run(
        "a scaler, ever more", warm, ("adamw",), loss_scale="scaler", spikes=lambda t: _no_number(t, 5), sign="skipped"
    ),
    Run("FP16, its scale rises and holds", warm, ("sgd",), dtype=FP16, scale=lambda t: 2.0 ** min(t / 40, 6)),
    Run("moments that follow", warm, ("adamw",), dtype=BF16, spikes=_shrinks),
    Run("a scaler, now and then", warm, ("adamw",), loss_scale="scaler", spikes=lambda t: _no_number(t, 90)),
    Run("warm-up", lambda t: warm(t, 200)),
    Run("long warm-up to a high rate", lambda t: 10 * warm(t, 300)),
    Run("quick warm-up to a high rate", lambda t: 3 * warm(t, 200) ** 2),
    Run("high rate", lambda t: 10 * warm(t)),
    Run("spikes of the loss", warm, spikes=lambda t: 30.0 if t % 100 == 75 else 1.0),
    Run("rate jumps", lambda t: warm(t) * (0.2 if t < 300 else 1.0)),
    Run("restarts", lambda t: warm(t) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (t % 150) / 150)))),
    Run("fine-tuning", lambda t: warm(t, 50) * 0.3, other_text_from=0, warmed_up=200, steps=400),
    Run("other text midway", warm, other_text_from=300),
    Run("batch shrinks", warm, rows=lambda t: 8 if t < 250 else 2),
    Run("FP16", warm, ("sgd",), dtype=FP16, loss_scale=2.0**6),
    Run("a scaler, well", warm, ("adamw",), loss_scale="scaler"),
    Run("BF16 moments", warm, ("adamw",), dtype=BF16, beta2=0.999),
)


@dataclasses.dataclass(frozen=True)
class Recording:
    losses: tuple[float, ...]
    reports: tuple[Report, ...]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"losses": self.losses, "reports": [r.to_dict() for r in self.reports]}))

    @classmethod
    def load(cls, path: Path) -> Recording:
        data = json.loads(path.read_text())
        return cls(tuple(data["losses"]), tuple(map(Report.from_dict, data["reports"])))


def _optimizer(kind: str, groups: list[dict[str, Any]], run: Run) -> torch.optim.Optimizer:
    fused = run.loss_scale == "scaler"  # only of these does a scaler tell which steps it skipped
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=RATES[kind], betas=(0.9, run.beta2), weight_decay=0.0, fused=fused)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=RATES[kind], momentum=0.9, fused=fused)
    from lion_pytorch import Lion

    return Lion(groups, lr=RATES[kind], weight_decay=0.0)


def record(run: Run, kind: str, seed: int, window: int) -> Recording:
    """Train to the end, or until the loss is no number, watched."""
    torch.manual_seed(seed)
    model = LanguageModel(256, WIDTH, [AttentionBlock(WIDTH, run.has_fp16_logits)]).to(run.dtype)
    attention = [p for name, p in model.named_parameters() if "q_proj" in name or "k_proj" in name]
    known = {id(p) for p in attention}
    groups = [{"params": [p for p in model.parameters() if id(p) not in known]}, {"params": attention}]
    optimizer = _optimizer(kind, groups, run)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=50) if run.loss_scale == "scaler" else None
    scale = run.loss_scale if isinstance(run.loss_scale, float) else 1.0
    base = RATES[kind] * SPREAD[seed % len(SPREAD)]
    other, text = words(256, shuffled=True), letters()
    losses: list[float] = []
    reports: list[Report] = []
    if scaler is not None:
        for p in model.parameters():
            p.register_hook(lambda grad: grad.half().to(grad.dtype))

    def step(t: int) -> None:
        # FP16 weights meet scaled gradients, which SGD does not undo: its rate does
        for group, rate in zip(optimizer.param_groups, (run.rate, run.attention_rate or run.rate), strict=True):
            group["lr"] = base * rate(max(t, 0)) / (scale * run.scale(t) if kind == "sgd" else 1.0)
        is_other = run.other_text_from is not None and t >= run.other_text_from
        tokens, following = batch(other if is_other else text)
        rows = run.rows(t)
        loss = model.loss(tokens[:rows], following[:rows])
        optimizer.zero_grad()
        scaled = loss * run.spikes(t) * scale * run.scale(t)
        if scaler is None:
            scaled.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        else:
            scaler.scale(scaled).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(float(loss.detach()))

    for t in range(-run.warmed_up, 0):
        step(t)
    if run.warmed_up:
        optimizer.state.clear()
        losses.clear()
    with uw.watch(model, optimizer, window=window, samples=64, sinks=[reports.append], budget=None, seed=seed) as watch:
        for t in range(run.steps):
            step(t)
            if not math.isfinite(losses[-1]):
                break
        watch.flush()
    kept = {report.step: report for report in reports}
    return Recording(tuple(losses), tuple(kept[step] for step in sorted(kept)))


def blown_up(losses: Sequence[float]) -> int | None:
    """The step of the loss's blow-up: from which on it stays a nat above its best, or is no number; None where it does not."""
    means = [statistics.fmean(losses[max(t - 7, 0) : t + 1]) for t in range(len(losses))]
    best, last_well = math.inf, 0
    for t, mean in enumerate(means):
        best = min(best, mean)
        if mean < best + NAT:
            last_well = t
    return None if last_well == len(losses) - 1 else last_well + 1


def _is_ill(losses: Sequence[float]) -> bool:
    """Whether the loss ends well above its best, though not by a nat."""
    means = [statistics.fmean(losses[max(t - 49, 0) : t + 1]) for t in range(49, len(losses))]
    return means[-1] > min(means) + ILL


def told(recording: Recording) -> tuple[list[int], dict[str, int], dict[str, int]]:
    """The steps at which it was warned that the run diverges; of each sign in the report, and of each that was told as INFO, the first step."""
    watcher, alerts = Divergences(), Alerts(Thresholds())
    alerts.is_logging = False
    warnings: list[int] = []
    signs: dict[str, int] = {}
    infos: dict[str, int] = {}
    for report in recording.reports:
        shown = alerts.update(watcher.add(report))
        warnings += [shown.step for alert in shown.alerts if alert.title.startswith("DIVERGES")]
        seen = shown.divergence.signs if shown.divergence is not None else ()
        for sign in seen:
            signs.setdefault(sign.name, shown.step)
        said = "\n".join(alert.text for alert in shown.alerts if alert.title.startswith("OUT OF RANGE")).lower()
        for sign in seen:
            if sign.text.lower() in said:
                infos.setdefault(sign.name, shown.step)
    return warnings, signs, infos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORDS", help="runs whose name contains one of these")
    parser.add_argument("--kinds", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0, help="others than those it was made with begin at 2")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep trained runs here, and take them from here")
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    runs = [run for run in RUNS if not given.only or any(words in run.name for words in given.only)]
    if not runs:
        parser.error(f"--only {' '.join(given.only)}: no run has this in its name")
    print(f"{'run':34} {'seed':>4} {'blow-up':>7} {'warned':>7} {'ahead':>6}  signs, and how far ahead")
    counts: Counter[str] = Counter()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    every = [(run, kind, seed) for run in runs for kind in run.kinds for seed in seeds]
    for run, kind, seed in every:
        if kind not in given.kinds:
            continue
        recording = _recording(run, kind, seed, given)
        lost_at, (warnings, signs, infos) = blown_up(recording.losses), told(recording)
        first = min(warnings, default=None)
        ahead = None if lost_at is None or first is None else lost_at - first
        if run.sign:
            in_time = run.sign in infos and (lost_at is None or lost_at - infos[run.sign] >= AHEAD)
            outcome = "false" if warnings and lost_at is None else "told" if in_time else "untold"
        elif lost_at is None:
            counts["info"] += bool(infos)
            outcome = "silent" if not warnings else "ill" if _is_ill(recording.losses) else "false"
        elif not run.can_be_told or lost_at < FEWEST * given.window:
            outcome = "at once"
        else:
            outcome = "missed" if ahead is None or ahead <= 0 else "ahead" if ahead >= AHEAD else "late"
        counts[outcome] += 1
        others = ", ".join(f"{name} {step if lost_at is None else lost_at - step}" for name, step in signs.items())
        words_ = (run.name + ", " + kind, seed, lost_at or "", first or "", "" if ahead is None else ahead)
        print("{:34} {:4} {:>7} {:>7} {:>6}".format(*words_), f" {outcome:8} {others}", flush=True)
    told_in_time, well = counts["ahead"], counts["silent"] + counts["false"]
    blown = told_in_time + counts["late"] + counts["missed"]
    print(
        f"\ntold at least {AHEAD} steps ahead: {told_in_time} of {blown}; late: {counts['late']}; not told: {counts['missed']}"
    )
    print(f"planted for one sign: told as INFO {counts['told']} of {counts['told'] + counts['untold']}")
    print(
        f"healthy runs: {well}, of which {counts['false']} were warned of, {counts['info']} told of by INFO; ill and told: {counts['ill']}"
    )
    return int(
        counts["false"] > 0 or counts["untold"] > 0 or counts["info"] > well / 20 or told_in_time < ENOUGH * blown
    )


def _recording(run: Run, kind: str, seed: int, given: argparse.Namespace) -> Recording:
    name = f"{run.name} {kind} {seed} {given.window}.json".replace(" ", "-").replace(",", "")
    path = given.keep and given.keep / name
    if path and path.exists():
        return Recording.load(path)
    recording = record(run, kind, seed, given.window)
    if path:
        recording.save(path)
    return recording


if __name__ == "__main__":
    sys.exit(main())
