"""Every cause planted in real training, and the healthy twins that must stay silent: the confusion table.

    python bench/scenarios.py [--quick] [--seeds N] [--samples K ...] [--only WORDS] [--jobs N] [--numbers] [--alone]

Small models, real optimizer steps, `uw.watch` at its defaults but for a window of 32 steps. Beside the training runs a full
comparison in FP64 (`bench/planted/truth.py`), which has to confirm what was planted and that the twins are healthy. A planted fault
counts as found when, in one of the two windows after its onset, the tensor (or its accumulator) carries the right cause, and
it must carry it still in the last window. A false alarm is a WARN or ERROR alert, or anything called stalled, stalling or
broken, where nothing was planted. Exit status 1 if a verdict was wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import bench.planted.elsewhere  # noqa: F401  # fills SCENARIOS
import bench.planted.faults  # noqa: F401
import bench.planted.twins  # noqa: F401
import update_watch as uw
from bench.planted.differences import Difference, differences, table
from bench.planted.run import SCENARIOS, WINDOW, Run
from bench.planted.truth import Truth
from update_watch.measure.device.turns import samples_for
from update_watch.report import Cause, Health, Level, Report

# what is idle, frozen or unknown wakes nobody, even where it was planted
QUIET = {Cause.requires_grad_off, Cause.zero_learning_rate, Cause.not_replayable}
BAD = {Health.stalled, Health.stalling, Health.broken}
NOTHING = "nothing"  # planted
CROWD = "crowd."  # tensors beside the model
QUICK_TWINS = ("masters in", "own buffer", "split", "64 elements", "average in fp32", "now and then", "warm up from")

Verdict = tuple[Health, Cause | None]


@dataclasses.dataclass
class Outcome:
    """One run of one scenario."""

    name: str
    samples: int
    seed: int
    verdicts: int = 0  # given, over all windows
    wrong: list[str] = dataclasses.field(default_factory=list)
    confusion: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)  # (planted, verdict)
    numbers: list[Difference] = dataclasses.field(default_factory=list)  # of weights, from the full comparison


def play(build: Callable[[], Run], samples: int, seed: int, crowd: int = 17) -> tuple[Run, list[Report], Truth]:
    """Train and watch, with so many tensors beside the model; the full comparison runs along."""
    torch.manual_seed(seed)
    run = build()
    reports: list[Report] = []

    def take(report: Report) -> None:
        tensors = tuple(t for t in report.tensors if not t.name.startswith(CROWD))
        reports.append(dataclasses.replace(report, tensors=tensors))

    # of models of few tensors more than `samples` elements would be looked at
    others = [(f"{CROWD}{i}", torch.zeros(1)) for i in range(crowd)]
    with uw.watch(
        [*run.named, *others],
        run.optimizer,
        budget=None,
        window=WINDOW,
        samples=samples,
        seed=seed,
        averages=run.averages,
        sinks=[take],
    ) as watch:
        truth = Truth(run)
        for t in range(run.windows * WINDOW):
            with truth.step(t):
                run.step(t)
        watch.flush()
    return run, reports, truth


def verdicts(report: Report) -> dict[str, Verdict]:
    """By "tensor" and "tensor/accumulator"."""
    found: dict[str, Verdict] = {}
    for t in report.tensors:
        found[t.name] = t.health, t.cause
        for name, a in t.accumulators.items():
            found[f"{t.name}/{name}"] = a.health, a.cause
    return found


def mistakes(run: Run, reports: list[Report], truth: Truth) -> list[str]:
    """What is wrong, in words; none if all is as it should be. Begins with what the full comparison does not confirm."""
    windows = [verdicts(report) for report in reports]
    last = len(windows)
    if last != run.windows and run.rule:
        return [f"{last} reports of {run.windows} windows"]
    wrong = [f"not healthy: {line}" for line in truth.unhealthy()]
    for name, cause in run.planted.items():
        onset = _onset(run, truth, name)
        for at in [onset + 1] if run.ends or onset == last else [onset + 1, last]:
            if truth.confirms(name, cause, min(at, last)) is False:
                wrong.append(f"window {at}: {cause} of {name} is not there")
        seen = [window[name] for window in windows[onset - 1 : onset + 1] if name in window]
        if not any(_is(found, cause) for found in seen):
            wrong.append(f"missed {cause} of {name}: {[_word(found) for found in seen]}")
        if not run.ends and not _is(windows[-1].get(name), cause):
            wrong.append(f"last window: {cause} of {name} is no longer seen")
    for i, window in enumerate(windows, 1):
        for name, found in window.items():
            is_on = _onset(run, truth, name) <= i and not (run.ends and i >= run.ends)
            if found[0] in BAD and not (is_on and found[1] is run.planted.get(name)):
                wrong.append(f"window {i}: {name} called {_word(found)}")
            if "/" not in name and name not in run.noisy and (problem := _contradiction(found, truth, name, i)):
                wrong.append(f"window {i}: {name} called {found[0]}, and {problem}")
    if all(cause in QUIET for cause in run.planted.values()):
        for name, found in windows[-1].items():
            if found[0] is Health.unknown and not {name, name.partition("/")[0]} & {*run.unknown, *run.planted}:
                wrong.append(f"last window: {name} is unknown")
    return wrong + list(_false_alarms(run, reports, truth))


def _contradiction(found: Verdict, truth: Truth, name: str, window: int) -> str:
    """What the full comparison of this window and the one before says against a verdict on a weight; "" if nothing."""
    known = [truth.over(name, [at]).arrived for at in (window - 1, window) if at]
    arrived = [x for x in known if x is not None]
    health, cause = found
    accuses = cause in (Cause.weight_rounding, Cause.not_written)
    if health is Health.stalled and accuses and not min(arrived, default=1.0) < 0.2:
        return f"{arrived} of what was meant arrived"
    if health is Health.stalling and accuses and not 0.05 < min(arrived, default=1.0) < 0.9:
        return f"{arrived} of what was meant arrived"
    if health is Health.healthy and arrived and not max(arrived) >= 0.7:
        return f"only {arrived} of what was meant arrived"
    return ""


def _false_alarms(run: Run, reports: list[Report], truth: Truth) -> Iterator[str]:
    for i, report in enumerate(reports, 1):
        for alert in report.alerts:
            if alert.level is Level.info or run.may_alert:
                continue
            if alert.title == "NOTHING TRAINS" and set(alert.tensors) <= set(run.planted):
                continue
            of_this = [name for name, cause in run.planted.items() if cause is alert.cause and cause not in QUIET]
            if not any(_onset(run, truth, name) <= i for name in of_this):
                yield f"window {i}: false alarm {alert.title!r}"


def _onset(run: Run, truth: Truth, name: str) -> int:
    return run.onset or (truth.onset(name) if name in run.planted else 1)


def _is(found: Verdict | None, cause: Cause) -> bool:
    return found is not None and found[1] is cause and found[0] is not Health.healthy


def _word(found: Verdict | None) -> str:
    if found is None:
        return "not reported"
    health, cause = found
    return str(health) if cause is None else str(cause)


def confusion(run: Run, reports: list[Report], truth: Truth) -> Counter[tuple[str, str]]:
    """(planted, verdict) of every tensor and accumulator.

    Of what was planted, the right verdict if it came within two windows, else the latest of these two; of what was not,
    the first that accuses, else that of the last window. What is beside a tensor that is not well shares its fate, and is
    left out then.
    """
    windows = [verdicts(report) for report in reports]
    table: Counter[tuple[str, str]] = Counter()
    for name in dict.fromkeys(name for window in windows for name in window):
        cause = run.planted.get(name)
        if cause is None:
            seen = [window[name] for window in windows if name in window]
            accused = [found for found in seen if found[0] in BAD and found[1] is not None]
            if accused or name.partition("/")[0] not in run.planted:
                table[NOTHING, _word((accused or seen[-1:])[0])] += 1
            continue
        onset = _onset(run, truth, name)
        seen = [window[name] for window in windows[onset - 1 : onset + 1] if name in window]
        right = [found for found in seen if _is(found, cause)]
        table[str(cause), _word(right[0] if right else seen[-1] if seen else None)] += 1
    return table


def judge(name: str, samples: int, seed: int, is_alone: bool = False) -> Outcome:
    """Play a scenario and compare. `is_alone`: no tensors beside the model, so that more samples are taken of a small one."""
    torch.set_num_threads(1)
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")  # torchao's, on import
    run, reports, truth = play(SCENARIOS[name], samples, seed, 0 if is_alone else 17)
    largest = max(tensor.numel() for _, tensor in run.named)
    taken = samples_for(samples, len(run.named) if is_alone else 17, largest)
    return Outcome(
        name,
        samples,
        seed,
        sum(len(verdicts(report)) for report in reports),
        mistakes(run, reports, truth),
        confusion(run, reports, truth),
        differences(run, reports, truth, taken),
    )


# --- the table ------------------------------------------------------------------------------------------


def chosen(only: str, quick: bool) -> list[str]:
    """Names of scenarios; quick: one for every cause, and the twins that are the hardest to tell."""
    names = [name for name in SCENARIOS if only in name]
    if not quick:
        return names
    kept: list[str] = []
    causes: set[Cause] = set()
    for name in names:
        is_twin = name.startswith("healthy")  # one of them needs a package
        new = set() if is_twin else set(SCENARIOS[name]().planted.values()) - causes
        if new or any(words in name for words in QUICK_TWINS):
            kept.append(name)
            causes |= new
    return kept


def print_tables(outcomes: list[Outcome]) -> None:
    """Scenarios, right and wrong; then planted by verdict."""
    print(f"\n{'scenario':60} {'right':>6} {'wrong':>6}")
    for name in dict.fromkeys(outcome.name for outcome in outcomes):
        wrong = [bool(outcome.wrong) for outcome in outcomes if outcome.name == name]
        print(f"{name:60} {wrong.count(False):6} {wrong.count(True):6}")
    table: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        table.update(outcome.confusion)
    order = [NOTHING, *map(str, Cause), *map(str, Health)]
    columns = sorted({verdict for _, verdict in table}, key=lambda word: (order + [word]).index(word))
    short = {word: "".join(chr(ord("a") + i)) for i, word in enumerate(columns)}
    print("\nplanted (rows) and verdict (columns), tensors and accumulators")
    print(f"{'':24}" + "".join(f"{short[column]:>7}" for column in columns))
    for planted in (word for word in order if any(row == word for row, _ in table)):
        counts = "".join(f"{table[planted, column] or '.':>7}" for column in columns)
        print(f"{planted:24}{counts}")
    print("   ".join(f"{letter} {word}" for word, letter in short.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one scenario for every cause and a few twins: a minute")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--samples", type=int, nargs="+", default=[256], help="elements per tensor, as in uw.watch")
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--numbers", action="store_true", help="how far efficiencies and ratios are from all elements'")
    parser.add_argument(
        "--alone", action="store_true", help="no tensors beside the model: 8 times the samples, if it is small"
    )
    given = parser.parse_args()
    if given.seeds < 1 or given.jobs < 1:
        parser.error("--seeds and --jobs must be 1 or more")
    names = chosen(given.only, given.quick)
    if not names:
        parser.error(f"--only {given.only!r}: no scenario has this in its name")
    started = time.monotonic()
    work = [(name, k, seed, given.alone) for seed in range(given.seeds) for k in given.samples for name in names]
    outcomes = []
    with multiprocessing.get_context("spawn").Pool(given.jobs) if given.jobs > 1 else _Here() as pool:
        try:
            for outcome in pool.imap(_judge, work, chunksize=4):
                outcomes.append(outcome)
                for line in outcome.wrong[:5]:
                    print(f"{outcome.name} (samples {outcome.samples}, seed {outcome.seed}): {line}", flush=True)
        except KeyboardInterrupt:
            print(f"interrupted after {len(outcomes)} of {len(work)} runs")
    print_tables(outcomes)
    if given.numbers:
        print("", *table(d for outcome in outcomes for d in outcome.numbers), sep="\n")
    seconds = time.monotonic() - started
    subjects = sum(sum(outcome.confusion.values()) for outcome in outcomes)
    wrong = sum(len(outcome.wrong) for outcome in outcomes)
    runs = sum(bool(outcome.wrong) for outcome in outcomes)
    print(
        f"\n{len(outcomes)} runs of {len(names)} scenarios, {subjects} tensors and accumulators,"
        f" {sum(outcome.verdicts for outcome in outcomes)} verdicts: {wrong} wrong, in {runs} runs; {seconds:.0f} s"
    )
    return 1 if wrong else 0


def _judge(work: tuple[str, int, int, bool]) -> Outcome:
    return judge(*work)


class _Here:
    """A pool of this process alone."""

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def imap(
        self, function: Callable[..., Outcome], work: list[tuple[str, int, int, bool]], chunksize: int
    ) -> Iterator[Outcome]:
        return map(function, work)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
