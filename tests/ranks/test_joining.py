"""Ranks that join their windows, against a full comparison of all elements of all ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.ranks.cases import launch
from tests.support.ranks.events import PLACES
from update_watch.ranks import gloo_group

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built in")

Found = list[dict[str, Any]]
HANGS = 30  # seconds: half of what ranks wait for each other
# each list is one start of the processes
_ON_TWO = ["fsdp2_empty", "is_identical"]  # the only one that is not slow
_SHARED = ["ddp", "fsdp2_even", "fsdp2_uneven", "tensor_parallel", "fsdp1", "zero1", "pipeline"]
_ON_TWO_TOO = [
    *_SHARED,
    "drifts",
    "one_watches_late",
    "one_closes_alone",
    "whole_rules",
    "one_flushes_alone",
    "fails_in_a_hook",
    "fail_anywhere:7",
]
_TENSORS = {"fsdp2_uneven": 6, "fsdp2_empty": 6, "zero1": 6, "pipeline": 8}
_ON_FOUR = ["fsdp2_uneven", "fsdp2_empty", "hybrid", "two_dimensional", "tensor_parallel", "zero1"]
_ON_FOUR_TOO = ["hybrid_drifts", "hybrid_is_identical"]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launch(2, _ON_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_two_too(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launch(2, _ON_TWO_TOO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launch(4, [*_ON_FOUR, *_ON_FOUR_TOO], tmp_path_factory.mktemp("four"))


def test_processes_that_a_launcher_starts_anew_do_not_meet_those_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the launcher's, which outlives them
    try:
        groups = []
        for attempt in ("0", "1", "1"):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
            monkeypatch.setattr(gloo_group, "_COUNT", itertools.count())  # as in a new process
            groups.append(gloo_group.Group())
            if attempt == "0":
                groups[0]._store.set("over", "1")  # it has waited for another one in vain
        _, first, second = groups
        first._check_others()
        assert first._store.add("here", 0) == second._store.add("here", 0) == 2  # those of one attempt do meet
        with pytest.raises(gloo_group.Parted):
            groups[0]._check_others()
    finally:
        dist.destroy_process_group()


def check(ranks: Found, case: str) -> None:
    """Every tensor's numbers are the truth's within 0.03, and the same on all ranks."""
    first = ranks[0][case]
    assert len(first["report"]["tensors"]) == _TENSORS.get(case, 4)
    for t in first["report"]["tensors"]:
        efficiency, lost = first["truth"][t["name"]]
        assert t["efficiency"] == pytest.approx(efficiency, abs=0.03), t["name"]
        assert t["lost_fraction"] == pytest.approx(lost, abs=0.03), t["name"]
        assert t["health"] != "broken"  # replicas agree
    assert all(other[case]["report"] == first["report"] for other in ranks)
    assert {other[case]["joined"] for other in ranks} == {1}


def test_two_ranks_report_the_truth_of_all_elements(on_two: Found) -> None:
    check(on_two, "fsdp2_empty")


@pytest.mark.slow
@pytest.mark.parametrize("case", _SHARED)
def test_two_ranks_report_the_truth_of_other_ways_to_share(on_two_too: Found, case: str) -> None:
    check(on_two_too, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", _ON_FOUR)
def test_four_ranks_report_the_truth_of_all_elements(on_four: Found, case: str) -> None:
    check(on_four, case)


@pytest.mark.slow
def test_every_rank_reports_the_parameters_of_all_stages(on_two_too: Found) -> None:
    names = [t["name"] for t in on_two_too[1]["pipeline"]["report"]["tensors"]]
    assert names == [f"stage{s}.layers.{i}.{what}" for s in (0, 1) for i in (0, 1) for what in ("weight", "bias")]


def test_shards_are_reported_as_one_tensor_of_the_whole_size(on_two: Found) -> None:
    sizes = {t["name"]: (t["numel"], t["shape"]) for t in on_two[0]["fsdp2_empty"]["report"]["tensors"]}
    assert sizes["layers.0.weight"] == (600, [1, 600])
    assert sizes["layers.1.bias"] == (65, [65])


def test_one_window_is_one_collective(on_two: Found) -> None:
    """Six windows; in the first the ranks learn of each other, so it is joined twice."""
    for rank in on_two:
        check_collectives(rank["is_identical"])


@pytest.mark.slow
def test_one_window_is_one_collective_under_hybrid_sharding(on_four: Found) -> None:
    for rank in on_four:
        check_collectives(rank["hybrid_is_identical"])


def check_collectives(found: dict[str, Any]) -> None:
    assert found["joined"] == 6
    assert found["collectives"] == [6 + 1, 1]
    # what was asked of the process group itself
    assert found["calls"].count("allreduce") == 6 + 1
    assert found["calls"][-5:] == 5 * ["allreduce"]


def test_training_is_the_same_to_the_bit_with_and_without(on_two: Found) -> None:
    for rank in on_two:
        assert rank["is_identical"]["watched"] == rank["is_identical"]["unwatched"]
        assert rank["is_identical"]["moved"]


@pytest.mark.slow
def test_a_tensor_whose_replicas_drift_apart_is_broken_and_named(on_two_too: Found) -> None:
    for rank in on_two_too:
        assert rank["drifts"]["broken"] == [{}] + 2 * [{"layers.1.weight": "replicas_differ"}]
        assert len(rank["drifts"]["alerts"]) == 1 and "layers.1.weight" in rank["drifts"]["alerts"][0]
    assert [rank["drifts"]["told"] for rank in on_two_too] == [3, 0]  # sinks as anybody gives them, on every rank


@pytest.mark.slow
def test_one_shard_that_differs_from_its_replica_is_enough(on_four: Found) -> None:
    for rank in on_four:
        assert rank["hybrid_drifts"]["broken"] == [{}] + 2 * [{"layers.1.weight": "replicas_differ"}]


@pytest.mark.slow
def test_a_rule_that_needs_the_whole_tensor_is_not_replayed_on_a_shard(on_two_too: Found) -> None:
    for rank in on_two_too:
        reason = "its rule needs the whole tensor, and this rank holds 480 of 960 elements"
        assert rank["whole_rules"] == {"0.weight": reason, "1.weight": ""}


def check_faults(ranks: Found, case: str, places: tuple[str, ...]) -> None:
    for rank in ranks:
        for run, place in zip(rank[case], places, strict=True):
            assert run["steps"] == 24, place
            assert run["seconds"] < HANGS, place
            assert not run["joining"], place
            assert 1 <= run["joined"] <= 3, place


@pytest.mark.slow
def test_a_rank_that_does_not_watch_keeps_nobody_waiting_for_long(on_two_too: Found) -> None:
    first, second = (rank["one_watches_late"] for rank in on_two_too)
    assert (first["reports"], second["reports"]) == (4, 2)  # each its own shards
    for rank in (first, second):  # either may be the one that is not there to say it
        assert len(rank["warnings"]) == 1 and "not all of the 2 ranks are watching" in rank["warnings"][0]
    assert first["seconds"] < HANGS and second["seconds"] < HANGS
    assert first["collectives"] == second["collectives"] == [0, 0]


@pytest.mark.slow
def test_a_rank_that_closes_early_reports_what_it_has_and_does_not_wait(on_two_too: Found) -> None:
    first, second = (rank["one_closes_alone"] for rank in on_two_too)
    assert first["windows"] == [[8, 8], [4, 12]]
    assert second["windows"] == [[8, 8], [8, 16], [8, 24]]
    assert first["told"] == 2  # when close() returned
    assert second["seconds"] < HANGS and len(second["warnings"]) == 1
    assert first["warnings"] == []


@pytest.mark.slow
def test_wherever_a_rank_fails_nobody_hangs_and_training_goes_on(on_two_too: Found) -> None:
    check_faults(on_two_too, "fail_anywhere:7", PLACES)


@pytest.mark.slow
def test_a_process_that_ends_without_closing_its_watch_ends_well(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        launch(2, ["ends_without_closing"], tmp_path / str(i))  # raises for an exit code other than 0


@pytest.mark.slow
def test_a_rank_that_dies_in_mid_window_keeps_the_others_no_longer_than_they_wait(tmp_path: Path) -> None:
    others = [rank["one_dies"] for rank in launch(3, ["one_dies"], tmp_path)]
    assert len(others) == 2
    for i, rank in enumerate(others):
        assert rank["windows"] == [[8, 8], [8, 16], [8, 24], [8, 32]]
        assert rank["tensors"] == [12, 4, 4, 4]  # of all ranks, then its own
        assert rank["joined"] == 1
        assert rank["seconds"] < HANGS
        assert len(rank["warnings"]) == 1 and "ranks are not joined any more" in rank["warnings"][0], i


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_joining_in_the_same_window(on_two_too: Found) -> None:
    failed, other = on_two_too[1]["fails_in_a_hook"], on_two_too[0]["fails_in_a_hook"]
    assert failed["joined"] == other["joined"] == 2
    assert failed["steps"] == other["steps"] == 40  # training went on
    assert failed["reports"] == 2 and other["reports"] == 5  # the other goes on with what it sees
    assert other["seconds"] < HANGS
    assert [w for w in other["warnings"] if "rank 1 of 2 stopped watching" in w] == other["warnings"]
    assert len(failed["warnings"]) == 1 and "planted" in failed["warnings"][0]


@pytest.mark.slow
def test_a_rank_that_is_ahead_is_not_mixed_with_the_others(on_two_too: Found) -> None:
    """Rank 0 closes a window of its own after 3 steps; the next ends where rank 1's does, but is shorter."""
    first, second = (rank["one_flushes_alone"] for rank in on_two_too)
    assert first["windows"] == [[8, 8], [3, 11], [5, 16], [8, 24]]
    assert second["windows"] == [[8, 8], [8, 16], [8, 24]]
    assert first["joined"] == second["joined"] == 2
    assert first["measured"] == second["measured"]
