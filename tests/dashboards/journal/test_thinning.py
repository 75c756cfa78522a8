"""The journal of a very long run stays within its limit, and the windows it joins add up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.support.journals import steps, tiny, write
from tests.support.run_samples import synthetic_run
from update_watch.dashboards.frame import frame_of, report_of
from update_watch.dashboards.joining import join
from update_watch.dashboards.journal import Journal, read_journal
from update_watch.dashboards.journal.thinning import KEPT, thin
from update_watch.report import Alert, Health, Level, Report

# --- very long runs ----------------------------------------------------------------------------------------


def _long_run(windows: int) -> list[Report]:
    run = [tiny(10 * n, efficiency=0.97 + 0.001 * (n % 7), cost_ms=1.0) for n in range(1, windows + 1)]
    run[100] = tiny(
        1010, Health.stalled, 0.03, alerts=(Alert(1010, Level.error, "1 of 2 stalled", "a stalled", ("a",)),)
    )
    run[101] = tiny(1020, alerts=(Alert(1020, Level.info, "1 of 2 recovered", "a recovered", ("a",)),))
    return run


@pytest.fixture(scope="module")
def outgrown(tmp_path_factory):
    """A run, and the path of its thinned journal."""
    run = _long_run(1200)
    return run, write(tmp_path_factory.mktemp("outgrown") / "j.jsonl", *run, max_bytes=100_000)


def test_a_journal_that_outgrows_its_limit_is_thinned_and_hides_no_stall_and_no_alert(outgrown):
    run, path = outgrown
    back = list(read_journal(path))
    assert path.stat().st_size <= 100_000
    assert len(back) < 500
    assert sum(report.window for report in back) == sum(report.window for report in run)  # every step is in one line
    assert [a for report in back for a in report.alerts] == [a for report in run for a in report.alerts]
    (stalled,) = (report for report in back if report.health is Health.stalled)
    assert stalled.step - stalled.window < 1010 <= stalled.step
    assert stalled.tensors[0] == run[100].tensors[0]
    assert stalled.headline == run[100].headline
    assert back[-KEPT:] == run[-KEPT:]
    assert [p.name for p in path.parent.iterdir()] == ["j.jsonl"]


def test_thinning_keeps_an_even_resolution(outgrown):
    back = list(read_journal(outgrown[1]))
    joined = [report.window for report in back if report.window > 10]
    assert sum(2 * steps >= max(joined) for steps in joined) >= 0.9 * len(joined)
    assert max(joined) in (80, 160, 320)  # 8, 16 or 32 windows of 10 steps: no line is wider than was decided


def test_thinning_joins_no_more_than_it_must_and_leaves_the_last_windows_alone(tmp_path):
    run = [tiny(10 * n) for n in range(1, 401)]
    path = write(tmp_path / "j.jsonl", *run)
    before = path.stat().st_size
    assert thin(path, before) == path.stat().st_size
    assert before / 4 < path.stat().st_size <= before / 2
    back = list(read_journal(path))
    assert back[-KEPT:] == run[-KEPT:]
    assert all(report.window > 10 for report in back[:-KEPT])


def test_thinning_does_not_join_a_resumed_run_with_the_steps_it_repeats(tmp_path):
    first, again = _long_run(400), [tiny(10 * n) for n in range(200, 500)]
    path = write(tmp_path / "j.jsonl", *first)
    write(path, *again, max_bytes=60_000)
    found = steps(path)
    (turn,) = (i for i in range(1, len(found)) if found[i] <= found[i - 1])
    assert found[turn - 1] == 4000
    assert found[turn] >= 2000
    assert sum(r.window for r in read_journal(path)) == 7000


def test_thinning_does_not_join_steps_repeated_within_one_process(tmp_path):
    run = [tiny(10 * n) for n in (*range(1, 201), *range(100, 300))]
    path = write(tmp_path / "j.jsonl", *run)
    thin(path, path.stat().st_size // 4)
    found = [(report.step - report.window, report.step) for report in read_journal(path)]
    assert sum(begin > before for (_, before), (begin, _) in zip(found, found[1:], strict=False)) == 0
    (turn,) = (i for i in range(1, len(found)) if found[i][1] <= found[i - 1][1])
    assert found[turn - 1][1] == 2000
    assert found[turn][0] == 990


def test_thinning_leaves_damaged_and_unknown_lines_for_the_reader_to_name(tmp_path):
    path = write(tmp_path / "j.jsonl", *_long_run(300))
    with path.open("a") as file:
        file.write('{"kind":"window","step":7,"windows":1,"broken"\n{"kind":"note"}\n')
    write(path, *(tiny(10 * n) for n in range(301, 400)), max_bytes=40_000)
    with pytest.warns(UserWarning, match="1 damaged line was skipped"):
        assert sum(r.window for r in read_journal(path)) == 3990
    assert '{"kind":"note"}' in path.read_text()


def test_a_journal_that_cannot_be_thinned_goes_on_and_warns_once(tmp_path, monkeypatch):
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("update_watch.dashboards.journal.thinning.tempfile.mkstemp", fail)
    with pytest.warns(UserWarning, match="could not be thinned to 25000: .*No space left") as caught:
        path = write(tmp_path / "j.jsonl", *(tiny(10 * n) for n in range(1, 100)), max_bytes=25_000)
    assert len(caught) == 1
    assert steps(path) == [10 * n for n in range(1, 100)]


def test_joining_two_windows_takes_each_tensor_from_its_worse_one():
    early, late = (list(synthetic_run(windows=20))[k] for k in (5, 18))
    joined = report_of(join(frame_of(early), frame_of(late)))
    order = [Health.broken, Health.stalled, Health.stalling, Health.idle, Health.healthy, Health.unknown, Health.frozen]
    for a, b, c in zip(early.tensors, late.tensors, joined.tensors, strict=True):
        worse = min((b, a), key=lambda t: (order.index(t.health), t.efficiency))
        assert dataclasses.replace(c, accumulators={}) == dataclasses.replace(worse, accumulators={})
        for name, accumulator in c.accumulators.items():
            pair = (b.accumulators[name], a.accumulators[name])
            assert accumulator == min(pair, key=lambda t: (order.index(t.health), t.efficiency))
    assert (joined.step, joined.window) == (late.step, 256)


def test_of_joined_windows_the_steps_seen_add_up_and_the_share_is_the_mean_of_what_is_known():
    first, second = (
        tiny(10 * n, observed_steps=seen, cost_share=share) for n, seen, share in ((1, 8, 0.01), (2, 4, 0.03))
    )
    joined = report_of(join(frame_of(first), frame_of(second)))
    assert (joined.observed_steps, joined.cost_share) == (12, pytest.approx(0.02))
    unseen = report_of(join(frame_of(dataclasses.replace(first, observed_steps=None)), frame_of(second)))
    assert unseen.observed_steps is None


@pytest.mark.slow
def test_a_hundred_thousand_windows_stay_within_their_limit_and_in_flat_memory(tmp_path):
    psutil = pytest.importorskip("psutil")
    journal, limit = Journal(tmp_path / "j.jsonl", max_bytes=2 * 2**20), 2 * 2**20
    process, sizes = psutil.Process(), []
    for n in range(1, 100_001):
        journal(tiny(10 * n))
        if n % 20_000 == 0:
            sizes.append(process.memory_info().rss)
            assert (tmp_path / "j.jsonl").stat().st_size <= limit + 2000
    assert sizes[-1] - sizes[0] < 8 * 2**20
    assert sum(r.window for r in read_journal(tmp_path / "j.jsonl")) == 1_000_000
