"""What goes wrong around a run, through the real watch with a journal: training goes on or ends as it would have without
it, and what was measured is in the journal. The table in docs/faults.md names these tests.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from update_watch.dashboards.journal import read_journal
from update_watch.report import Report

HERE = Path(__file__).resolve().parents[1]
WINDOW = 8
LATEST = 5.0  # seconds from the signal to the end of the process


def start(folder: Path, how: str, steps: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "support" / "fault_training.py"), str(folder), how, str(steps)],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(folder: Path) -> int:
    """The last step the training told of."""
    path = folder / "steps"
    return int(path.read_text()) if path.exists() else 0


def wait_for(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while done(folder) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def windows(folder: Path) -> list[Report]:
    """The journal, which must be whole: a warning of damage is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return list(read_journal(folder / "journal.jsonl"))


def end(process: subprocess.Popen[str]) -> tuple[int, str, float]:
    """Status, standard error and seconds until the process has ended."""
    started = time.monotonic()
    _, err = process.communicate(timeout=120)
    return process.returncode, err, time.monotonic() - started


def check_all_is_there(folder: Path, last_step: int) -> None:
    """Every window is there and the open one too, up to a step that ran when the process was told to end."""
    found = windows(folder)
    assert [r.window for r in found[:-1]] == [WINDOW] * (len(found) - 1)
    assert sum(r.window for r in found) == found[-1].step
    assert last_step <= found[-1].step <= last_step + 1
    assert found[-1].tensors and all(t.dtype == "bfloat16" for t in found[-1].tensors)


# --- a process that is ended ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["bare", pytest.param("context", marks=pytest.mark.slow)])
def test_sigterm_reports_the_open_window_and_ends_the_process_by_the_signal(
    tmp_path: Path, how: str, number: signal.Signals
) -> None:
    process = start(tmp_path, how, 100_000)
    wait_for(tmp_path, 19, process)
    process.send_signal(number)
    status, _, seconds = end(process)
    assert status == -number and seconds < LATEST
    check_all_is_there(tmp_path, done(tmp_path))


@pytest.mark.slow
def test_a_sigterm_that_comes_while_a_step_is_measured_waits_for_its_measurement(tmp_path: Path) -> None:
    status, err, _ = end(start(tmp_path, "signal_in_hook", 100))
    assert status == -signal.SIGTERM, err
    assert [(r.step, r.window) for r in windows(tmp_path)] == [(8, 8), (12, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bare", "context"])
def test_sigint_reports_the_open_window_and_ends_in_keyboard_interrupt(tmp_path: Path, how: str) -> None:
    process = start(tmp_path, how, 100_000)
    wait_for(tmp_path, 19, process)
    process.send_signal(signal.SIGINT)
    status, err, seconds = end(process)
    assert status == -signal.SIGINT and "KeyboardInterrupt" in err and seconds < LATEST
    check_all_is_there(tmp_path, done(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raising", "bare_raising"])
def test_an_exception_in_mid_window_is_not_hidden_and_the_open_window_is_reported(tmp_path: Path, how: str) -> None:
    process = start(tmp_path, how, 19)
    status, err, _ = end(process)
    assert status == 1 and "\nRuntimeError: CUDA out of memory\n" in err  # alerts of the open window may follow
    assert err.count("Traceback") == 1
    check_all_is_there(tmp_path, 19)


@pytest.mark.slow
def test_the_end_of_the_interpreter_without_close_reports_the_open_window(tmp_path: Path) -> None:
    process = start(tmp_path, "bare", 19)
    status, err, _ = end(process)
    assert status == 0 and "Traceback" not in err and "Warning" not in err
    check_all_is_there(tmp_path, 19)


@pytest.mark.slow
def test_kill_9_loses_the_open_window_and_nothing_else(tmp_path: Path) -> None:
    process = start(tmp_path, "bare", 100_000)
    wait_for(tmp_path, 30, process)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    found = windows(tmp_path)
    assert [r.step for r in found] == [WINDOW * (n + 1) for n in range(len(found))]
    assert found[-1].step > done(tmp_path) - 2 * WINDOW  # the last one may still have been on its way


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_lightning_ended_by_a_signal_reports_the_open_window(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "lightning", 100_000)
    wait_for(tmp_path, 19, process)
    process.send_signal(number)
    _, err, seconds = end(process)
    assert seconds < LATEST + 5, err  # Lightning's own end included
    found = windows(tmp_path)
    assert sum(r.window for r in found) >= done(tmp_path) and found[-1].window < WINDOW, err


@pytest.mark.slow
def test_lightning_ended_by_an_exception_reports_the_open_window(tmp_path: Path) -> None:
    status, err, _ = end(start(tmp_path, "lightning", 19))
    assert status == 1 and "RuntimeError: CUDA out of memory" in err
    assert [r.window for r in windows(tmp_path)] == [8, 8, 3]


@pytest.mark.slow
def test_a_sink_that_never_returns_holds_the_end_of_the_process_for_seconds_only(tmp_path: Path) -> None:
    process = start(tmp_path, "hanging_sink", 19)
    wait_for(tmp_path, 19, process)
    status, err, seconds = end(process)
    assert status == 0 and seconds < 2 * LATEST, err
    assert [r.step for r in windows(tmp_path)] == [8]  # the journal came before the sink that hangs
    assert (tmp_path / "weights.pt").exists()


# --- processes beside it --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_that_trains_is_told_to_watch_anew_and_writes_nothing(tmp_path: Path) -> None:
    import torch

    status, err, _ = end(start(tmp_path, "forking", 19))
    assert status == 0 and (tmp_path / "child").read_text() == "0", err
    assert [r.step for r in windows(tmp_path)] == [8, 16, 19]  # each once
    assert err.count("UserWarning: update-watch: this process was forked") == 1
    parent, child = (torch.load(tmp_path / name) for name in ("weights.pt", "child.pt"))
    assert all(torch.equal(parent[name], child[name]) for name in parent)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_that_watches_what_it_trains_is_told_nothing(tmp_path: Path) -> None:
    status, err, _ = end(start(tmp_path, "watching_anew", 19))
    assert status == 0 and "forked" not in err, err
    assert [r.step for r in windows(tmp_path)] == [8, 16, 19]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_is_forked_while_another_thread_is_in_our_code_waits_for_nobody(tmp_path: Path) -> None:
    status, err, _ = end(start(tmp_path, "forking_beside_a_thread", 19))
    assert status == 0, err
    assert [r.step for r in windows(tmp_path)] == [8, 16, 19]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_worker_of_multiprocessing_reports_its_open_window(tmp_path: Path) -> None:
    status, err, _ = end(start(tmp_path, "worker", 19))
    assert status == 0, err
    check_all_is_there(tmp_path, 19)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loader_fork", "loader_spawn"])
def test_data_loader_workers_begun_in_mid_window_disturb_nothing(tmp_path: Path, how: str) -> None:
    status, err, _ = end(start(tmp_path, how, 24))
    said = re.findall(r"update-watch.*", err)  # alerts, and nothing else
    assert status == 0 and all(re.match(r"update-watch, step (8|16): STALLED: ", line) for line in said), err
    assert [r.step for r in windows(tmp_path)] == [8, 16, 24]
    headers = [line for line in (tmp_path / "journal.jsonl").read_text().splitlines() if "header" in line[:20]]
    assert len(headers) == 1 and json.loads(headers[0])["schema"] == 2


def test_every_row_of_the_table_names_tests_that_exist() -> None:
    rows = [line for line in (HERE.parent / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
    sources = {path.name: path.read_text() for path in HERE.rglob("test_*.py")}
    named = 0
    for row in rows:
        file = ""
        for place, name in re.findall(r"`(test_\w+\.py|\.\.\.)::(test_\w+)`", row):
            file = file if place == "..." else place
            assert f"def {name}(" in sources[file], name
            named += 1
    assert named > 30
