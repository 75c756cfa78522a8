from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from tests.support.evidence_samples import accumulator, histogram, tensor, window
from update_watch.evidence import TensorEvidence
from update_watch.judge.columns.judged import OfReports
from update_watch.judge.columns.reports import OfWindow
from update_watch.judge.diagnosis import Diagnosis
from update_watch.judge.headline import headline
from update_watch.report import Cause, Health, LayerReport, Report, TensorReport
from update_watch.thresholds import Thresholds

GONE = {"lost": 1.0, "headroom_histogram": histogram(-8, -7)}


def report(*tensors: TensorEvidence) -> Report:
    return Diagnosis(Thresholds()).judge(window(*tensors))


def healthy(name: str, **fields: Any) -> TensorEvidence:
    return tensor(0.98, name=name, **fields)


def stalled(name: str, **fields: Any) -> TensorEvidence:
    return tensor(0.0, name=name, **{**GONE, **fields})


def test_a_layer_has_the_worst_health_of_its_tensors_and_names_those_that_have_it() -> None:
    found = report(
        healthy("a.weight", numel=300),
        stalled("a.bias", numel=100),
        tensor(None, name="b.weight", trainable=False),
        healthy("b.bias"),
        tensor(None, name="top", optimizer_group=""),
    )
    assert found.layers == (
        LayerReport("a", Health.stalled, ("a.bias",), 0.735),
        LayerReport("b", Health.frozen, ("b.weight",), 0.98),
        LayerReport("", Health.idle, ("top",), None),
    )


FROZEN = tensor(None, name="f.w", trainable=False)
IDLE = tensor(None, name="i.w", optimizer_group="")
UNKNOWN = tensor(None, name="u.w", reason="its rule looks at other tensors")
UNKNOWN_TOO = tensor(None, name="v.w", reason="its rule looks at other tensors")
BROKEN = tensor(None, name="x.w", finite=False)


@pytest.mark.parametrize(
    ("tensors", "health"),
    [
        ((healthy("a.w"), FROZEN, IDLE), Health.healthy),
        ((healthy("a.w"), UNKNOWN), Health.healthy),
        ((healthy("a.w"), UNKNOWN, UNKNOWN_TOO), Health.unknown),
        ((FROZEN,), Health.frozen),
        ((FROZEN, IDLE), Health.idle),
        ((healthy("a.w"), tensor(0.5, name="b.w", lost=0.5)), Health.stalling),
        ((tensor(0.5, name="b.w", lost=0.5), stalled("a.w")), Health.stalled),
        ((stalled("a.w"), BROKEN), Health.broken),
        ((), Health.unknown),
    ],
)
def test_the_health_of_a_run(tensors: tuple[TensorEvidence, ...], health: Health) -> None:
    assert report(*tensors).health is health


HEADLINES = [
    pytest.param((), "No tensors are watched.", id="none"),
    pytest.param((healthy("a.w"),), "The one tensor is healthy (efficiency 0.98).", id="one"),
    pytest.param((healthy("a.w"), healthy("b.w")), "All 2 tensors are healthy (efficiency 0.98).", id="all"),
    pytest.param(
        (healthy("a.w"), FROZEN, IDLE),
        "1 of 3 tensors healthy (efficiency 0.98), 1 idle, 1 frozen (in no optimizer).",
        id="asleep",
    ),
    pytest.param(
        (healthy("a.w"), UNKNOWN, UNKNOWN_TOO),
        "1 of 3 tensors healthy (efficiency 0.98), 2 unknown (its rule looks at other tensors).",
        id="unknown",
    ),
    pytest.param(
        (UNKNOWN, UNKNOWN_TOO, tensor(None, name="s.w", steps=0, measured_steps=0)),
        "0 of 3 tensors healthy, 3 unknown (its rule looks at other tensors: 2 of these).",
        id="unknown-for-several-reasons",
    ),
    pytest.param(
        (*[healthy(f"l{i}.attn.weight") for i in range(28)], *[stalled(f"l{i}.norm1.weight") for i in range(12)]),
        "12 of 40 tensors are stalled since step 1 (all 12 norms): BF16 weights without an FP32 master round the"
        " updates away (efficiency 0.00, 100% lost); keep FP32 master weights: model.float() and torch.autocast (+655 kB),"
        " or use stochastic rounding (torchao, +0 B) or Kahan summation (optimi, +328 kB); then retune the learning rate.",
        id="stalled-norms",
    ),
    pytest.param(
        (healthy("a.w"), stalled("b.w", lr=1e-5, lr_max=1e-5, lr_min=1e-5, critical_lr=2e-3)),
        "1 of 2 tensors is stalled since step 1 (b.w): BF16 weights without an FP32 master round the updates away"
        " (efficiency 0.00, 100% lost); keep FP32 master weights: model.float() and torch.autocast (+32.8 kB), or use"
        " stochastic rounding (torchao, +0 B) or Kahan summation (optimi, +16.4 kB); then retune the learning rate.",
        id="one-stalled",
    ),
    pytest.param(
        (
            healthy("a.w"),
            tensor(0.0, name="e.w", lost=1.0, headroom_histogram=histogram(4)),
            stalled("b.w", accumulators=accumulator("exp_avg_sq", 0.9, decay=0.0, rate=0.001)),
            stalled("c.w"),
            tensor(0.5, name="d.w", lost=0.5),
            healthy("f.w", accumulators=accumulator("exp_avg_sq", 0.9, decay=0.0, rate=0.001)),
        ),
        "2 of 6 tensors are stalled since step 1 (b.w, c.w): BF16 weights without an FP32 master round the updates away"
        " (efficiency 0.00, 100% lost); keep FP32 master weights: model.float() and torch.autocast (+115 kB), or use"
        " stochastic rounding (torchao, +0 B) or Kahan summation (optimi, +49.2 kB); then retune the learning rate; also 1 stalled (not written), 1 stalling (rounded away), exp_avg_sq of 1"
        " stalled.",
        id="several-causes",
    ),
    pytest.param(
        (
            healthy("a.w", accumulators=accumulator("exp_avg_sq", 0.9, decay=0.0, rate=0.001)),
            healthy("b.w", accumulators=accumulator("exp_avg_sq", 0.9, decay=0.0, rate=0.001)),
            healthy("c.w", accumulators=accumulator("average:ema", 0.0, rate=0.001)),
        ),
        "exp_avg_sq is stalled in 2 of 3 tensors: Optimizer state exp_avg_sq in BF16 rounds its decay away at 1 -"
        " beta ="
        " 0.001 (efficiency of the decay 0.00), so it can grow but not shrink; keep the optimizer state in FP32 or"
        " use a"
        " beta of at most 0.9961; also average:ema of 1 stalled.",
        id="accumulators-only",
    ),
]


@pytest.mark.parametrize(("tensors", "text"), HEADLINES)
def test_the_headline_says(tensors: tuple[TensorEvidence, ...], text: str) -> None:
    assert report(*tensors).headline == text


def test_a_headline_of_stalls_counts_what_waits_for_its_verdict() -> None:
    waiting = [tensor(0.7, name=f"{name}.w", lost=0.3, efficiency_error=0.1) for name in "bcd"]
    text = report(stalled("a.w"), *waiting, UNKNOWN).headline
    assert text.startswith("1 of 5 tensors is stalled") and text.endswith("; also 1 not measured, 3 not known yet.")
    assert "known yet" not in report(stalled("a.w"), healthy("b.w"), UNKNOWN).headline


def test_the_headline_tells_since_when() -> None:
    diagnosis = Diagnosis(Thresholds())
    diagnosis.judge(window(healthy("a.w"), healthy("b.w")))
    diagnosis.judge(window(stalled("a.w"), healthy("b.w"), step=256))
    found = diagnosis.judge(window(stalled("a.w"), stalled("b.w"), step=384))
    assert found.headline.startswith("2 of 2 tensors are stalled since steps 129 to 257: ")


def test_tensors_are_called_by_what_they_have_in_common() -> None:
    def headline(*names: str) -> str:
        return report(*[stalled(name) for name in names], healthy("l0.attn.weight"), healthy("l1.mlp.weight")).headline

    assert "(both norms, norm.bias)" in headline("l0.norm1.weight", "l0.norm2.weight", "norm.bias")
    assert "(l0.norm1.weight)" in headline("l0.norm1.weight")


def test_a_run_that_trains_nothing_says_why() -> None:
    dead = tensor(0.0, name="a.w", zero_gradient_fraction=1.0, lost=1.0)
    found = report(dead, FROZEN)
    assert found.health is Health.idle
    assert found.headline == (
        "Nothing is being trained since step 1: every gradient is exactly 0; look for a clipping norm of 0, a loss that is"
        " multiplied by 0, or a product of two zeros at the start."
    )


def test_nothing_measured_is_no_all_clear() -> None:
    found = report(UNKNOWN, UNKNOWN_TOO)
    assert found.headline == "0 of 2 tensors healthy, 2 unknown (its rule looks at other tensors)."


def test_tensors_that_did_not_begin_together_are_given_the_range_of_their_steps() -> None:
    def stalled_since(name: str, step: int) -> TensorReport:
        return TensorReport(name, Health.stalled, Cause.weight_rounding, dtype="bfloat16", since_step=step)

    tensors = [stalled_since("a.w", 551), stalled_since("b.w", 1), TensorReport("c.w", Health.healthy)]
    assert headline(OfReports(tensors)).startswith("2 of 3 tensors are stalled since steps 1 to 551 (a.w, b.w): ")
    assert headline(OfReports(tensors[:1] * 2)).startswith("2 of 2 tensors are stalled since step 551: ")


@pytest.mark.parametrize(("looks", "said"), [(7, "; looked at 7 of 128 steps."), (8, "."), (None, ".")])
def test_all_is_well_says_of_how_few_steps_that_is_known(looks: int | None, said: str) -> None:
    seen = dataclasses.replace(window(healthy("a.w"), healthy("b.w")), observed_steps=looks)
    found = Diagnosis(Thresholds()).judge(seen)
    assert found.headline == f"All 2 tensors are healthy (efficiency 0.98){said}"


def test_a_printed_report_is_its_step_and_its_headline() -> None:
    assert str(Report(1280, 128, Health.healthy, "All is well.", ())) == "step 1,280: All is well."


def test_what_a_few_looks_of_a_window_say_by_chance_is_no_number_beside_the_verdict() -> None:
    few = {"measured_steps": 3, "efficiency_error": 0.33}
    diagnosis = Diagnosis(Thresholds())
    diagnosis.judge(window(healthy("a.w"), healthy("b.w")))
    found = diagnosis.judge(window(tensor(0.16, name="a.w", **few), tensor(0.2, name="b.w", **few), step=256))
    assert found.headline == "All 2 tensors are healthy."
    low = Diagnosis(Thresholds(stalling=0.3, stalling_exit=0.4))  # whoever calls that healthy reads the number
    assert low.judge(window(tensor(0.6, name="a.w"))).headline == "The one tensor is healthy (efficiency 0.60)."


def test_of_very_many_unknown_tensors_some_are_asked_for_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason is a sentence that has to be made, and all of them were."""
    few = [tensor(name=f"l{i}.w", measured_steps=1 + (i % 5 == 0)) for i in range(2000)]
    asked: list[int] = []
    advice = OfWindow.advice

    def note(judged: OfWindow, place: int) -> str:
        asked.append(place)
        return advice(judged, place)

    monkeypatch.setattr(OfWindow, "advice", note)
    said = report(*few).headline
    found = re.fullmatch(
        r"0 of 2000 tensors healthy, 2000 unknown \(only 1 of the 6 .* so far: about (\d+)% of these\)\.", said
    )
    assert found and abs(int(found[1]) - 80) < 10, said
    assert 100 < len(asked) <= 300
    assert report(*few[:3]).headline.endswith("so far: 2 of these).")
