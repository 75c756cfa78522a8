"""A journal that cannot be written for a while goes on afterwards, and says what is missing."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import pytest

from tests.support.journals import steps, tiny, write
from update_watch import run_journal
from update_watch.dashboards.journal import Journal, JournalError
from update_watch.dashboards.journal.thinning import thin
from update_watch.dashboards.report import read_history, render_html
from update_watch.report import Report
from update_watch.worker import Sinks


class Disk:
    """Full, or not; what is written to it is written by the journal itself."""

    is_full = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        really = os.fstat

        def fstat(file: int) -> os.stat_result:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return really(file)

        monkeypatch.setattr("update_watch.dashboards.journal.journal.os.fstat", fstat)


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught]


def run(path: Path, disk: Disk, full: set[int], last: int, seen: list[Report] | None = None) -> list[str]:
    """Reports of step 10, 20, ... `last` through the watch's own caller of sinks; what is warned of."""
    sinks = Sinks([Journal(path), ([] if seen is None else seen).append])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(10, last + 1, 10):
            disk.is_full = step in full
            sinks(tiny(step))
        sinks(None)
    disk.is_full = False
    return told(caught)


def test_a_disk_that_is_full_for_a_while_costs_the_windows_of_that_while(tmp_path, monkeypatch):
    seen: list[Report] = []
    path = tmp_path / "j.jsonl"
    first, last = run(path, Disk(monkeypatch), {30, 40, 70}, 100, seen)
    assert steps(path) == [10, 20, 50, 60, 80, 90, 100]
    assert len(seen) == 10  # the other sinks miss nothing
    assert "sink Journal failed and is tried again with every window: OSError(28" in first and str(path) in first
    assert last == f"update-watch: 3 windows could not be handed to Journal ({path})"


def test_a_disk_that_stays_full_is_told_twice(tmp_path, monkeypatch, caplog):
    path = tmp_path / "j.jsonl"
    first, last = run(path, Disk(monkeypatch), set(range(30, 110, 10)), 100)
    assert steps(path) == [10, 20]
    assert last == f"update-watch: 8 windows could not be handed to Journal ({path}), the last one too"
    # where it failed is said, not by which lines of ours
    assert [bool(record.exc_info) for record in caplog.records] == [False, False]


def test_what_is_missing_is_on_the_page_also_where_the_journal_was_thinned(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    run(path, Disk(monkeypatch), {30, 40, 70}, 400)
    for _ in range(2):
        history = read_history(path)
        assert history.missing == 3 and history.damaged == 0
        assert "3 windows could not be written to the journal" in render_html([history])
        thin(path, 6000)
    assert read_history(write(tmp_path / "whole.jsonl", tiny(10))).missing == 0


def test_the_last_window_is_on_the_page_of_a_run_whose_journal_ended_before(tmp_path):
    path = write(tmp_path / "j.jsonl", tiny(10), tiny(20))
    page = run_journal.write_page(tmp_path / "page.html", path, tiny(90)).read_text()
    history = read_history(path, last=tiny(90))
    assert history.last.step == 90 and history.ends_at == 20 and history.windows == 3
    assert "The journal could not be written after step 20" in page
    whole = read_history(path, last=tiny(20))
    assert whole.windows == 2 and whole.ends_at is None


def test_the_page_of_a_run_whose_journal_is_of_an_earlier_one_alone(tmp_path):
    path = write(tmp_path / "j.jsonl", *(tiny(step) for step in (10, 20, 30, 40)))
    history = read_history(path, last=tiny(20, efficiency=0.5))  # resumed from step 10, and never written
    assert history.spans[-1][1] == 20 and history.windows == 2


def test_a_page_for_which_there_is_no_room_names_its_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = write(tmp_path / "j.jsonl", tiny(10))
    page = run_journal.write_page(tmp_path / "page.html", path, tiny(10))
    before = page.read_bytes()

    def chmod(*_: object) -> None:  # after the text was written
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("update_watch.dashboards.outputs.os.chmod", chmod)
    with pytest.raises(OSError, match=r"No space left on device: .*page\.html'"):
        run_journal.write_page(page, path, tiny(10))
    assert page.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["j.jsonl", "page.html"]


@pytest.mark.parametrize("what", ["folder", "text"])
def test_a_page_is_written_where_the_journal_cannot_be_read(tmp_path, what):
    path = tmp_path / "j.jsonl"
    path.mkdir() if what == "folder" else path.write_text("notes\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        page = run_journal.write_page(tmp_path / "page.html", path, tiny(90))
    assert "step 90" in page.read_text()
    assert [("cannot be read" in text) for text in told(caught)] == [True] * (what == "text")


def test_a_journal_that_is_emptied_under_way_is_begun_anew(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    for step in (10, 20, 30):
        journal(tiny(step))
    path.write_text("")  # as `> j.jsonl` in a shell
    for step in (40, 50):
        journal(tiny(step))
    assert steps(path) == [40, 50]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name")
def test_a_device_is_refused_before_it_is_read(tmp_path):
    pipe = tmp_path / "j.jsonl"
    os.mkfifo(pipe)  # as /dev/full, which can be read without end
    with pytest.raises(JournalError, match=r"j\.jsonl'\) is no file but a folder, a pipe or a device; name a file"):
        Journal(pipe)(tiny(10))


def test_a_relative_path_is_that_of_the_folder_the_journal_was_made_in(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    journal = Journal("runs/j.jsonl")
    journal(tiny(10))
    monkeypatch.chdir("elsewhere")
    journal(tiny(20))
    journal.close()
    assert steps(tmp_path / "runs" / "j.jsonl") == [10, 20]
    assert list((tmp_path / "elsewhere").iterdir()) == []
