"""The table of metrics: its values worked by hand, its keys, its documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.wandb.samples import healthy_tensor, sample_alert, sample_report, stalled_tensor
from update_watch.dashboards import metrics, metrics_page
from update_watch.report import AccumulatorReport, Health

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_run_values_of_one_healthy_and_one_stalled_tensor_are_those_worked_by_hand() -> None:
    # healthy: 300 elements, all wanted, none lost; stalled: 100 elements, 50 wanted, 25 lost
    values = metrics.run_values(sample_report(alerts=(sample_alert(),), skipped_steps=2))
    assert values == pytest.approx(
        {
            "update_watch/efficiency": 0.75,
            "update_watch/efficiency_worst": 0.0,
            "update_watch/net_progress": (300 * 0.98 + 100 * 0.02) / 400,
            "update_watch/lost_fraction": 25 / 350,
            "update_watch/stalled_share": 0.25,
            "update_watch/tensors_healthy": 1,
            "update_watch/tensors_stalling": 0,
            "update_watch/tensors_stalled": 1,
            "update_watch/tensors_idle": 0,
            "update_watch/tensors_frozen": 0,
            "update_watch/tensors_broken": 0,
            "update_watch/tensors_unknown": 0,
            "update_watch/update_ratio": 0.0055,
            "update_watch/applied_ratio": 0.005,
            "update_watch/lr_margin": 0.25,
            "update_watch/state_efficiency_worst": 0.1,
            "update_watch/state_update_factor": 0.5,
            "update_watch/decay_efficiency": 0.25,
            "update_watch/skipped_steps": 2,
            "update_watch/cost_ms": 0.5,
            "update_watch/alert": 1,
        }
    )


def test_what_is_not_known_is_left_out_and_never_zero() -> None:
    blank = healthy_tensor(
        health=Health.unknown,
        efficiency=None,
        displacement_efficiency=float("nan"),
        lost_fraction=None,
        update_ratio=None,
        applied_ratio=None,
        critical_lr=None,
        state_factor=None,
        accumulators={},
    )
    values = metrics.run_values(sample_report(tensors=(blank,), cost_ms=float("inf")))
    counts = {f"update_watch/tensors_{h}": 0.0 for h in Health} | {"update_watch/tensors_unknown": 1.0}
    known = {"update_watch/stalled_share": 0.0, "update_watch/skipped_steps": 0.0, "update_watch/alert": 0.0}
    assert values == counts | known
    assert metrics.run_values(sample_report(tensors=()))["update_watch/tensors_stalled"] == 0


def test_the_state_factor_farthest_from_one_counts_in_both_directions() -> None:
    tensors = (healthy_tensor("a", state_factor=0.6), healthy_tensor("b", state_factor=1.9))
    assert metrics.run_values(sample_report(tensors=tensors))["update_watch/state_update_factor"] == 1.9


def test_the_worst_state_is_never_the_weight_decay() -> None:
    accumulators = {"weight_decay": AccumulatorReport("weight_decay", "bfloat16", Health.stalled, efficiency=0.0)}
    values = metrics.run_values(sample_report(tensors=(healthy_tensor(accumulators=accumulators),)))
    assert "update_watch/state_efficiency_worst" not in values
    assert values["update_watch/decay_efficiency"] == 0.0


def test_a_kind_shows_its_worst_tensor() -> None:
    tensors = [healthy_tensor(lost_fraction=0.2), stalled_tensor(), healthy_tensor(efficiency=None, update_ratio=None)]
    assert metrics.BY_KIND.compute(tensors) == 0.0
    assert metrics.BY_KIND.key("q_proj") == "update_watch/by_kind/q_proj"


def test_a_dozen_numbers_are_drawn_by_wandb_and_two_are_lines_of_its_summary() -> None:
    assert sum(m.is_shown for m in metrics.RUN_METRICS) == 12
    assert {m.name for m in metrics.RUN_METRICS if m.is_summed_up} == {"efficiency", "tensors_stalled"}
    assert all(m.is_shown for m in metrics.RUN_METRICS if m.is_summed_up)


def test_the_summary_names_the_worst_tensor_its_cause_and_since_when() -> None:
    tensors = (
        stalled_tensor("late", since_step=512, efficiency=0.05),
        stalled_tensor("early", since_step=256, efficiency=0.09),
        healthy_tensor("fine", since_step=128),
        stalled_tensor("nan", health=Health.broken, efficiency=None, advice="NaN in the weights.", cause=None),
    )
    summary = metrics.summary_values(sample_report(tensors=tensors))
    assert summary == {
        "update_watch/health": "stalled",
        "update_watch/headline": "1 of 2 tensors is stalled.",
        "update_watch/worst": {
            "tensor": "nan",
            "cause": "",
            "since_step": 128,  # of the broken one
            "advice": "NaN in the weights.",
        },
    }
    assert [t.name for t in metrics.unwell(sample_report(tensors=tensors))] == ["nan", "late", "early"]


def test_the_summary_of_a_recovered_run_is_empty_again() -> None:
    summary = metrics.summary_values(sample_report(tensors=(healthy_tensor(),), health=Health.healthy, headline="ok"))
    worst = summary.pop("update_watch/worst")
    assert set(worst.values()) == {""}
    assert summary == {"update_watch/health": "healthy", "update_watch/headline": "ok"}


def test_every_key_is_used_once_and_sorts_in_the_runs_table() -> None:
    keys = [m.key for m in metrics.RUN_METRICS] + [e.key for e in metrics.ENTRIES]
    assert len(keys) == len({key.lower() for key in keys})
    assert [k for k in keys if not re.fullmatch(r"[_a-zA-Z][_a-zA-Z0-9]*(/[_a-zA-Z0-9]+)?\*?", k)] == []


def test_the_documentation_is_made_from_the_table() -> None:
    command = "python -m update_watch.dashboards.metrics_page > docs/metrics.md"
    assert DOCS.read_text() == metrics_page.markdown(), f"docs/metrics.md is out of date: {command}"
