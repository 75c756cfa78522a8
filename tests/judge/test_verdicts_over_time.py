"""Verdicts over many windows: no flapping, schedules, recovery, and a resume that changes nothing."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tests.support.evidence_samples import (
    GONE,
    STILL,
    STUCK_STATE,
    accumulator,
    tensor,
    verdict,
    verdicts,
    window,
)
from tests.support.planted_evidence import CAUSES
from update_watch.evidence import TensorEvidence, WindowEvidence
from update_watch.judge.diagnosis import Diagnosis
from update_watch.report import Cause, Health
from update_watch.thresholds import Thresholds

# --- time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("efficiencies", "healths"),
    [
        ([0.79, 0.84, 0.79, 0.87, 0.88], ["stalling"] * 4 + ["healthy"]),
        ([0.82, 0.81, 0.80, 0.82], ["healthy"] * 4),
        ([0.09, 0.12, 0.14, 0.15], ["stalled"] * 3 + ["stalling"]),
        ([0.12, 0.10, 0.12, 0.09, 0.11], ["stalling"] * 3 + ["stalled"] * 2),
        ([0.09, 0.85, 0.89], ["stalled", "stalling", "healthy"]),
        ([0.99, 0.05, 0.99], ["healthy", "stalled", "healthy"]),
    ],
)
def test_verdicts_do_not_flap_around_a_limit(efficiencies: list[float], healths: list[str]) -> None:
    windows = [tensor(x, efficiency_error=0.0, lost=1 - x, displacement_evidence=0.0) for x in efficiencies]
    assert [str(t.health) for t in verdicts(*windows)] == healths


def test_since_step_is_the_first_step_of_the_window_in_which_the_health_began() -> None:
    found = verdicts(tensor(), tensor(), tensor(0.0, **GONE), tensor(0.0, **GONE), tensor())
    assert [t.since_step for t in found] == [1, 1, 257, 257, 513]


def test_a_verdict_that_was_unknown_in_between_goes_on() -> None:
    skipped = tensor(None, skipped_steps=128, measured_steps=0)
    found = verdicts(tensor(), tensor(0.0, **GONE), skipped, tensor(0.0, **GONE))
    assert [(str(t.health), t.since_step) for t in found] == [
        ("healthy", 1),
        ("stalled", 129),
        ("unknown", 257),
        ("stalled", 129),
    ]


def test_a_verdict_after_a_time_without_signal_begins_anew() -> None:
    found = verdicts(tensor(0.0, **GONE), tensor(trainable=False), tensor(0.0, **GONE))
    assert [t.since_step for t in found] == [1, 129, 257]


def test_after_a_short_window_the_next_starts_where_it_ended() -> None:
    diagnosis = Diagnosis(Thresholds())
    diagnosis.judge(window(tensor(), step=40, steps=40))
    report = diagnosis.judge(window(tensor(0.0, **GONE), step=100, steps=128))
    assert report.tensors[0].since_step == 41


def test_onset_late_in_a_decaying_schedule_is_named_in_its_window() -> None:
    windows = [
        tensor(e, lost=1 - e, lr=lr, lr_max=lr * 1.2, lr_min=lr)
        for lr, e in ((1e-3, 1.0), (6e-4, 0.98), (2e-4, 0.9), (5e-5, 0.3), (1e-5, 0.02))
    ]
    found = verdicts(*windows)
    assert [str(t.health) for t in found] == ["healthy"] * 3 + ["stalling", "stalled"]
    assert [t.since_step for t in found[3:]] == [385, 513]


def test_the_end_of_a_schedule_is_no_stall() -> None:
    found = verdicts(tensor(), tensor(0.0, dtype="float32", lr=1e-8, lr_max=1e-6, lr_min=1e-8, **GONE))[1]
    assert (found.health, found.cause) == (Health.idle, Cause.zero_learning_rate)
    assert found.advice.startswith("Its learning rate of 1e-06 has all but run out (peak 0.001)")


@pytest.mark.parametrize(
    ("group", "lr", "expected"),
    [
        ("1/0", 1e-5, (Health.stalled, Cause.weight_rounding)),
        ("0/1", 1e-5, (Health.idle, Cause.zero_learning_rate)),
        ("", 1e-5, (Health.idle, Cause.not_in_optimizer)),
    ],
)
def test_a_far_lower_rate_under_another_optimizer_is_no_end_of_a_schedule(
    group: str, lr: float, expected: tuple[Health, Cause]
) -> None:
    high = tensor(lr=0.1, lr_max=0.1, lr_min=0.1)
    low = tensor(0.0, **GONE | STILL, lr=lr, lr_max=lr, lr_min=lr, optimizer_group=group)
    found = verdicts(high, high, low, low)[-1]
    assert (found.health, found.cause) == expected


def test_optimizers_that_are_made_anew_along_a_schedule_end_with_it() -> None:
    rates = [1e-1 * 4.0**-k for k in range(8)]
    windows = [tensor(lr=lr, lr_max=lr, lr_min=lr, optimizer_group=f"{k}/0") for k, lr in enumerate(rates)]
    last = tensor(0.0, **GONE | STILL, lr=rates[-1], lr_max=rates[-1], lr_min=rates[-1], optimizer_group="9/0")
    found = verdicts(*windows, last)[-1]
    assert (found.health, found.cause) == (Health.idle, Cause.zero_learning_rate)


@pytest.mark.parametrize("last", [0.0, 1e-9])
def test_a_run_that_was_stalled_ends_so_and_not_idle_where_its_learning_rate_runs_out(last: float) -> None:
    stuck = {**GONE, "shape": (64,), "name": "norm.weight"}
    run = [tensor(0.0, lr=lr, lr_max=lr, lr_min=lr, **stuck) for lr in (1e-3, 1e-3, 5e-4, 1e-5)]
    end = tensor(None if last == 0 else 0.0, lr=last, lr_max=last, lr_min=last, **stuck)
    found = verdicts(*run, end, end)
    assert [(str(t.health), t.cause, t.since_step) for t in found] == [("stalled", Cause.weight_rounding, 1)] * 6
    assert "as they did until the learning rate ran out (peak 0.001)" in found[-1].advice
    diagnosis = Diagnosis(Thresholds())
    for i, t in enumerate(run):
        diagnosis.judge(window(t, step=128 * (i + 1)))
    resumed = Diagnosis(Thresholds())
    resumed.load_state_dict(json.loads(json.dumps(diagnosis.state_dict())))
    assert resumed.judge(window(end, step=640)).tensors[0].health is Health.stalled


def test_what_stalls_at_the_end_of_a_schedule_alone_is_idle_when_it_is_over() -> None:
    rates = (1e-3, 1e-3, 5e-5, 0.0)
    run = [
        tensor(x, lr=lr, lr_max=lr, lr_min=lr, **(GONE if x == 0 else {}))
        for x, lr in zip((1.0, 1.0, 0.0, 0.0), rates, strict=True)
    ]
    assert [str(t.health) for t in verdicts(*run)] == ["healthy", "healthy", "stalled", "idle"]
    back = tensor(1.0, lr=1e-3, lr_max=1e-3, lr_min=1e-3)
    stuck, out = (tensor(0.0, lr=lr, lr_max=lr, lr_min=lr, **GONE) for lr in (1e-3, 0.0))
    assert [str(t.health) for t in verdicts(stuck, back, back, out)][-1] == "idle"


def test_a_warm_up_is_not_called_a_stall_before_it_has_ended() -> None:
    rising = tensor(0.0, lr=1e-4, lr_max=1e-4, lr_min=0.0, **GONE)
    found = verdicts(rising, tensor(lr=2e-4, lr_max=2e-4, lr_min=1e-4), tensor())
    assert [str(t.health) for t in found] == ["unknown", "healthy", "healthy"]
    assert "has just risen threefold or more, to 0.0001" in found[0].advice


def test_a_stall_after_a_warm_up_is_named_in_the_second_window() -> None:
    found = verdicts(
        tensor(0.0, lr=1e-4, lr_max=1e-4, lr_min=0.0, **GONE),
        tensor(0.0, lr=2e-4, lr_max=2e-4, lr_min=1e-4, **GONE),
    )
    assert [str(t.health) for t in found] == ["unknown", "stalled"]


def test_a_stall_under_a_cyclic_schedule_is_named() -> None:
    cyclic = tensor(0.0, lr=5e-4, lr_max=1e-3, lr_min=0.0, **GONE)
    assert verdicts(cyclic)[0].health is Health.stalled


def test_recovery_after_the_learning_rate_is_raised() -> None:
    low = tensor(0.0, lr=1e-5, lr_max=1e-5, lr_min=1e-5, **GONE)
    found = verdicts(low, low, tensor(lr=1e-2, lr_max=1e-2, lr_min=1e-2))
    assert [(str(t.health), t.since_step) for t in found] == [("stalled", 1), ("stalled", 1), ("healthy", 257)]


def test_unfreezing_later_starts_without_prejudice() -> None:
    found = verdicts(tensor(trainable=False, **STILL), tensor(trainable=False, **STILL), tensor())
    assert [str(t.health) for t in found] == ["frozen", "frozen", "healthy"]


def test_skipped_steps_are_reported_only_when_they_persist() -> None:
    skipped = tensor(None, skipped_steps=128, measured_steps=0)
    found = verdicts(skipped, skipped, skipped, tensor(), skipped)
    assert [str(t.health) for t in found] == ["unknown", "unknown", "idle", "healthy", "unknown"]
    assert found[0].advice == (
        "Unknown, because the gradient scaler skipped 128 of 128 steps of this window, where gradients overflow."
    )


def test_skips_that_never_reach_the_optimizer_are_taken_from_the_window() -> None:
    diagnosis = Diagnosis(Thresholds())
    evidence = tensor(None, steps=0, measured_steps=0)
    healths = [diagnosis.judge(window(evidence, step=s, skipped_steps=16)).tensors[0].health for s in (1, 2, 3)]
    assert healths == [Health.unknown, Health.unknown, Health.idle]


def test_overflow_in_skipped_steps_is_not_a_broken_tensor_unless_it_never_ends() -> None:
    some = tensor(None, finite=False, skipped_steps=3)
    assert {t.health for t in verdicts(*[some] * 5)} == {Health.unknown}
    all_of_them = tensor(None, finite=False, skipped_steps=128)
    assert [str(t.health) for t in verdicts(*[all_of_them] * 3)] == ["unknown", "unknown", "broken"]


def test_one_window_outside_the_band_of_the_state_factor_is_not_enough() -> None:
    out, back = tensor(state_factor=0.5), tensor(state_factor=0.7)
    found = verdicts(out, back, out, out, back, tensor(state_factor=0.8))
    assert [str(t.health) for t in found] == ["healthy"] * 3 + ["stalling"] * 2 + ["healthy"]


def test_a_state_factor_of_few_steps_is_not_judged() -> None:
    assert verdict(tensor(state_factor=0.2, state_factor_steps=5)).health is Health.healthy


def test_the_state_is_blamed_by_name() -> None:
    both = {**accumulator("exp_avg", rate=0.1), **STUCK_STATE}
    text = verdict(tensor(state_factor=0.45, accumulators=both)).advice
    assert text.startswith("Optimizer state exp_avg_sq in BF16 rounds its decay away at 1 - beta = 0.001")
    assert "the updates are 0.45 of what FP32 state would give" in text
    both = {**STUCK_STATE, **accumulator("exp_avg", decay=0.5, rate=0.1)}
    assert "exp_avg_sq in BF16" in verdict(tensor(state_factor=0.45, accumulators=both)).advice
    counter = accumulator("step", value=256.0)
    text = verdict(tensor(state_factor=0.45, accumulators={**STUCK_STATE, **counter})).advice
    assert text.startswith("Optimizer state step in BF16 has stopped at 256")


def test_a_healthy_tensor_mentions_a_state_that_cannot_decay() -> None:
    found = verdict(tensor(accumulators=STUCK_STATE))
    assert (found.health, found.cause) == (Health.healthy, None)
    assert found.advice == found.accumulators["exp_avg_sq"].advice != ""


# --- resume ----------------------------------------------------------------------------------------


def stream() -> list[WindowEvidence]:
    """A run in which about everything happens."""
    happenings = [case[0] for case in CAUSES.values()]
    rows = [[dataclasses.replace(e, name=f"t{k}") for k, e in enumerate(happenings)] for _ in range(8)]
    quiet = [dataclasses.replace(case[3], name=f"t{k}") for k, case in enumerate(CAUSES.values())]
    few = [dataclasses.replace(e, measured_steps=min(e.measured_steps, 4)) for e in rows[0]]
    order = [few, few, rows[0], rows[1], quiet, rows[2], few, rows[3], quiet, quiet, rows[4], rows[5]]
    return [window(*tensors, step=128 * (i + 1)) for i, tensors in enumerate(order)]


@pytest.mark.parametrize("cut", range(12))
def test_a_resumed_diagnosis_judges_as_if_never_stopped(cut: int) -> None:
    windows = stream()
    whole = Diagnosis(Thresholds())
    expected = [whole.judge(w) for w in windows]
    first, second = Diagnosis(Thresholds()), Diagnosis(Thresholds())
    for w in windows[:cut]:
        first.judge(w)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.judge(w) for w in windows[cut:]] == expected[cut:]
    assert second.state_dict() == whole.state_dict()


def plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(k) is str and plain(v) for k, v in value.items())
    if type(value) is list:
        return all(plain(v) for v in value)
    return value is None or type(value) in (str, int, float, bool)


def test_the_state_is_plain_data() -> None:
    diagnosis = Diagnosis(Thresholds())
    for w in stream():
        diagnosis.judge(w)
    assert plain(diagnosis.state_dict())


def test_the_state_does_not_grow_with_the_windows() -> None:
    diagnosis = Diagnosis(Thresholds())
    evidence = tensor(0.75, efficiency_error=0.5, displacement_efficiency=0.9, accumulators=STUCK_STATE)
    sizes = []
    for i in range(60):
        diagnosis.judge(window(evidence, step=128 * (i + 1)))
        sizes.append(len(json.dumps(diagnosis.state_dict())))
    assert max(sizes[40:]) <= max(sizes[20:40]) + 8  # digits of the step


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            [],
            TypeError,
            (
                "Diagnosis.load_state_dict(list) needs a dict: pass what state_dict() gave, or leave the state out"
                " to start"
                " anew."
            ),
        ),
        (
            {"version": 7, "tensors": {}},
            ValueError,
            (
                "Diagnosis.load_state_dict: version=7, 2 expected: pass what state_dict() gave, or leave the state"
                " out to"
                " start anew."
            ),
        ),
        (
            {"version": 2, "tensors": None},
            TypeError,
            (
                "Diagnosis.load_state_dict: tensors=None is not a Mapping: pass what state_dict() gave, or leave the"
                " state"
                " out to start anew."
            ),
        ),
        (
            {"version": 2, "tensors": {}, "last_step": "x"},
            ValueError,
            "Diagnosis.load_state_dict: last_step='x' is not a step; pass what state_dict() gave.",
        ),
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(state: Any, error: type[Exception], message: str) -> None:
    diagnosis = Diagnosis(Thresholds())
    diagnosis.judge(window(tensor(0.0, **GONE)))
    before = diagnosis.state_dict()
    with pytest.raises(error) as caught:
        diagnosis.load_state_dict(state)
    assert str(caught.value) == message
    assert diagnosis.state_dict() == before


BAD_ENTRIES: list[Any] = [
    None,
    3,
    [],
    {},
    {"health": "stalled"},
    {"pool": [[1, 2]]},
    {"pool": [[0, 0.5, 0.1, 0.2, 1.0, 0.0]]},
    {"pool": [[8, float("nan"), 0.1, 0.2, 1.0]]},
    {"grade": "idle"},
    {"since": -1},
    {"accumulators": {"a": ["stalled"]}},
    {"accumulators": 3},
    {"drift": ["x"]},
    {"peak_lr": True},
]


@pytest.mark.parametrize("bad", BAD_ENTRIES, ids=repr)
def test_an_entry_that_cannot_be_read_is_lost_alone(bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    source = Diagnosis(Thresholds())
    source.judge(window(tensor(0.0, name="good", **GONE), tensor(name="bad")))
    state = source.state_dict()
    whole = state["tensors"]["bad"]
    state["tensors"]["bad"] = (
        {**whole, **bad} if isinstance(bad, dict) and len(bad) and bad != {"health": "stalled"} else bad
    )
    diagnosis = Diagnosis(Thresholds())
    diagnosis.load_state_dict(state)
    report = diagnosis.judge(window(tensor(0.0, name="good", **GONE), tensor(name="bad"), step=256))
    assert [t.since_step for t in report.tensors] == [1, 129]
    assert len(caplog.records) == 1
    assert "the entry of 'bad' cannot be read" in caplog.text and "it starts anew" in caplog.text


UNDONE = {"net_efficiency": 0.05, "undone_fraction": 0.95}


def test_a_single_write_is_no_overwriting_however_long_the_sums_remember_it() -> None:
    once = tensor(**UNDONE, written_steps=1, written_step=64)
    assert [t.health for t in verdicts(*[once] * 6)] == [Health.healthy] * 6
    twice = verdicts(once, once, tensor(**UNDONE, written_steps=1, written_step=164))
    assert [t.cause for t in twice] == [None, None, Cause.overwritten]


def test_overwriting_that_is_seldom_stays_told_over_a_window_without_it() -> None:
    often = tensor(**UNDONE, written_steps=2, written_step=50)
    found = verdicts(often, tensor(net_efficiency=1.0), tensor(net_efficiency=1.0))
    assert [t.cause for t in found] == [Cause.overwritten, Cause.overwritten, None]
    assert "in this window nothing was seen of it" in found[1].advice
    unseen = verdicts(often, *[tensor(net_efficiency=None)] * 3)
    assert [t.health for t in unseen] == [Health.stalled] * 4


def test_what_is_put_back_where_there_are_hardly_gradients_is_unknown_till_it_is_seen_to_stay() -> None:
    often = {**UNDONE, "written_steps": 100, "written_step": 50}
    of_few, of_many = (tensor(**often, zero_gradient_fraction=zeros) for zeros in (0.99, 0.9))
    assert [t.health for t in verdicts(of_many, of_many)] == [Health.stalled] * 2
    stays = tensor(net_efficiency=1.0, zero_gradient_fraction=0.99)
    found = verdicts(of_few, of_few, tensor(net_efficiency=None), stays, stays)
    assert [t.health for t in found] == [*[Health.unknown] * 4, Health.healthy]
    assert "99% of its gradients are 0" in found[0].advice and "nothing was seen of it" in found[2].advice


def on_a_grid(net: float, error: float) -> TensorEvidence:
    seen = {"undone_fraction": 1 - net, "written_steps": 100, "written_step": 50, "travelled": 9.0}
    return tensor(net_efficiency=net, net_efficiency_error=error, is_put_back=True, **seen)


def test_how_much_a_grid_takes_is_unknown_where_the_error_holds_the_limit_and_till_then_the_verdict_stands() -> None:
    little, much = on_a_grid(0.5, 0.2), on_a_grid(0.95, 0.2)
    found = verdicts(little, on_a_grid(0.3, 0.1), little, much, much)
    assert [(t.health, t.cause) for t in found] == [
        (Health.unknown, Cause.overwritten),
        (Health.stalling, Cause.overwritten),
        (Health.stalling, Cause.overwritten),
        (Health.stalling, Cause.overwritten),  # the next one decides
        (Health.healthy, None),
    ]
    assert "is not known well enough: 0.50, standard error 0.20" in found[0].advice


def test_a_part_that_is_held_is_said_and_is_no_accusation() -> None:
    held = {"held_fraction": 0.25, "written_steps": 100, "written_step": 50}
    part = tensor(net_efficiency=0.75, undone_fraction=0.25, **held)
    nearly_all = tensor(net_efficiency=0.05, undone_fraction=0.95, **held)
    found = verdicts(part, nearly_all, part)
    assert [(t.health, t.cause) for t in found] == [
        (Health.healthy, Cause.overwritten),
        (Health.stalled, Cause.overwritten),
        (Health.healthy, Cause.overwritten),
    ]
    assert found[0].advice.startswith("25% of its elements that were read are put back to the bit")


def test_that_it_was_put_back_is_remembered_over_a_resume() -> None:
    often = tensor(**UNDONE, written_steps=100, written_step=50, zero_gradient_fraction=0.99)
    first, second = Diagnosis(Thresholds()), Diagnosis(Thresholds())
    first.judge(window(often))
    second.load_state_dict(first.state_dict())
    assert second.judge(window(tensor(net_efficiency=None))).tensors[0].health is Health.unknown


def test_momentum_that_gets_lost_after_the_last_gradient_is_no_stall() -> None:
    ended = {
        "zero_gradient_fraction": 1.0,
        "gradient_looks": 8,
        "gradient_blind": 24,
        "applied_ratio": 1e-9,
        "moved": 1e-9,
    }
    found = verdicts(tensor(), tensor(0.0, **GONE, **ended))
    assert (found[1].health, found[1].cause) == (Health.unknown, Cause.zero_gradient)
    assert "and yet it moves" in found[1].advice


def test_a_run_that_decay_alone_moves_trains_nothing() -> None:
    decays = {"zero_gradient_fraction": 1.0, "gradient_looks": 32, "applied_ratio": 1e-5, "moved": 1e-3}
    still = {"zero_gradient_fraction": 1.0, "gradient_looks": 32}
    diagnosis = Diagnosis(Thresholds())
    report = diagnosis.judge(window(tensor(name="a.w", **decays), tensor(None, name="a.b", **STILL, **still)))
    assert report.headline == (
        "Nothing is being trained: every gradient is exactly 0, and weight decay and momentum alone move 1 of 2 tensors; look"
        " for a clipping norm of 0, a loss that is multiplied by 0, or a product of two zeros at the start."
    )


def test_masters_that_were_seen_to_be_copied_back_are_waited_for() -> None:
    still = tensor(is_master=True, net_efficiency=0.0, moved=0.0)
    copied = tensor(is_master=True, net_efficiency=0.0, moved=0.01, written_steps=1)
    accused, healthy = (Health.stalled, Cause.not_copied_back), (Health.healthy, None)
    seldom = [still, still, copied] * 4
    assert [(t.health, t.cause) for t in verdicts(*seldom)] == [accused, accused, *[healthy] * 10]
    ended = verdicts(still, copied, *[still] * 12)
    assert [(t.health, t.cause) for t in ended] == [accused, *[healthy] * 9, *[accused] * 4]
    beside = tensor(is_master=True, net_efficiency=1.0, moved=0.01)  # a window that is judged with all others
    found = verdicts(still, still, copied, beside, still, beside, still, still)
    assert [t.health for t in found[2:]] == [Health.healthy] * 6


def test_what_is_waited_for_goes_on_after_a_resume() -> None:
    still = tensor(is_master=True, net_efficiency=0.0, moved=0.0)
    copied = tensor(is_master=True, net_efficiency=0.0, moved=0.01, written_steps=1)
    diagnosis = Diagnosis(Thresholds())
    for i, one in enumerate((still, copied)):
        diagnosis.judge(window(one, step=128 * (i + 1)))
    resumed = Diagnosis(Thresholds())
    resumed.load_state_dict(diagnosis.state_dict())
    assert resumed.judge(window(still, step=384)).tensors[0].health is Health.healthy


@pytest.mark.parametrize("cause", [Cause.not_copied_back, Cause.overwritten])
def test_a_window_of_which_nothing_was_seen_changes_no_cause(cause: Cause) -> None:
    uncopied = {"is_master": True, "net_efficiency": 0.0, "moved": 0.0}
    bad = tensor(**uncopied) if cause is Cause.not_copied_back else tensor(**UNDONE, is_master=True, written_steps=90)
    for is_master in (False, True):
        unseen = tensor(is_master=is_master, net_efficiency=None, measured_steps=0)
        found = verdicts(bad, bad, unseen, bad)
        assert [(t.health, t.cause) for t in found] == [(Health.stalled, cause)] * 4
    diagnosis, resumed = Diagnosis(Thresholds()), Diagnosis(Thresholds())
    diagnosis.judge(window(bad, step=128))
    resumed.load_state_dict(diagnosis.state_dict())
    assert resumed.judge(window(unseen, step=256)).tensors[0].cause is cause
