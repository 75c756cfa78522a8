"""A training that goes on at another number of ranks: the watch remembers what it knew, and tells nothing twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from tests.support.ranks.cases import launch
from tests.support.ranks.resume import FIRST, FOLDER, THEN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built in"),
]

KINDS = ("ddp", "fsdp2")
GONE_ON = ((2, 4), (2, 1), (4, 2), (1, 2))  # ranks before and after
Found = dict[str, list[dict[str, Any]]]  # "kind" or "kind from to" -> ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("checkpoints")
    every: Found = {}

    def run(size: int, cases: dict[str, str]) -> None:
        ranks = launch(size, list(cases.values()), tmp_path_factory.mktemp("ranks"))
        every.update({name: [rank[case] for rank in ranks] for name, case in cases.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        run(2, {kind: f"resume.begin:{kind},{kind}2" for kind in KINDS})
        run(4, {f"{kind} 2 4": f"resume.go_on:{kind},{kind}2,{kind}4" for kind in KINDS})
        one = {f"{kind} 2 1": f"resume.go_on:{kind},{kind}2,{kind}1" for kind in KINDS}
        run(1, one | {f"{kind} anew": f"resume.begin_anew:{kind},{kind}2" for kind in KINDS})
        run(2, {f"{kind} {n} 2": f"resume.go_on:{kind},{kind}{n},{kind}{n}2" for kind in KINDS for n in (4, 1)})
    return every


def healths(report: dict[str, Any]) -> set[tuple[str, Any]]:
    return {(t["health"], t["since_step"]) for t in report["tensors"]}


def told(state: dict[str, Any]) -> dict[str, Any]:
    """What was said of each open trouble."""
    return {name: episode for name, episode in state["alerts"]["episodes"].items() if episode["told_level"]}


def pools(state: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: memory["pool"] for name, memory in state["diagnosis"]["tensors"].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_watch_that_remembers_nothing_judges_otherwise_and_tells_all_again(found: Found, kind: str) -> None:
    """So the tests below can fail."""
    (first,) = (rank["reports"] for rank in found[kind][:1])
    assert {health for health, _ in healths(first[0])} == {"stalling"} and first[0]["alerts"]
    (anew,) = (rank["reports"] for rank in found[f"{kind} anew"])
    assert {health for health, _ in healths(anew[0])} == {"unknown"}  # too few steps
    assert {health for health, _ in healths(anew[1])} == {"healthy"}  # good enough for these thresholds
    assert [a for report in anew for a in report["alerts"]]


@pytest.mark.parametrize(("before", "after"), GONE_ON)
@pytest.mark.parametrize("kind", KINDS)
def test_evidence_hysteresis_and_alerts_go_on_at_another_number_of_ranks(
    found: Found, kind: str, before: int, after: int
) -> None:
    ranks = found[f"{kind} {before} {after}"]
    assert len(ranks) == after
    for rank in ranks:
        assert rank["state"]["diagnosis"] == ranks[0]["state"]["diagnosis"]  # any rank's is that of all
        few, enough = rank["reports"]
        start = rank["before"]["step"]
        assert (few["step"], enough["step"]) == (start + FIRST, start + FIRST + THEN)
        assert healths(few) == {("stalling", 1)}  # judged with the evidence from before
        assert healths(enough) == {("stalling", 1)}  # not above the exit yet
        assert [a["title"] for report in rank["reports"] for a in report["alerts"]] == []
        assert told(rank["state"]) == told(rank["before"]) != {}
        assert all(pools(rank["before"]).values())


@pytest.mark.parametrize(("before", "after"), GONE_ON)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_after_the_resume_is_the_truth_of_all_elements(
    found: Found, kind: str, before: int, after: int
) -> None:
    ranks = found[f"{kind} {before} {after}"]
    first = ranks[0]
    measured = first["reports"][1]["tensors"]
    assert len(measured) == len(first["truth"]) == 4
    for t in measured:
        efficiency, lost = first["truth"][t["name"]]
        assert t["efficiency"] == pytest.approx(efficiency, abs=0.03), t["name"]
        assert t["lost_fraction"] == pytest.approx(lost, abs=0.03), t["name"]
    assert all(rank["reports"] == first["reports"] for rank in ranks)
    assert {rank["joined"] for rank in ranks} == {2 if after > 1 else 0}
