"""The journal: what is written comes back."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tests.support.journals import environment, is_close, steps, tiny, write
from tests.support.run_samples import fully_filled_report, gpt, large, synthetic_run
from update_watch.dashboards.journal import Journal, JournalReader, read_journal
from update_watch.dashboards.journal.lines import HEALTH_LETTERS, SCHEMA
from update_watch.dashboards.report.history import history_of, read_history
from update_watch.report import Alert, Cause, Health, Level, Report, TensorReport

ROOT = Path(__file__).parents[3]


# --- what is written comes back ----------------------------------------------------------------------


def test_every_field_of_a_report_comes_back(tmp_path):
    report = fully_filled_report()
    assert all(getattr(report, field.name) not in (None, "", (), 0) for field in dataclasses.fields(Report))
    values = dataclasses.asdict(report.tensors[0])
    del values["was_rounded"]  # of a window; its sentence is kept
    assert all(value not in (None, "", (), {}, 0) for value in values.values())
    assert list(read_journal(write(tmp_path / "j.jsonl", report))) == [report]


def test_a_run_comes_back_to_four_digits(tmp_path):
    run = list(synthetic_run(windows=4))
    back = list(read_journal(write(tmp_path / "j.jsonl", *run)))
    assert len(back) == len(run)
    for before, after in zip(run, back, strict=True):
        assert is_close(before.to_dict(), after.to_dict())
        assert [t.advice for t in after.tensors] == [t.advice for t in before.tensors]


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
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[] True"


def test_asking_the_package_for_something_it_has_not_names_it():
    import update_watch.dashboards

    with pytest.raises(AttributeError, match=r"'update_watch\.dashboards' has no attribute 'Jurnal'"):
        _ = update_watch.dashboards.Jurnal


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


def test_the_page_of_a_journal_knows_what_the_page_of_its_reports_knows(tmp_path):
    forecast = fully_filled_report().forecast
    run = [
        dataclasses.replace(
            r, forecast=dataclasses.replace(forecast, step=r.step, until=1_000, headline=f"at {r.step}")
        )
        for r in synthetic_run(windows=6)
    ]
    read, told = read_history(write(tmp_path / "j.jsonl", *run)), history_of(run)
    assert read.foretold is not None and told.foretold is not None
    assert read.foretold.headline == told.foretold.headline == "at 256"
    for name, values in told.series_PH.items():
        np.testing.assert_allclose(read.series_PH[name], values, rtol=2e-3)
    np.testing.assert_allclose(read.ranges_H, told.ranges_H, rtol=2e-3)
