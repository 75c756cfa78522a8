"""Sampled numbers and verdicts against the full comparison of all elements in FP64, window by window, in many regimes.

    python bench/truth.py [--quick] [--only WORDS ...] [--seeds N] [--jobs N] [--json FILE] [--markdown] [--keep FOLDER [--no-training]]

Small language models, really trained, weights in BF16 (FP16 where it says so), watched at the defaults. A regime is an optimizer, a
size, a schedule, a vocabulary (`bench/shared/regimes.py`); seeds differ in data and learning rate. One line for each:

    readings   tensors times windows
    bias       mean of (efficiency said - efficiency of all elements in all steps of the window)
    95%, max   of the absolute difference
    cover      share of readings within 2 standard errors of the truth, +-0.001 for FP32's own rounding
    zero       readings with an error of 0 that are not exact
    lost, net, ratio   95% of the absolute difference of lost fraction, displacement efficiency, update ratio (relative)
    l cov, r cov   of lost fraction and update ratio, the share within 2 of their standard errors, as above
    false h    called healthy, and the truth is below the limit by more than 0.05, over the window and all that may be pooled
    false s    accused (stalling, stalled, broken), and the truth is above the limit by as much; or idle, and it has a gradient
    unknown    share of readings; after: steps until a tensor has its first verdict, median and largest

Exit status 1 if a bar is missed: cover under 0.93 or bias over 0.01 where there are 200 readings, an error of 0 that is not
exact, more than one wrong verdict in 1,000. With `--keep` the readings of each training are kept and read again the next
time: all regimes and seeds take many hours, and can so be run in parts. Empty the folder when the code has changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import update_watch as uw
from bench.shared.full_comparison import Exact, FullComparison
from bench.shared.regimes import QUICK, REGIMES, WARMED_UP, Regime
from bench.shared.verdict_check import VerdictCheck
from update_watch.report import Health, Report, TensorReport

COVER, BIAS, WRONG, ENOUGH = 0.93, 0.01, 1e-3, 200
EXACT = 1e-3  # what FP32 and FP64 may differ by


@dataclasses.dataclass(frozen=True)
class Reading:
    """One tensor in one window: what was said, and how far it is from the truth."""

    tensor: str
    window: int
    health: str
    truth: float | None
    error: float | None  # of efficiency, as stated
    off: float | None  # efficiency said - truth
    lost_off: float | None
    net_off: float | None
    ratio_off: float | None  # relative
    wrong: str  # "healthy", "accused", "idle", or ""
    lost_error: float | None = None  # as stated
    ratio_error: float | None = None  # as stated, relative


def measure(regime: Regime, seed: int) -> list[Reading]:
    """Train, watch, compare."""
    torch.set_num_threads(1)
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)  # alerts are not the point here
    warnings.simplefilter("ignore")
    torch.manual_seed(seed)
    training = regime.make(seed, regime.steps)
    for _ in range(WARMED_UP):
        training.gradients(0)
        training.step()
    named = list(training.model.named_parameters())
    comparison = FullComparison(named, training.optimizers, training.rules)
    reports: list[Report] = []
    truths: list[dict[str, Exact]] = []
    with uw.watch(
        *(training.model, training.optimizers),
        budget=None,
        window=regime.window,
        samples=regime.samples,
        seed=seed,
        sinks=[reports.append],
    ) as watch:
        for t in range(regime.steps):
            training.gradients(t)
            with comparison.step():
                training.step()
            if (t + 1) % regime.window == 0:
                truths.append(comparison.close_window())
                _check_alive(regime, seed, truths[-1])
                _wait_for(lambda: len(reports) >= len(truths))
        watch.flush()
    if len(reports) != len(truths):
        raise RuntimeError(f"{regime.name}: {len(reports)} reports of {len(truths)} windows")
    check = VerdictCheck(regime.window)
    readings = []
    for window, (report, exact) in enumerate(zip(reports, truths, strict=True)):
        for t in report.tensors:
            readings.append(_reading(t, window, exact[t.name], check.add(t, exact[t.name])))
    return readings


def _check_alive(regime: Regime, seed: int, exact: dict[str, Exact]) -> None:
    """A training that has blown up has no updates left to compare, and would pass every bar."""
    alive = sum(0 < e.want < math.inf for e in exact.values())
    if 2 * alive < len(exact):
        raise RuntimeError(
            f"{regime.name}, seed {seed}: only {alive} of {len(exact)} tensors have updates; the training has blown up,"
            " lower its rate in bench/shared/regimes.py."
        )


def _wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """So that no window is dropped: training here is faster than anybody's."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(1e-3)


def _reading(t: TensorReport, window: int, exact: Exact, wrong: str) -> Reading:
    ratio = exact.update_ratio
    ratio_off = _off(t.update_ratio, ratio)
    return Reading(
        t.name,
        window,
        t.health.value,
        exact.efficiency,
        t.efficiency_error,
        _off(t.efficiency, exact.efficiency),
        _off(t.lost_fraction, exact.lost_fraction),
        _off(t.displacement_efficiency, exact.displacement_efficiency),
        None if ratio_off is None or not ratio else ratio_off / ratio,
        wrong,
        t.lost_fraction_error,
        None if t.update_ratio_error is None or not ratio else t.update_ratio_error / ratio,
    )


def _off(said: float | None, truth: float | None) -> float | None:
    return None if said is None or truth is None else said - truth


# --- the table --------------------------------------------------------------------------------------------


def summary(readings: list[Reading], steps_per_window: int) -> dict[str, Any]:
    """The numbers of a line, of the readings of all seeds (each seed's after another's)."""
    known = [r for r in readings if r.off is not None]
    stated = [r for r in known if r.error is not None]
    first: list[int] = []
    waiting: dict[str, int] = {}
    for r in readings:
        if r.window == 0:
            waiting[r.tensor] = 0
        if r.tensor in waiting and r.health != Health.unknown.value:
            first.append((r.window + 1) * steps_per_window)
            del waiting[r.tensor]
    return {
        "readings": len(readings),
        "compared": len(known),
        "bias": statistics.fmean(r.off or 0.0 for r in known) if known else 0.0,
        "off_95": share_below(0.95, (r.off for r in known)),
        "off_max": share_below(1.0, (r.off for r in known)),
        "cover": covered((r.off, r.error) for r in readings),
        "lost_cover": covered((r.lost_off, r.lost_error) for r in readings),
        "ratio_cover": covered((r.ratio_off, r.ratio_error) for r in readings),
        "false_zero": sum(r.error == 0 and abs(r.off or 0.0) > EXACT for r in stated),
        "lost_95": share_below(0.95, (r.lost_off for r in readings)),
        "net_95": share_below(0.95, (r.net_off for r in readings)),
        "ratio_95": share_below(0.95, (r.ratio_off for r in readings)),
        "false_healthy": sum(r.wrong == "healthy" for r in readings),
        "false_accused": sum(r.wrong in ("accused", "idle") for r in readings),
        "unknown": sum(r.health == Health.unknown.value for r in readings) / len(readings),
        "first_median": statistics.median(first) if first else None,
        "first_max": max(first) if first else None,
        "never": sum(r.window == 0 for r in readings) - len(first),
    }


def covered(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """The share of (difference, standard error) that are within two; of those that are known."""
    found = [abs(off) <= 2 * error + EXACT for off, error in pairs if off is not None and error is not None]
    return sum(found) / len(found) if found else None


def share_below(share: float, values: Iterable[float | None]) -> float:
    """The absolute value that this share of the known ones does not exceed."""
    known = sorted(abs(value) for value in values if value is not None)
    return known[min(len(known) - 1, int(share * len(known)))] if known else 0.0


def missed(name: str, line: dict[str, Any]) -> list[str]:
    """Bars that a regime misses, in words."""
    found = []
    if line["compared"] >= ENOUGH:
        if line["cover"] is not None and line["cover"] < COVER:
            found.append(f"{name}: 2 standard errors cover {line['cover']:.3f}, the bar is {COVER}")
        if abs(line["bias"]) > BIAS:
            found.append(f"{name}: bias {line['bias']:+.4f}, the bar is {BIAS}")
    if line["false_zero"]:
        found.append(f"{name}: {line['false_zero']} readings have an error of 0 and are not exact")
    return found


HEAD = (
    f"{'regime':48} {'readings':>8} {'bias':>8} {'95%':>6} {'max':>6} {'cover':>6} {'zero':>4} {'lost':>6} {'net':>6}"
    f" {'ratio':>6} {'l cov':>5} {'r cov':>5} {'false h':>7} {'false s':>7} {'unknown':>7} {'after':>10}"
)


def text(name: str, line: dict[str, Any]) -> str:
    cover, lost, ratio = (
        "-" if line[kind] is None else f"{line[kind]:.3f}" for kind in ("cover", "lost_cover", "ratio_cover")
    )
    after = "never" if line["first_median"] is None else f"{line['first_median']:.0f}/{line['first_max']}"
    never = f" ({line['never']} never)" if line["never"] and line["first_median"] is not None else ""
    return (
        f"{name:48} {line['compared']:8} {line['bias']:+8.4f} {line['off_95']:6.3f} {line['off_max']:6.3f} {cover:>6}"
        f" {line['false_zero']:4} {line['lost_95']:6.3f} {line['net_95']:6.3f} {line['ratio_95']:6.3f}"
        f" {lost:>5} {ratio:>5} {line['false_healthy']:7} {line['false_accused']:7} {line['unknown']:7.3f} {after:>10}{never}"
    )


MARKDOWN_HEAD = (
    "| regime | readings | bias | 95% of errors under | largest | covered | wrong | unknown | ratio |\n"
    + "|---" * 9
    + "|"
)


def markdown(name: str, line: dict[str, Any]) -> str:
    """A line of the table in docs/definitions.md."""

    def short(value: float, digits: int = 3) -> str:
        found = f"{value:.{digits}f}"
        return found if float(found) else "0"

    covered_is = "-" if not line["cover"] else f"{line['cover']:.2f}"
    ratio = "-" if not line["ratio_cover"] else f"{line['ratio_cover']:.2f}"
    wrong = line["false_healthy"] + line["false_accused"]
    unknown = short(line["unknown"], 3 if line["unknown"] < 0.005 else 2)
    return (
        f"| {name} | {line['readings']:,} | {short(line['bias'])} | {short(line['off_95'])} | {short(line['off_max'])} |"
        f" {covered_is} | {wrong} | {unknown} | {short(line['ratio_95'], 2)}, {ratio} |"
    )


def chosen(only: list[str], quick: bool) -> list[str]:
    names = QUICK if quick and not only else tuple(REGIMES)
    return [name for name in names if not only or any(words in name for words in only)]


def _kept(folder: Path | None, name: str, seed: int) -> Path | None:
    """Where the readings of a training are kept."""
    return None if folder is None else folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.{seed}.json"


def _measure(work: tuple[str, int, Path | None]) -> tuple[str, int, list[Reading]]:
    name, seed, kept = work
    if kept is not None and kept.exists():
        return name, seed, [Reading(**fields) for fields in json.loads(kept.read_text())]
    readings = measure(REGIMES[name], seed)
    if kept is not None:
        # named when it is whole: what was cut off is trained again
        unfinished = kept.with_suffix(".part")
        unfinished.write_text(json.dumps([dataclasses.asdict(r) for r in readings]))
        unfinished.replace(kept)
    return name, seed, readings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few regimes, one seed")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORDS", help="regimes whose name contains one of these"
    )
    parser.add_argument("--seeds", type=int, help="how many (default: 5; with --quick 1)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", metavar="FILE", help="write the lines here too")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/definitions.md at the end")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the readings of each training here")
    parser.add_argument("--no-training", action="store_true", help="only of what is kept")
    parser.add_argument("--wrong", action="store_true", help="list the wrong verdicts")
    parser.add_argument("--list", action="store_true", help="names of the regimes, nothing else")
    given = parser.parse_args()
    names = chosen(given.only, given.quick)
    if not names:
        parser.error(f"--only {' '.join(given.only)}: no regime has this in its name; --list shows them")
    if given.list:
        print("\n".join(names))
        return 0
    seeds = given.seeds or (1 if given.quick else 5)
    if given.no_training and given.keep is None:
        parser.error("--no-training reads what --keep FOLDER has kept, and no folder is given")
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    work = [(name, seed, _kept(given.keep, name, seed)) for name in names for seed in range(seeds)]
    if given.no_training:
        work = [one for one in work if one[2] is not None and one[2].exists()]
        names = list(dict.fromkeys(name for name, _, _ in work))
    last = {name: seed for name, seed, _ in work}
    lines: dict[str, dict[str, Any]] = {}
    collected: dict[str, list[Reading]] = {name: [] for name in names}
    started = time.monotonic()
    print(HEAD, flush=True)
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for name, seed, readings in pool.imap(_measure, work):
            collected[name] += readings
            if given.wrong:
                for r in readings:
                    if r.wrong:
                        print(
                            f"  seed {seed}, window {r.window}: {r.tensor} is called {r.health}, efficiency {r.truth}"
                        )
            if seed == last[name]:
                lines[name] = summary(collected[name], REGIMES[name].window)
                print(text(name, lines[name]), flush=True)
    bars = [line for name in names for line in missed(name, lines[name])]
    total = sum(line["readings"] for line in lines.values())
    wrong = sum(line["false_healthy"] + line["false_accused"] for line in lines.values())
    if wrong > WRONG * total:
        bars.append(f"{wrong} of {total} verdicts are wrong, the bar is one in {1 / WRONG:.0f}")
    print(
        f"{len(names)} regimes, {len(work)} trainings, {total} verdicts, {wrong} wrong; {time.monotonic() - started:.0f} s"
    )
    print("\n".join(f"missed: {line}" for line in bars))
    if given.markdown:
        print("\n".join([MARKDOWN_HEAD, *(markdown(name, lines[name]) for name in names)]))
    if given.json:
        Path(given.json).write_text(json.dumps(lines, indent=1))
    return 1 if bars else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
