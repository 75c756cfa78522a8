"""The journal beside a run: kept where it was asked for, opened by a folder's name, shown at once."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import update_watch as uw
from update_watch.cli import main
from update_watch.dashboards import Journal, read_journal
from update_watch.dashboards.journal.finding import journals_in
from update_watch.report import Health, Report, TensorReport

HOSTILE = "<script>alert(1)</script>"


def train(path: Path | None, steps: int = 32, **options: object) -> uw.Watch:
    torch.manual_seed(0)
    model = nn.LayerNorm(16).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    watch = uw.watch(model, optimizer, window=16, budget=None, journal=path, **options)  # type: ignore[arg-type]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 16).bfloat16()).float().square().mean().backward()
        optimizer.step()
    return watch


def test_a_watch_keeps_a_journal_where_it_is_told_to(tmp_path):
    path = tmp_path / "runs" / "a.jsonl"
    with train(path) as watch:
        watch.flush()
    assert [report.step for report in read_journal(path)] == [16, 32]
    header = json.loads(path.read_text().splitlines()[0])["run"]
    assert header["optimizer"] == "AdamW"
    assert header["torch"] == torch.__version__
    assert header["processes"] == 1
    assert str(tmp_path) not in path.read_text()  # no path of the machine


def test_no_journal_is_kept_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with train(None) as watch:
        watch.flush()
    assert list(tmp_path.iterdir()) == []
    assert watch.journal is None


@pytest.mark.parametrize("journal", [3, ""])
def test_a_journal_that_names_no_file_is_refused(journal):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"must name the file to write"):
        uw.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), journal=journal)


def test_a_watch_says_its_headline(tmp_path):
    watch = train(None, steps=1)
    assert "no window was closed so far" in repr(watch)
    last = watch.flush()
    assert last is not None
    assert repr(watch) == f"<update_watch.Watch, step 1: {last.headline}>"
    watch.close()


def test_a_watch_shows_its_verdict_in_a_notebook_as_text(tmp_path):
    with train(None, steps=48) as watch:
        watch.flush()
        shown = watch._repr_html_()
    assert "STALLED" in shown
    assert "weight does not train" in shown
    assert "dtype=torch.float32" in shown
    tensor = TensorReport(HOSTILE, Health.stalled, advice=HOSTILE, shape=(4, 4), numel=16)
    watch.last = Report(10, 10, Health.stalled, HOSTILE, (tensor,))
    assert "<script" not in watch._repr_html_()


def test_a_page_is_of_the_whole_run_with_a_journal_and_of_the_last_window_without(tmp_path):
    pytest.importorskip("vl_convert")
    pytest.importorskip("jinja2")
    with train(tmp_path / "a.jsonl") as watch:
        page = watch.report(tmp_path / "a.html")
    assert page == tmp_path / "a.html"
    steps = re.findall(r'"steps":\[([0-9,]+)\]', page.read_text())
    assert steps[0] == "16,32"
    with train(None) as watch:
        steps = re.findall(r'"steps":\[([0-9,]+)\]', watch.report(tmp_path / "b.html").read_text())
    assert steps[0] == "32"


def small(path: Path, name: str = "a") -> Path:
    sink = Journal(path)
    sink(Report(10, 10, Health.healthy, "fine", (TensorReport(name, Health.healthy, efficiency=1.0, numel=1),)))
    sink.close()
    return path


def test_a_folder_stands_for_its_newest_journal(tmp_path, capsys, monkeypatch):
    pytest.importorskip("vl_convert")
    import os

    old, new = (
        small(tmp_path / "version_0" / "j.jsonl", "old.alpha"),
        small(tmp_path / "version_1" / "j.jsonl", "new.beta"),
    )
    os.utime(old, (1, 1))
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    assert journals_in(tmp_path) == [new, old]
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html"), "--open"]) == 0
    assert opened == [(tmp_path / "r.html").as_uri()]
    text = (tmp_path / "r.html").read_text()
    assert '"new.beta"' in text and '"old.alpha"' not in text
    assert main(["top", str(tmp_path), "--once"]) == 0
    out = capsys.readouterr().out
    assert "The one tensor gets its updates." in out
    assert out.splitlines()[-1].startswith("beta")


def test_a_folder_without_a_journal_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: no journal in this folder or below" in capsys.readouterr().err


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_running_watch_is_refused_in_words(copied: Callable[[Any], Any]) -> None:
    model = nn.Linear(4, 4)
    with uw.watch(model) as watch:
        model.keeper = [watch]  # as a trainer's module may have it
        with pytest.raises(TypeError, match="a running Watch cannot be copied or pickled; keep it outside"):
            copied(watch if copied is copy.copy else model)
