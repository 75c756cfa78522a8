"""What judging one window of many tensors costs: processor time on the background thread, which shares the interpreter.

    python bench/verdicts/judging.py [--tensors N]

Evidence written by chance, each tensor with numbers of its own: weight, two states in BF16, the decay. The best of several
windows, for runs that are healthy, one third each healthy, stalling and stalled, and wholly stalled.
"""

from __future__ import annotations

import argparse
import random
import time

from update_watch.evidence import AccumulatorEvidence, Numbers, TensorEvidence, WindowEvidence
from update_watch.judge.diagnosis import Diagnosis
from update_watch.report import HEADROOM_BINS
from update_watch.thresholds import Thresholds

_STEPS = 128
_ROUNDS = 5
_EFFICIENCIES = {"healthy": (0.99,), "mixed": (0.99, 0.5, 0.02), "stalled": (0.02,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=2000)
    count = parser.parse_args().tensors
    for kind, efficiencies in _EFFICIENCIES.items():
        windows = [_window(count, k, efficiencies) for k in range(1, 5)]
        best = min(_judge(windows) for _ in range(_ROUNDS))
        print(f"{count} tensors, {kind}: {1e3 * best:.0f} ms a window")


def _judge(windows: list[WindowEvidence]) -> float:
    """Processor seconds of the fastest window of a run."""
    diagnosis = Diagnosis(Thresholds())
    seconds = []
    for window in windows:
        start = time.process_time()
        diagnosis.judge(window)
        seconds.append(time.process_time() - start)
    return min(seconds)


def _window(count: int, k: int, efficiencies: tuple[float, ...]) -> WindowEvidence:
    rng = random.Random(k)
    tensors = tuple(_tensor(i, efficiencies[i % len(efficiencies)], rng) for i in range(count))
    return WindowEvidence(_STEPS * k, _STEPS, tensors)


def _tensor(i: int, efficiency: float, rng: random.Random) -> TensorEvidence:
    name = f"model.layers.{i // 10}.block{i % 10}.weight"
    heights = [rng.random() for _ in range(HEADROOM_BINS)]
    rates = {"exp_avg": 0.1, "exp_avg_sq": 0.05, "weight_decay": None}
    parts = {
        state: AccumulatorEvidence(
            state, "bfloat16", _numbers(0.99, rng), _numbers(0.99, rng), _numbers(0.98, rng), "", r
        )
        for state, r in rates.items()
    }
    return TensorEvidence(
        name,
        "bfloat16",
        4096,
        names=(name,),
        layer=name.rpartition(".")[0],
        optimizer_group="0/0",
        shape=(64, 64),
        steps=_STEPS,
        measured_steps=_STEPS,
        zero_gradient_fraction=0.0,
        numbers=_numbers(efficiency, rng),
        update_ratio=rng.random() * 1e-3,
        applied_ratio=rng.random() * 1e-3,
        headroom_histogram=tuple(h / sum(heights) for h in heights),
        lr=1e-3,
        lr_max=1e-3,
        lr_min=1e-3,
        weight_decay=0.01,
        critical_lr=rng.random() * 1e-4,
        state_factor=0.98 + 0.04 * rng.random(),
        state_factor_steps=_STEPS,
        scheme="plain",
        displacement_evidence=1.0,
        accumulators=parts,
    )


def _numbers(efficiency: float, rng: random.Random) -> Numbers:
    value = efficiency * (0.99 + 0.02 * rng.random())
    return Numbers(value, 0.01 * rng.random(), value, 0.9 + 0.1 * rng.random(), max(0.0, 1 - value))


if __name__ == "__main__":
    main()
