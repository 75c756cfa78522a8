"""A window that did not look at a tensor says nothing new of its signal."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.evidence_samples import GONE, STILL, accumulator, tensor, verdicts, window
from update_watch.evidence import Numbers, TensorEvidence, WindowEvidence, changed
from update_watch.judge.alerts import Alerts
from update_watch.judge.diagnosis import Diagnosis
from update_watch.report import Cause, Health, Report
from update_watch.thresholds import Thresholds

_LOOKED: dict[str, Any] = {"zero_gradient_fraction": 1.0, "gradient_looks": 128}
FOUND = {
    "frozen, and moves": (tensor(requires_grad=False, **_LOOKED), Health.healthy, Cause.requires_grad_off),
    "what is left of momentum": (tensor(**_LOOKED), Health.healthy, Cause.zero_gradient),
    "and gets lost": (tensor(0.1, **_LOOKED), Health.unknown, Cause.zero_gradient),
    "idle": (tensor(None, **_LOOKED, **STILL, moved=0.0), Health.idle, Cause.zero_gradient),
}


def unseen(of: TensorEvidence, **more: Any) -> TensorEvidence:
    """A short window of the same tensor, which it was not looked at in."""
    nothing = dict.fromkeys(
        (
            "zero_gradient_fraction",
            "changed_fraction",
            "update_ratio",
            "applied_ratio",
            "moved",
            "critical_lr",
            "state_factor",
        )
    )
    short = {"steps": 4, "measured_steps": 0, "gradient_looks": 0, "numbers": Numbers(), "headroom_histogram": ()}
    return changed(of, **{**nothing, **short, "trainable": of.requires_grad, **more})


@pytest.mark.parametrize("kind", FOUND)
def test_what_was_found_of_a_signal_stands_while_nobody_looks(kind: str) -> None:
    evidence, health, cause = FOUND[kind]
    found = verdicts(evidence, *[unseen(evidence)] * 8, evidence, unseen(evidence))
    assert {(t.health, t.cause, t.advice) for t in found} == {(health, cause, found[0].advice)}
    assert "128 steps" in found[0].advice or "by 0.00099 of its size per step" in found[0].advice


def test_what_was_idle_stays_so_where_nothing_moved_and_no_gradient_was_looked_at() -> None:
    """The ledger is read in every step that is looked at, whosever turn it is to be measured."""
    idle, moving = FOUND["idle"][0], FOUND["frozen, and moves"][0]
    still: dict[str, Any] = {"written_between": 0.0, "moved": 0.0}
    found = verdicts(idle, unseen(idle, **still), unseen(idle), unseen(idle, written_between=1e-3, moved=1e-3))
    assert [t.health for t in found] == [Health.idle] * 3 + [Health.unknown]
    assert [t.cause for t in found[:3]] == [Cause.zero_gradient] * 3
    after = verdicts(moving, unseen(moving, **still))[1]
    assert (after.health, after.cause) == (Health.frozen, Cause.requires_grad_off)  # what moved is at rest now


@pytest.mark.parametrize("kind", FOUND)
def test_it_does_not_stand_for_ever(kind: str) -> None:
    evidence, health, cause = FOUND[kind]
    found = verdicts(evidence, *[unseen(evidence)] * 9)
    assert (found[-2].health, found[-2].cause) == (health, cause) != (found[-1].health, found[-1].cause)


def test_what_was_found_gives_way_to_what_is_seen() -> None:
    decays, good = tensor(**_LOOKED), tensor()
    found = verdicts(decays, good, unseen(good), tensor(0.0, **GONE))
    assert [t.cause for t in found] == [Cause.zero_gradient, None, None, Cause.weight_rounding]


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({"gradless_steps": 4}, Cause.no_gradient),
        ({"lr": 0.0, "lr_max": 0.0, "lr_min": 0.0}, Cause.zero_learning_rate),
        ({"finite": False}, Cause.non_finite),
    ],
)
def test_what_is_known_without_a_look_is_said(more: dict[str, Any], cause: Cause) -> None:
    decays = tensor(**_LOOKED)
    assert [t.cause for t in verdicts(decays, unseen(decays, **more))] == [Cause.zero_gradient, cause]


def test_a_tensor_that_was_unfrozen_is_not_called_frozen() -> None:
    frozen = FOUND["frozen, and moves"][0]
    thawed = changed(unseen(frozen), requires_grad=True, trainable=True)
    assert [t.cause for t in verdicts(frozen, thawed)] == [Cause.requires_grad_off, None]


# --- tensors whose turn it is not ------------------------------------------------------------------

RESTED = {
    "healthy": tensor(),
    "stalled": tensor(0.0, **GONE),
    "overwritten": tensor(net_efficiency=0.0, undone_fraction=1.0, written_steps=40, written_step=120),
    "without a gradient": tensor(None, **STILL, gradless_steps=128),
    "no signal": FOUND["idle"][0],
    "not replayable": tensor(None, reason="its rule is odd", moved=1e-3),
    "not finite": tensor(finite=False),
}


def resting(of: TensorEvidence, **more: Any) -> TensorEvidence:
    """A window in which it was not its turn."""
    ledger = {"net_efficiency": None, "undone_fraction": None, "written_steps": 0, "written_step": None}
    return unseen(of, **{**ledger, "steps": 128, "finite": True, "gradless_steps": 0, "is_resting": True, **more})


@pytest.mark.parametrize("kind", RESTED)
def test_a_verdict_stands_till_it_is_the_tensors_turn_again(kind: str) -> None:
    evidence = RESTED[kind]
    first = verdicts(evidence, evidence)[-1]
    found = verdicts(evidence, evidence, *[resting(evidence)] * 100, tensor())
    assert {(t.health, t.cause, t.advice) for t in found[1:-1]} == {(first.health, first.cause, first.advice)}
    assert len({t.since_step for t in found[:-1]}) == 1
    assert found[-2].efficiency is None  # nobody has looked
    assert found[-1].efficiency == 0.99


def test_windows_pool_over_those_in_which_it_was_not_its_turn() -> None:
    noisy = tensor(0.9, efficiency_error=0.06, displacement_efficiency=None)
    rest = [resting(noisy)] * 30
    found = verdicts(noisy, *rest, noisy, *rest)
    assert [t.health for t in found] == [Health.unknown] * 31 + [Health.healthy] * 31


@pytest.mark.parametrize(
    ("more", "health", "cause"),
    [
        ({"requires_grad": False}, Health.frozen, Cause.requires_grad_off),
        ({"lr": 0.0, "lr_max": 0.0, "lr_min": 0.0}, Health.idle, Cause.zero_learning_rate),
        ({"replicas_differ": True}, Health.broken, Cause.replicas_differ),
    ],
)
def test_what_the_host_knows_is_said_though_it_is_not_its_turn(
    more: dict[str, Any], health: Health, cause: Cause
) -> None:
    news = resting(tensor(), **more, trainable=more.get("requires_grad", True))
    found = verdicts(tensor(), resting(tensor()), news)
    assert [(t.health, t.cause) for t in found] == [(Health.healthy, None)] * 2 + [(health, cause)]


def test_states_that_are_at_fault_are_told_meanwhile() -> None:
    off = resting(tensor(), state_factor=3.0, state_factor_steps=128)
    found = verdicts(tensor(), resting(tensor()), *[off] * 40)
    assert [t.cause for t in found] == [None] * 3 + [Cause.state_rounding] * 39


def test_one_whose_turn_has_not_come_yet_is_not_judged() -> None:
    (found,) = verdicts(resting(tensor()))
    assert found.health is Health.unknown and "measured in none" in found.advice


def test_the_headline_says_at_how_many_tensors_somebody_has_looked() -> None:
    judge, names = Diagnosis(Thresholds()), ("a", "b", "c", "d")
    judge.judge(window(*[tensor(name=name) for name in names]))
    others = [resting(tensor(name=name)) for name in names[1:]]
    report = judge.judge(window(tensor(name="a"), *others, step=256))
    assert report.headline == "All 4 tensors are healthy (efficiency 0.99); looked at 1 of them."
    report = judge.judge(window(tensor(0.0, "a", **GONE), *others, step=384))
    assert report.headline.startswith("1 of 4 tensors is stalled")
    assert report.headline.endswith("; also 1 looked at now.")


# --- windows of which nothing was seen, since a budget let their steps pass -----------------------------------

HEALTHY, GOOD = tensor(name="a.w"), tensor(name="b.w")
STALLED = tensor(0.0, name="b.w", **GONE)
STATE = tensor(name="a.w", accumulators=accumulator("exp_avg_sq", 0.0, growth=0.0, decay=0.0))
RESTS = tensor(None, name="a.w", zero_gradient_fraction=1.0, gradient_looks=128, moved=0.0, **STILL)


class Run:
    """Reports with alerts, window after window."""

    def __init__(self) -> None:
        self.limits = Thresholds()
        self.diagnosis, self.alerts, self.step = Diagnosis(self.limits), Alerts(self.limits), 0

    def sees(self, *tensors: TensorEvidence, observed: int = 32) -> Report:
        return self._judge(window(*tensors), observed)

    def passes(self, *tensors: TensorEvidence, **more: Any) -> Report:
        """The same tensors, not looked at."""
        return self._judge(window(*(unseen(one, steps=700, accumulators={}, **more) for one in tensors)), 0)

    def _judge(self, evidence: WindowEvidence, observed: int) -> Report:
        self.step += 700
        evidence = changed(evidence, step=self.step, window=700, observed_steps=observed)
        return self.alerts.update(self.diagnosis.judge(evidence))


@pytest.mark.parametrize("kind", ["healthy", "stalled", "state", "at rest"])
def test_a_verdict_stands_however_many_windows_pass_unseen(kind: str) -> None:
    tensors = {"healthy": (HEALTHY, GOOD), "stalled": (HEALTHY, STALLED), "state": (STATE, GOOD), "at rest": (RESTS,)}[
        kind
    ]
    run = Run()
    seen = [run.sees(*tensors) for _ in range(4)][-1]
    assert seen.observed_at == seen.step
    later = [run.passes(*tensors) for _ in range(12)]
    for report in later:
        assert (report.health, report.alerts, report.observed_at) == (seen.health, (), seen.step)
        assert [(t.health, t.cause) for t in report.tensors] == [(t.health, t.cause) for t in seen.tensors]
        age = report.step - seen.step
        assert report.headline == f"Not looked at since the report of step 2,800 ({age:,} steps ago): {seen.headline}"
    again = run.sees(*tensors)
    assert (again.headline, again.alerts, again.observed_at) == (seen.headline, (), again.step)


def test_a_window_that_ends_at_the_step_of_the_one_before_has_no_age() -> None:
    run = Run()
    seen = run.sees(HEALTHY, STALLED)
    run.step -= 700
    report = run.passes(HEALTHY, STALLED)
    assert (report.step, report.headline) == (seen.step, seen.headline)


def test_a_fault_that_began_meanwhile_is_told_once_it_is_seen() -> None:
    run = Run()
    run.sees(HEALTHY, GOOD)
    assert not run.passes(HEALTHY, STALLED).alerts
    found = run.sees(HEALTHY, STALLED)
    assert found.health is Health.stalled and len(found.alerts) == 1 and found.headline.startswith("1 of 2 tensors")


def test_what_the_host_knows_is_news_all_the_same() -> None:
    run = Run()
    run.sees(HEALTHY, GOOD)
    report = run.passes(HEALTHY, GOOD, lr=0.0, lr_max=0.0, lr_min=0.0)
    assert {t.cause for t in report.tensors} == {Cause.zero_learning_rate}
    assert report.headline.startswith(
        "Not looked at since the report of step 700 (700 steps ago): Nothing is being trained"
    )


def test_a_run_that_goes_on_from_a_checkpoint_knows_when_it_was_looked_at() -> None:
    run, resumed = Run(), Run()
    run.sees(HEALTHY, STALLED)
    resumed.diagnosis.load_state_dict(run.diagnosis.state_dict())
    resumed.step = run.step
    report = resumed.passes(HEALTHY, STALLED)
    assert (report.observed_at, report.health) == (700, Health.stalled)
    assert report.headline.startswith(
        "Not looked at since the report of step 700 (700 steps ago): 1 of 2 tensors is stalled"
    )
    for bad in (True, "7"):
        with pytest.raises(ValueError, match="observed_at"):
            resumed.diagnosis.load_state_dict({**run.diagnosis.state_dict(), "observed_at": bad})


def test_where_nothing_was_ever_seen_nothing_stands() -> None:
    report = Run().passes(HEALTHY)
    assert report.observed_at is None and report.health is Health.unknown and "looked at since" not in report.headline
