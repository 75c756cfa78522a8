"""The verdict in the words of a person: kinds, how much is lost, since when, why."""

from __future__ import annotations

from typing import Any

import pytest

from update_watch.dashboards.frame import frame_of
from update_watch.dashboards.verdict import (
    CAUSE_WORDS,
    Verdict,
    cause_words,
    in_a_row,
    lr_words,
    share_words,
    verdict_of,
)
from update_watch.report import AccumulatorReport, Cause, Health, Report, TensorReport

INTERNAL = ("wanted", "octave", "edge", "cohort", "weight_rounding", "half ulp", "half a gap", "efficiency")


def tensor(name: str, health: Health = Health.healthy, **fields: Any) -> TensorReport:
    shape = (8,) if "norm" in name else (8, 8)
    numel = 8 if "norm" in name else 64
    given = {"efficiency": 0.99, "dtype": "bfloat16", "shape": shape, "numel": numel, **fields}
    if health in (Health.stalled, Health.stalling):
        given = {"cause": Cause.weight_rounding, "since_step": 1, "advice": "It is; do this.", **given}
    return TensorReport(name, health, **given)


def said(*tensors: TensorReport, **options: Any) -> Verdict:
    report = Report(100, 10, Health.stalled, "", tensors)
    return verdict_of(frame_of(report), **options)


def llama(norms: Health, matrices: Health, **fields: Any) -> list[TensorReport]:
    low = {Health.stalled: 0.01, Health.stalling: 0.06, Health.healthy: 1.0}
    found = []
    for i in range(4):
        for part in ("input_layernorm", "post_attention_layernorm"):
            found.append(tensor(f"layers.{i}.{part}.weight", norms, efficiency=low[norms]))
        for part in ("self_attn.q_proj", "mlp.up_proj"):
            found.append(tensor(f"layers.{i}.{part}.weight", matrices, efficiency=low[matrices], **fields))
    return found


def test_the_sentence_names_kinds_and_what_is_lost() -> None:
    verdict = said(*llama(Health.stalled, Health.stalling, since_step=51), lr_at=lambda step: 2e-4)
    assert verdict.health is Health.stalled
    assert verdict.sentence == "All 8 norms do not train; all 8 matrices lose 94% of each update."
    assert verdict.reason == (
        "BF16 has no room for steps this small. Norms since the start; matrices since step 51 (learning rate 2e-4)."
    )


def test_what_trained_at_first_no_longer_trains() -> None:
    verdict = said(*llama(Health.healthy, Health.stalled, since_step=51), lr_at=lambda step: float("nan"))
    assert verdict.sentence == "All 8 matrices no longer train."
    assert verdict.reason == "BF16 has no room for steps this small. Since step 51."


def test_a_single_tensor_is_called_by_its_name() -> None:
    verdict = said(tensor("head.weight", Health.stalling, efficiency=0.5), tensor("other.weight"))
    assert verdict.sentence == "head.weight loses 50% of each update."


def test_a_healthy_run_is_one_line() -> None:
    verdict = said(tensor("a.weight"), tensor("b.weight"))
    assert (verdict.health, verdict.sentence, verdict.reason) == (
        Health.healthy,
        "All 2 tensors get their updates.",
        "",
    )
    frozen = tensor("c.weight", Health.frozen, efficiency=None)
    assert said(tensor("a.weight"), tensor("b.weight"), frozen).sentence == (
        "2 of 3 tensors get their updates; c.weight is frozen."
    )


def test_a_run_in_which_nothing_is_trained_is_not_called_calm() -> None:
    idle = [tensor(f"h.{i}.w", Health.idle, cause=Cause.zero_gradient, efficiency=None) for i in range(3)]
    verdict = said(*idle)
    assert (verdict.health, verdict.sentence) == (
        Health.idle,
        "Nothing is being trained: every gradient is zero.",
    )


def test_what_is_not_known_is_never_called_well() -> None:
    unknown = [tensor(f"h.{i}.w", Health.unknown, efficiency=None, advice="Unknown, because.") for i in range(3)]
    verdict = said(*unknown)
    assert (verdict.health, verdict.sentence) == (Health.unknown, "No verdict: none of the 3 tensors can be measured.")
    assert verdict.groups[0].advice == "Unknown, because."
    assert said(tensor("a.weight"), *unknown).sentence == "1 of 4 tensors get their updates; all 3 w are unknown."


def test_state_that_is_not_well_beside_healthy_weights_is_said() -> None:
    state = {"exp_avg_sq": AccumulatorReport("exp_avg_sq", "bfloat16", Health.stalled, Cause.state_rounding)}
    report = Report(10, 10, Health.stalling, "", (tensor("a.weight", accumulators=state), tensor("b.weight")))
    verdict = verdict_of(frame_of(report))
    assert verdict.health is Health.stalling
    assert "what the optimizer keeps beside them does not" in verdict.sentence


def test_no_tensor_is_said() -> None:
    assert said().sentence == "No tensor is watched."


@pytest.mark.parametrize("cause", list(Cause), ids=str)
def test_every_cause_has_words_that_people_use(cause: Cause) -> None:
    assert cause.value in CAUSE_WORDS
    words = cause_words(cause, "bfloat16")
    assert "{" not in words
    assert not any(word in words for word in INTERNAL)


def test_numbers_in_words() -> None:
    assert [lr_words(x) for x in (3e-4, 1.2e-5, 1.0)] == ["3e-4", "1.2e-5", "1e0"]
    assert [share_words(x) for x in (0, 0.001, 0.5, 0.999, 1.0, 1.01)] == [
        "0%",
        "under 1%",
        "50%",
        "over 99%",
        "100%",
        "100%",
    ]
    assert [in_a_row(x) for x in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
