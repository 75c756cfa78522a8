"""Every kind of alert as it is told, for docs/alerts.md: written from reports made by hand, by the code that tells them.

python bench/verdicts/alert_texts.py            # print the page
python bench/verdicts/alert_texts.py --write    # write docs/alerts.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from update_watch.foresight.schedules import Schedule
from update_watch.judge import reasons
from update_watch.judge.advice import say
from update_watch.judge.alerts import Alerts
from update_watch.judge.forecast.outlook import Outlook
from update_watch.judge.seen import Seen
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, AccumulatorReport, Cause, Health, Report, TensorReport
from update_watch.thresholds import Thresholds

PAGE = Path(__file__).parents[2] / "docs" / "alerts.md"
_HEAD = """# Alerts

One story per cause and run. It is told when it begins, when the share of the parameters it holds passes the next of 1%, 10%,
50% and all (below half of them only with twice as many tensors as were told), when it becomes worse in kind (stalling, then
stalled), and when it is over. A tensor of which nothing can be said for a while stays in the story. What begins again within
15 minutes waits for them to pass; at most 12 alerts an hour, a quarter of them kept for errors (fields of `uw.Thresholds`).

ERROR: stalled, broken, nothing trains, an average that does not follow. WARN: stalling, states and decay that are lost, what is
frozen and yet moved by its optimizer, tensors whose optimizer still steps what they were before they were replaced, more than a tenth that cannot be measured. INFO: a layer that goes idle after it trained,
what leaves the range it had (updates, gradients, optimizer state, the top of FP16, skipped steps), each once in a run, FP32 weights that a resume left with BF16 values, and the end of a story. What will stall at the run's schedule, also at the latest step of its range, for a tenth of the run
or more, is one WARN once two forecasts in a row say so; what was foretold is then told as it begins, and when it holds everything. Weights that run away, as they do before a loss blows up, are
one WARN ([divergence](divergence.md)). Each is one record of the logger `update_watch` (at most four lines: the list of tensors is left out), one `Alert` in the report,
and one message of a sink.

The page is made by `python bench/verdicts/alert_texts.py --write`.
"""


def _tensor(
    name: str, health: Health, cause: Cause | None = None, seen: Seen | None = None, **fields: Any
) -> TensorReport:
    advice = "" if cause is None else say(cause, seen or Seen())
    given = {"shape": (256, 64), "numel": 16384, "dtype": "bfloat16", "since_step": 129, "advice": advice, **fields}
    if seen is not None:
        given = {"efficiency": seen.efficiency, "lost_fraction": seen.lost, **given}
    return TensorReport(name, health, cause, **given)


def _average(cause: Cause, health: Health, **seen: Any) -> dict[str, AccumulatorReport]:
    text = say(cause, Seen(dtype="bfloat16", accumulator="average:ema", **seen))
    return {"average:ema": AccumulatorReport("average:ema", "bfloat16", health, cause, text, seen.get("efficiency"))}


def _moving(name: str) -> TensorReport:
    """Its updates are 8 to 16 half gaps at the rate 3e-4."""
    movement = tuple(float(i == 3 - HEADROOM_LOW) for i in range(HEADROOM_BINS))
    return _tensor(name, Health.healthy, efficiency=1.0, movement_histogram=movement, movement_lr=3e-4, lr=3e-4)


def _growing(name: str, window: int) -> TensorReport:
    """Twice as large in each window."""
    sizes: dict[str, Any] = {"weight_rms": 0.02 * 2.0**window, "gradient_rms": 1e-3, "update_ratio": 1e-3, "lr": 3e-4}
    return _tensor(name, Health.healthy, optimizer_group="0/0", efficiency=1.0, **sizes)


def _scaled(name: str, window: int) -> TensorReport:
    """FP16, of which the largest gradient is twice as large in each window."""
    sizes: dict[str, Any] = {"weight_rms": 0.02, "gradient_rms": 1e-3, "update_ratio": 1e-3, "lr": 3e-4}
    largest = 128.0 * 2.0**window
    return _tensor(
        name,
        Health.healthy,
        optimizer_group="0/0",
        efficiency=1.0,
        gradient_max=largest,
        **{**sizes, "dtype": "float16"},
    )


def stories() -> dict[str, list[list[TensorReport]]]:
    """Title -> the windows of a run whose alerts are shown."""
    lost = Seen(dtype="bfloat16", efficiency=0.01, lost=0.98, lr=3.1e-4, critical_lr=8e-3)
    norms = [f"blocks.{i}.norm.weight" for i in range(5)]
    matrices = [f"blocks.{i}.up.weight" for i in range(10)]
    small: dict[str, Any] = {"shape": (64,), "numel": 64}
    rounding = Cause.weight_rounding
    stalled = [_tensor(n, Health.stalled, rounding, lost, **small) for n in norms]
    well = [_tensor(n, Health.healthy) for n in matrices]
    all_stalled = [_tensor(n, Health.stalled, rounding, lost, since_step=513) for n in matrices]
    all_well = [_tensor(n, Health.healthy, **small) for n in norms]
    dead = [_tensor(n, Health.idle, Cause.zero_gradient, Seen(steps=128, looks=64)) for n in matrices]
    lacking = [
        _tensor(n, Health.unknown, Cause.not_replayable, advice=reasons.unknown("its rule draws random numbers"))
        for n in matrices[:4]
    ]
    moving = Seen(moved=2.6e-4, mover="per step, by its optimizer")
    overwritten = Seen(net=0.02, written_step=127)
    return {
        "Lost to rounding: it begins, holds all, is over": [
            [*stalled, *well],
            [*stalled, *all_stalled],
            [*all_well, *well],
        ],
        "Nothing trains": [dead],
        "Not measured": [[*lacking, *well[4:]]],
        "Not copied back": [[_tensor(n, Health.stalled, Cause.not_copied_back, Seen(net=0.0)) for n in matrices]],
        "Overwritten": [[_tensor(n, Health.stalled, Cause.overwritten, overwritten) for n in matrices]],
        "An average that does not follow": [
            [_tensor(n, Health.healthy, accumulators=_average(c, Health.stalled, **seen)) for n in matrices]
            for c, seen in (
                (Cause.average_rounding, {"efficiency": 0.02, "lost": 0.99, "rate": 1e-4}),
                (Cause.average_diverges, {"efficiency": -1.0, "lost": 0.0}),
            )
        ],
        "An average that is never updated": [
            [
                _tensor(n, Health.healthy, accumulators=_average(Cause.average_not_updated, Health.idle, steps=384))
                for n in matrices
            ]
        ],
        "Frozen, and yet moving": [
            [
                *(_tensor(n, Health.healthy, Cause.requires_grad_off, moving, efficiency=1.0) for n in matrices[:3]),
                *well[3:],
            ]
        ],
        "What is to come, at the run's schedule": [[_moving(n) for n in matrices]] * 2,
        "A run that will blow up": [[_growing(n, window) for n in matrices] for window in range(6)],
        "What leaves its range": [[_scaled(n, window) for n in matrices] for window in range(8)],
        "FP32 weights that hold BF16 values, after a resume": [
            [
                _tensor(n, Health.healthy, dtype="float32", was_rounded=True, advice=reasons.was_rounded(129))
                for n in matrices
            ]
        ],
        "Not a number": [[_tensor(matrices[0], Health.broken, Cause.non_finite, Seen()), *well[1:]]],
    }


def page() -> str:
    """The page, in Markdown."""
    parts = [_HEAD]
    for title, windows in stories().items():
        parts.append(f"## {title}\n")
        alerts = Alerts(Thresholds(), clock=iter(range(10**6, 10**9, 3600)).__next__)
        alerts.is_logging = False
        outlook = Outlook(Schedule(lambda step: 3e-4 * 0.5 ** (step / 5000), steps=60_000), Thresholds())
        for i, tensors in enumerate(windows, 1):
            step = 256 * i
            report = outlook.add(Report(step, 128, Health.healthy, "", tuple(tensors)))
            for alert in alerts.update(report).alerts:
                parts.append(f"```text\n{alert.level} update-watch, step {step}: {alert.title}\n{alert.text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
    else:
        print(page())
