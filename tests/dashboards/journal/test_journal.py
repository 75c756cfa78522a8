"""The journal: what is written comes back, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.run_samples import fully_filled_report, gpt, large, synthetic_run
from update_watch.dashboards.frame import frame_of, join, report_of
from update_watch.dashboards.journal.journal import SCHEMA, Journal, JournalError, JournalReader, read_journal
from update_watch.dashboards.journal.lines import HEALTH_LETTERS
from update_watch.dashboards.journal.thinning import KEPT, thin
from update_watch.report import Alert, Cause, Health, Level, Report, TensorReport
from update_watch.worker import Sinks

ROOT = Path(__file__).parents[3]


def tiny(step: int, health: Health = Health.healthy, efficiency: float | None = 1.0, **fields: Any) -> Report:
    """A report of two tensors; the first has the given health."""
    text = "" if health is Health.healthy else f"Its efficiency is {efficiency}."
    first = TensorReport("a", health, advice=text, efficiency=efficiency, numel=8, lr=1e-3)
    second = TensorReport("b", Health.healthy, efficiency=0.99, numel=8, lr=1e-3)
    return Report(step, 10, health, f"step {step}", (first, second), time=float(step), **fields)


def write(path: Path, *reports: Report, **options: Any) -> Path:
    journal = Journal(path, **options)
    for report in reports:
        journal(report)
    journal.close()
    return path


def steps(path: Path) -> list[int]:
    return [report.step for report in read_journal(path)]


# --- what is written comes back ----------------------------------------------------------------------


def test_every_field_of_a_report_comes_back(tmp_path):
    report = fully_filled_report()
    assert all(value not in (None, "", (), {}, 0) for value in dataclasses.asdict(report.tensors[0]).values())
    assert list(read_journal(write(tmp_path / "j.jsonl", report))) == [report]


def test_a_run_comes_back_to_four_digits(tmp_path):
    run = list(synthetic_run(windows=4))
    back = list(read_journal(write(tmp_path / "j.jsonl", *run)))
    assert len(back) == len(run)
    for before, after in zip(run, back, strict=True):
        assert _close(before.to_dict(), after.to_dict())
        assert [t.advice for t in after.tensors] == [t.advice for t in before.tensors]


def _close(a: Any, b: Any, path: str = "") -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k], f"{path}.{k}") for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_close(x, y, path) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        tolerance = 2e-4 if "headroom" in path else 6e-4 * abs(a)
        return b is not None and abs(a - b) <= tolerance
    return bool(a == b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_comes_back_as_not_known(tmp_path, value):
    report = tiny(10, efficiency=value)
    back = next(iter(read_journal(write(tmp_path / "j.jsonl", dataclasses.replace(report, cost_ms=value)))))
    assert back.tensors[0].efficiency is None
    assert back.cost_ms is None


@pytest.mark.parametrize(
    "name", ["</script><img src=x onerror=alert(1)>", "gewicht-ü-权重", 'a"b\\c\n\x00\x1f', "\ud800"]
)
def test_any_name_and_sentence_comes_back(tmp_path, name):
    tensor = TensorReport(name, Health.stalled, Cause.weight_rounding, f"{name} lost 97% at 1e-3", layer=name)
    report = Report(10, 10, Health.stalled, name, (tensor,), alerts=(Alert(10, Level.warn, name, name, (name,)),))
    back = next(iter(read_journal(write(tmp_path / "j.jsonl", report))))
    assert (back.tensors[0].name, back.tensors[0].advice, back.headline) == (name, tensor.advice, name)
    assert back.alerts == report.alerts


def test_a_report_without_tensors_comes_back(tmp_path):
    report = Report(10, 10, Health.unknown, "No tensors are watched.", ())
    assert list(read_journal(write(tmp_path / "j.jsonl", report))) == [report]


def test_tensors_that_change_over_the_run_come_back_as_they_were(tmp_path):
    grown = dataclasses.replace(
        tiny(20), tensors=(*tiny(20).tensors, TensorReport("c", Health.frozen, trainable=False))
    )
    run = [tiny(10), grown, tiny(30)]
    assert list(read_journal(write(tmp_path / "j.jsonl", *run))) == run


def test_a_journal_without_rounding_schemes_is_read_without_them(tmp_path):
    report = fully_filled_report()
    path = write(tmp_path / "j.jsonl", report)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.pop("scheme") for line in lines if line["kind"] == "tensors"] == [["carried:kahan_comp", ""]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (back,) = read_journal(path)
    first, *others = report.tensors
    assert back == dataclasses.replace(report, tensors=(dataclasses.replace(first, scheme=""), *others))


def test_every_health_has_a_letter_of_its_own():
    assert set(HEALTH_LETTERS) == set(Health)
    assert len(set(HEALTH_LETTERS.values())) == len(Health)


def test_a_window_takes_under_256_bytes_per_tensor(tmp_path):
    path = write(tmp_path / "j.jsonl", *synthetic_run(windows=6))
    last = path.read_bytes().splitlines()[-1]
    assert len(last) < 256 * len(gpt())


# --- the file ----------------------------------------------------------------------------------------


def test_each_window_is_in_the_file_when_the_sink_returns(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    for n in range(1, 4):
        journal(tiny(10 * n))
        assert steps(tmp_path / "j.jsonl") == [10 * k for k in range(1, n + 1)]


def test_making_a_journal_makes_no_file(tmp_path):
    Journal(tmp_path / "folder" / "j.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_the_header_tells_version_and_run(tmp_path):
    path = write(tmp_path / "j.jsonl", tiny(10), run={"name": "gpt", "lr": 0.1})
    header = json.loads(path.read_text().splitlines()[0])
    assert (header["kind"], header["format"], header["schema"]) == ("header", "update-watch journal", SCHEMA)
    assert header["run"] == {"name": "gpt", "lr": 0.1}


def test_a_later_process_continues_the_file(tmp_path):
    path = write(tmp_path / "j.jsonl", tiny(10), tiny(20))
    write(path, tiny(30))
    assert steps(path) == [10, 20, 30]


def test_a_line_cut_short_at_any_byte_is_left_out_and_the_next_process_goes_on_behind_it(tmp_path):
    path = write(tmp_path / "j.jsonl", tiny(10), tiny(20))
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in range(start, len(whole), 7):
        path.write_bytes(whole[:cut])
        assert steps(path) == [10]  # no warning: it may still be being written
        write(path, tiny(30))
        if cut == start:
            assert steps(path) == [10, 30]
            continue
        with pytest.warns(UserWarning, match=r"1 damaged line was skipped \(line 4;"):
            assert steps(path) == [10, 30]


def test_the_header_written_behind_half_a_line_is_not_lost(tmp_path):
    path = write(tmp_path / "j.jsonl", tiny(10), run={"name": "first"})
    path.write_bytes(path.read_bytes()[:-30])
    write(path, tiny(20), run={"name": "second"})
    reader = JournalReader(path)
    assert [frame.step for frame in reader.frames()] == [20]
    assert reader.run == {"name": "second"}


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal(tiny(10))
    (tmp_path / "j.jsonl").rename(tmp_path / "old.jsonl")
    journal(tiny(20))
    assert (steps(tmp_path / "old.jsonl"), steps(tmp_path / "j.jsonl")) == ([10], [20])


def test_a_journal_goes_to_another_process_as_its_settings(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", run={"name": "gpt"})
    journal(tiny(10))
    copy = pickle.loads(pickle.dumps(journal))
    copy(tiny(20))
    assert steps(tmp_path / "j.jsonl") == [10, 20]


def test_nothing_of_the_environment_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "local-0123456789abcdef")
    text = write(tmp_path / "j.jsonl", *synthetic_run(windows=2), run={"name": "gpt"}).read_text()
    for secret in ("0123456789abcdef", os.uname().nodename, str(ROOT), str(tmp_path)):
        assert secret not in text


# --- damage --------------------------------------------------------------------------------------------


def test_damaged_lines_are_skipped_and_named(tmp_path):
    path = write(tmp_path / "j.jsonl", *(tiny(10 * n) for n in range(1, 9)))
    lines = path.read_bytes().splitlines()
    lines[3] = lines[3][:50]
    lines[5] = lines[5].replace(b'"health":"hh"', b'"health":"hx"')
    lines[7] = b"[1, 2]"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match=r"3 damaged lines were skipped \(line 4, 6, 8;"):
        assert steps(path) == [10, 30, 50, 70, 80]


def test_windows_whose_table_of_tensors_is_damaged_are_named(tmp_path):
    path = write(tmp_path / "j.jsonl", tiny(10))
    lines = path.read_bytes().splitlines()
    lines[1] = b"{}..."
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match=r"2 damaged lines were skipped \(line 2, 3;"):
        assert steps(path) == []


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(JournalError, match="notes.txt is not an update-watch journal: none of its 2 lines can be read"):
        steps(path)


def test_a_file_that_is_no_journal_is_not_written_to(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(JournalError, match=r"notes\.txt'\): the file is there already and is not .* Give another path"):
        write(path, tiny(10))
    assert path.read_text() == "one\ntwo\n"


def test_a_journal_of_a_newer_version_is_neither_read_nor_continued(tmp_path):
    path = write(tmp_path / "j.jsonl", tiny(10))
    text = path.read_text().replace('"schema":1', '"schema":7')
    path.write_text(text)
    message = (
        r"j\.jsonl was written by a newer update-watch: its schema is version 7, .* up to 1\. Upgrade: pip install -U"
    )
    with pytest.raises(JournalError, match=message):
        steps(path)
    with pytest.raises(JournalError, match=message):
        write(path, tiny(20))
    assert path.read_text() == text


def test_lines_of_a_kind_not_known_are_passed_over(tmp_path):
    path = write(tmp_path / "j.jsonl", tiny(10))
    with path.open("a") as file:
        file.write('{"kind":"note","text":"of a later version"}\n')
    assert steps(write(path, tiny(20))) == [10, 20]


def _mutations() -> Any:
    garbage = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just([]), st.just({})
    )
    deeper = st.recursive(
        garbage, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)
    )
    return st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(0, 30), max_size=5), deeper), min_size=1, max_size=3
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=_mutations(), cut=st.integers(0, 4000), noise=st.binary(max_size=6))
def test_no_content_of_a_file_raises_anything_but_a_journal_error(tmp_path, mutations, cut, noise):
    lines = [json.loads(line) for line in _full_journal(tmp_path).splitlines()]
    for which, route, value in mutations:
        _replace(lines, which, route, value)
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    path = tmp_path / "fuzzed.jsonl"
    path.write_bytes(data[:cut] + noise + data[cut:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            for report in read_journal(path):
                report.to_dict()
        except JournalError:
            pass


def _full_journal(tmp_path: Path) -> bytes:
    path = tmp_path / "full.jsonl"
    if not path.exists():
        write(path, fully_filled_report())
    return path.read_bytes()


def _replace(node: Any, which: int, route: list[int], value: Any) -> None:
    """Put `value` somewhere into line `which`, following `route` as far as it leads."""
    key: Any = which
    for turn in route:
        child = node[key]
        keys = list(child) if isinstance(child, dict) else list(range(len(child))) if isinstance(child, list) else []
        if not keys:
            break
        node, key = child, keys[turn % len(keys)]
    node[key] = value


# --- a disk that fails -----------------------------------------------------------------------------------


def test_a_full_disk_raises_once_and_leaves_a_readable_file(tmp_path):
    script = """
        import resource, sys, warnings
        from pathlib import Path
        sys.path.insert(0, ".")
        from tests.support.run_samples import synthetic_run
        from update_watch.dashboards.journal.journal import Journal, read_journal
        from update_watch.worker import Sinks
        path = Path(sys.argv[1])
        journal, calls = Journal(path), []
        def sink(report):
            calls.append(report.step)
            journal(report)
        sinks = Sinks([sink])
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # every byte beyond is refused, as by a full disk
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for report in synthetic_run(windows=8):
                sinks(report)
        assert len(calls) < 8 and path.read_bytes().endswith(b"\\n"), calls
        assert [r.step for r in read_journal(path)] == calls[:-1], calls
        assert len(seen) == 1 and "OSError(27" in str(seen[0].message), seen
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(tmp_path / "j.jsonl")]
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written_raises_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Journal(tmp_path / "file" / "j.jsonl")(tiny(10))


def test_a_failing_journal_is_dropped_with_one_warning_and_the_other_sinks_go_on(tmp_path):
    (tmp_path / "file").write_text("")
    seen: list[Report] = []
    sinks = Sinks([Journal(tmp_path / "file" / "j.jsonl"), seen.append])
    with pytest.warns(UserWarning, match="sink Journal failed and is dropped") as caught:
        sinks(tiny(10))
        sinks(tiny(20))
    assert len(caught) == 1
    assert [report.step for report in seen] == [10, 20]


# --- very long runs ----------------------------------------------------------------------------------------


def _long_run(windows: int) -> list[Report]:
    run = [tiny(10 * n, efficiency=0.97 + 0.001 * (n % 7), cost_ms=1.0) for n in range(1, windows + 1)]
    run[100] = tiny(
        1010, Health.stalled, 0.03, alerts=(Alert(1010, Level.error, "1 of 2 stalled", "a stalled", ("a",)),)
    )
    run[101] = tiny(1020, alerts=(Alert(1020, Level.info, "1 of 2 recovered", "a recovered", ("a",)),))
    return run


def test_a_journal_that_outgrows_its_limit_is_thinned_and_hides_no_stall_and_no_alert(tmp_path):
    run = _long_run(2000)
    path = write(tmp_path / "j.jsonl", *run, max_bytes=100_000)
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
    assert [p.name for p in tmp_path.iterdir()] == ["j.jsonl"]


def test_thinning_keeps_an_even_resolution(tmp_path):
    back = list(read_journal(write(tmp_path / "j.jsonl", *_long_run(2000), max_bytes=100_000)))
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
    with pytest.warns(UserWarning, match="could not be thinned to 20000: .*No space left") as caught:
        path = write(tmp_path / "j.jsonl", *(tiny(10 * n) for n in range(1, 100)), max_bytes=20_000)
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


# --- arguments and layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, True], ids=str)
def test_a_limit_that_is_no_size_is_refused(value):
    with pytest.raises(ValueError, match=rf"Journal\(max_bytes={value}\) must be a positive number of bytes, or None"):
        Journal("j.jsonl", max_bytes=value)


def test_what_is_said_about_the_run_must_be_plain_data():
    with pytest.raises(ValueError, match=r"Journal\(run=\.\.\.\) must be plain JSON data"):
        Journal("j.jsonl", run={"model": object()})


def test_dashboards_load_no_optional_package_until_used():
    script = """
        import sys
        import update_watch.dashboards as d
        from update_watch.dashboards import Journal
        print(sorted({"wandb", "rich", "jinja2", "vl_convert", "altair"} & set(sys.modules)), "WandbSink" in dir(d))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[] True"


def test_asking_the_package_for_something_it_has_not_names_it():
    import update_watch.dashboards

    with pytest.raises(AttributeError, match=r"'update_watch\.dashboards' has no attribute 'Jurnal'"):
        _ = update_watch.dashboards.Jurnal


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_two_thousand_tensors_take_under_half_a_second_per_window(tmp_path):
    import time

    run = list(synthetic_run(large(2000), windows=3))
    journal = Journal(tmp_path / "j.jsonl")
    journal(run[0])
    started = time.perf_counter()
    for report in run[1:]:
        journal(report)
    assert (time.perf_counter() - started) / 2 < 0.5
    assert math.isclose(sum(r.window for r in read_journal(tmp_path / "j.jsonl")), 384)
