"""The cures that page and terminal offer: what fits the optimizer, at the cost that the headline names."""

from __future__ import annotations

from typing import Any

import pytest

from update_watch.cures import Cure, code
from update_watch.dashboards.frame import frame_of
from update_watch.dashboards.offers import Offer, offers_of
from update_watch.dashboards.verdict import verdict_of
from update_watch.foresight.what_if import cost_of
from update_watch.report import AccumulatorReport, Cause, Health, Report, TensorReport


def tensor(name: str, cause: Cause | None, **fields: Any) -> TensorReport:
    health = Health.healthy if cause is None else Health.stalled
    given = {"efficiency": 0.01, "dtype": "bfloat16", "shape": (10, 10), "numel": 100, **fields}
    return TensorReport(name, health, cause, "It is; do this.", **given)


def offers(*tensors: TensorReport) -> tuple[Offer, ...]:
    frame = frame_of(Report(100, 10, Health.stalled, "", tensors))
    return offers_of(frame, verdict_of(frame))


STATES = {name: AccumulatorReport(name, "bfloat16", Health.healthy) for name in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("fields", [{"low_states": 2}, {"accumulators": STATES}], ids=["said", "early-journal"])
def test_a_cure_costs_what_the_advice_says(fields: dict[str, Any]) -> None:
    mine, other = tensor("a", Cause.weight_rounding, **fields), tensor("b", None, **fields)
    for cure, cost in offers(mine, other):
        assert cost == cost_of(cure, [mine, other])
    assert offers(mine, other)[0] == (Cure.masters, 2 * 100 * 8)  # 4 for weight and gradient, 2 for each of two states


def test_states_in_fp32_cost_what_those_take_that_lose() -> None:
    mine, other = tensor("a", Cause.state_rounding, low_states=2), tensor("b", None, low_states=2)
    assert offers(mine, other) == ((Cure.fp32_states, 100 * 4),)


@pytest.mark.parametrize(
    ("options", "is_offered"), [((), False), (("fused=True", "betas"), False), (("fused", "betas"), True)]
)
def test_a_fused_optimizer_is_offered_where_it_can_be_fused(options: tuple[str, ...], is_offered: bool) -> None:
    found = {offer.cure for offer in offers(tensor("a", Cause.decay_rounding, options=options))}
    assert (Cure.fused_decay in found) == is_offered and Cure.masters in found


def test_what_is_no_matter_of_precision_has_no_offer() -> None:
    assert offers(tensor("a", Cause.not_copied_back)) == () == offers(tensor("b", None))


def test_code_is_of_the_rule_at_hand_where_the_package_has_it() -> None:
    assert "from optimi import Lion" in code(Cure.kahan, "torch", "Lion")
    assert "optim.SGD(" in code(Cure.fused_decay, "torch", "SGD")
    assert "AdamW" in code(Cure.kahan, "torch", "Muon") and "AdamW" in code(Cure.stochastic_rounding, "torch", "SGD")
