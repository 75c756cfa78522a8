"""`update-watch run COMMAND`: scripts that nobody edits, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.wandb.samples import OfflineRun
from update_watch.dashboards.journal import read_journal
from update_watch.report import Health, Report
from update_watch.run import claims
from update_watch.run.session import brief, free_path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "tests" / "support" / "run_script.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def watched(folder: Path, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "update_watch", "run", "--window", "16", "--journal", "run.jsonl", *options]
    return subprocess.run(
        [*start, *command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )


def plain(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=True)


def reports(folder: Path) -> list[Report]:
    return list(read_journal(folder / "run.jsonl"))


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


NAMES = ["0.weight", "0.bias", "1.weight", "2.weight", "2.bias"]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param((), id="fp32"),
        pytest.param(("bf16",), id="bf16"),
        pytest.param(("compiled",), id="compiled"),
        pytest.param(("masters",), id="masters"),
    ],
)
@pytest.mark.slow
def test_training_is_the_same_to_the_bit_and_the_model_is_known_by_its_names(
    how: tuple[str, ...], tmp_path: Path
) -> None:
    plain(tmp_path, sys.executable, SCRIPT, "plain.pt", *how)
    run = watched(tmp_path, sys.executable, SCRIPT, "watched.pt", *how)
    assert run.returncode == 0 and run.stdout == "trained\n", run.stderr
    assert_same(torch.load(tmp_path / "plain.pt"), torch.load(tmp_path / "watched.pt"))
    last = reports(tmp_path)[-1]
    assert [t.name for t in last.tensors] == NAMES
    stalled = {t.name for t in last.tensors if t.health is Health.stalled}
    assert ("1.weight" in stalled) == ("bf16" in how)
    assert last.headline in run.stderr
    lines = run.stderr.splitlines()
    assert all(lines.count(f"update-watch, step {r.step:,}: {brief(r)}") == 1 for r in reports(tmp_path))
    assert "  Open: update-watch report --open run.jsonl" in lines


@pytest.mark.slow
def test_every_model_of_a_script_is_watched_and_has_a_journal(tmp_path: Path) -> None:
    plain(tmp_path, sys.executable, SCRIPT, "plain.pt", "gan")
    run = watched(
        tmp_path, sys.executable, SCRIPT, "watched.pt", "gan", options=("--fail-on-stall", "--report", "r.html")
    )
    assert run.stdout == "trained\n" and run.returncode == 3, run.stderr
    assert_same(torch.load(tmp_path / "plain.pt"), torch.load(tmp_path / "watched.pt"))
    # a lone scalar of no module is no model
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["run-Critic.jsonl", "run.jsonl"]
    last = reports(tmp_path)[-1]
    assert [t.name for t in last.tensors] == NAMES and last.health is Health.healthy
    critic = list(read_journal(tmp_path / "run-Critic.jsonl"))[-1]
    assert [t.name for t in critic.tensors] == NAMES
    assert {t.name for t in critic.tensors if t.health is Health.stalled} >= {"1.weight"}
    assert (critic.step, last.step) == (48, 48)  # the first step of both is seen
    assert "of Critic: STALLED" in run.stderr
    assert f"update-watch: Critic: {critic.headline}" in run.stderr
    assert f"update-watch: Sequential: {last.headline}" in run.stderr
    assert f" of Critic: {brief(critic)}" in run.stderr and f" of Sequential: {brief(last)}" in run.stderr


@pytest.mark.slow
def test_two_ranks_have_one_journal(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533", SCRIPT]
    plain(tmp_path, sys.executable, *command, "plain.pt", "ranks")
    run = watched(tmp_path, sys.executable, *command, "watched.pt", "ranks")
    assert run.returncode == 0, run.stderr
    assert_same(torch.load(tmp_path / "plain.pt"), torch.load(tmp_path / "watched.pt"))
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["run.jsonl"]
    last = reports(tmp_path)[-1]
    assert [t.name for t in last.tensors] == NAMES and last.health is Health.healthy


@pytest.mark.slow
def test_status_and_signals_of_the_command_are_passed_on(tmp_path: Path) -> None:
    assert watched(tmp_path, sys.executable, SCRIPT, "out.pt", "fails").returncode == 7
    assert watched(tmp_path, "no-such-command").returncode == 127
    (tmp_path / "train.py").write_text("")
    script = watched(tmp_path, "train.py", "--lr", "1e-5")  # on nobody's PATH
    assert script.returncode == 127 and "update-watch run python train.py --lr 1e-5" in script.stderr
    start = [sys.executable, "-m", "update_watch", "run", "--window", "8", "--journal", "ended.jsonl"]
    with subprocess.Popen(
        [*start, sys.executable, SCRIPT, "out.pt", "waits"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == "waiting\n"
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == -signal.SIGTERM
    assert list(read_journal(tmp_path / "ended.jsonl"))[-1].step == 21  # the first is seen, too


@pytest.mark.slow
def test_a_stall_may_fail_the_command(tmp_path: Path) -> None:
    run = watched(tmp_path, sys.executable, SCRIPT, "a.pt", "bf16", options=("--fail-on-stall", "--report", "r.html"))
    assert run.returncode == 3
    assert (tmp_path / "r.html").read_text().startswith("<!")
    (tmp_path / "run.jsonl").unlink()
    assert watched(tmp_path, sys.executable, SCRIPT, "b.pt", options=("--fail-on-stall",)).returncode == 0


def test_a_process_without_torch_pays_nothing_and_the_users_own_start_up_module_is_run(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sitecustomize.py").write_text("import builtins; builtins.mine = 1\n")
    code = "import sys, sitecustomize; print(mine, 'torch' in sys.modules, 'update_watch' in sys.modules)"
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path / 'mine'}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-m", "update_watch", "run", sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and run.stdout == "1 False False\n", run.stderr
    assert "no step of a torch optimizer was seen" in run.stderr


def test_a_script_that_watches_itself_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import torch, update_watch as uw; m = torch.nn.Linear(4, 4); o = torch.optim.SGD(m.parameters(), lr=0.1)\n"
        "with uw.watch(m, o):\n    m(torch.ones(4)).sum().backward(); o.step()\n"
    )
    run = watched(tmp_path, sys.executable, "-c", code)
    assert run.returncode == 0 and "no step of a torch optimizer" in run.stderr


def test_a_command_must_be_named(tmp_path: Path) -> None:
    run = watched(tmp_path)
    assert run.returncode == 2 and "name the command to run" in run.stderr


def test_processes_that_begin_together_have_journals_of_their_own(tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"
    assert free_path(journal) == journal
    assert free_path(journal) == tmp_path / f"run-{os.getpid()}.jsonl"  # though nothing is written yet
    assert free_path(tmp_path / "none" / "run.jsonl") == tmp_path / "none" / "run.jsonl"


TRAINS = """
import os, pathlib, torch
m = torch.nn.Linear(4, 4).bfloat16()
o = torch.optim.SGD(m.parameters(), lr=0.1)
for i in range(20):
    m(torch.ones(4, dtype=torch.bfloat16)).sum().backward()
    o.step()
"""


def test_files_of_the_script_are_no_journals_and_stay(tmp_path: Path) -> None:
    touch = "pathlib.Path('run-notes.jsonl').write_text('{}')\npathlib.Path('run-empty.jsonl').touch()\n"
    run = watched(tmp_path, sys.executable, "-c", f"{TRAINS}\n{touch}", options=("--report", "r.html"))
    assert run.returncode == 0 and "report: r.html" in run.stderr, run.stderr
    assert "notes" not in run.stderr
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["run-empty.jsonl", "run-notes.jsonl", "run.jsonl"]
    idle = watched(tmp_path, sys.executable, "-c", "import pathlib; pathlib.Path('run.jsonl').write_text('')")
    assert "no step of a torch optimizer was seen" in idle.stderr
    assert (tmp_path / "run.jsonl").exists()


def test_an_empty_journal_of_ours_is_none(tmp_path: Path) -> None:
    killed = f"{TRAINS.replace('range(20)', 'range(2)')}\nos.kill(os.getpid(), 9)\n"
    run = watched(tmp_path, sys.executable, "-c", killed)
    assert run.returncode == -signal.SIGKILL
    assert "training ended before anything was kept" in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_journal_that_cannot_be_written_costs_the_training_nothing_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = f"{TRAINS}\nprint('sum', float(m.weight.float().sum()))"
    alone = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.manual_seed(0)\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    options = ("--journal", "file/run.jsonl")
    run = watched(tmp_path, sys.executable, "-c", f"import torch; torch.manual_seed(0)\n{code}", options=options)
    assert run.returncode == 0 and run.stdout == alone.stdout
    assert "is tried again with every window" in run.stderr and "Traceback" not in run.stderr
    assert "could not be handed to Journal" in run.stderr and "or it could not be written" in run.stderr


def test_models_of_two_threads_are_watched_and_none_is_trained_unseen(tmp_path: Path) -> None:
    code = """
import threading, torch
torch.set_num_threads(1)
models = [torch.nn.Linear(4, 4).bfloat16() for _ in range(2)]
ready = threading.Barrier(2)
def train(m):
    o = torch.optim.SGD(m.parameters(), lr=0.1)
    ready.wait()
    for i in range(20):
        m(torch.ones(4, dtype=torch.bfloat16)).sum().backward()
        o.step()
threads = [threading.Thread(target=train, args=(m,)) for m in models]
[t.start() for t in threads]
[t.join() for t in threads]
"""
    run = watched(tmp_path, sys.executable, "-c", code)
    assert run.returncode == 0 and "rror" not in run.stderr, run.stderr
    journals = sorted(tmp_path.glob("*.jsonl"))
    assert [one.name for one in journals] == ["run-Linear2.jsonl", "run.jsonl"]
    assert [list(read_journal(one))[-1].step for one in journals] == [20, 20]  # the first step of both is seen


def test_what_forked_processes_train_is_watched_also_the_model_of_their_parent(tmp_path: Path) -> None:
    code = f"""
import multiprocessing
{TRAINS.replace("range(20)", "range(1)")}
def train(optimizer):
    for i in range(20):
        m(torch.ones(4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
fork = multiprocessing.get_context("fork")
workers = [fork.Process(target=train, args=(one,)) for one in (o, torch.optim.SGD(m.parameters(), lr=0.1))]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
"""
    run = watched(tmp_path, sys.executable, "-c", code)
    assert run.returncode == 0 and "forked" not in run.stderr, run.stderr
    journals = sorted(tmp_path.glob("*.jsonl"))
    assert sorted(list(read_journal(one))[-1].step for one in journals) == [1, 20, 20]
    assert all(one.stem.removeprefix("run-").isdecimal() for one in journals if one.name != "run.jsonl")


def test_the_status_is_that_of_the_command_where_nothing_can_be_told(tmp_path: Path) -> None:
    run = f"{sys.executable} -m update_watch run --journal run.jsonl {sys.executable} -c '{TRAINS}'"
    for where in ("2>&-", ">&- 2>&-", "2>/dev/full"):
        done = subprocess.run(f"{run} {where}", shell=True, cwd=tmp_path, env=ENVIRONMENT, timeout=240, check=False)
        assert done.returncode == 0, where
        (tmp_path / "run.jsonl").unlink()


def test_a_wandb_run_that_begins_behind_the_training_is_written_to(tmp_path: Path) -> None:
    begins = "import wandb; wandb.init(mode='offline', settings=wandb.Settings(console='off', x_disable_stats=True))"
    waits = "while not pathlib.Path('run.jsonl').stat().st_size: time.sleep(0.1)"  # for the first window
    moments = f"    if i == 4:\n        {begins}\n    if i == 17:\n        {waits}\n        time.sleep(1)"
    code = "import time\n" + TRAINS.replace("    o.step()", f"    o.step()\n{moments}")
    run = watched(tmp_path, sys.executable, "-c", code, options=("--wandb",))
    assert run.returncode == 0, run.stderr
    (folder,) = tmp_path.glob("wandb/offline-run-*/files")
    rows = OfflineRun(SimpleNamespace(dir=folder)).history
    steps = [row["trainer/global_step"] for row in rows if "update_watch/efficiency" in row]
    assert steps == [r.step for r in reports(tmp_path)] == [16, 20]


@pytest.mark.parametrize("how", ["finished", "with"])
def test_a_wandb_run_that_the_script_finishes_has_the_last_window(how: str, tmp_path: Path) -> None:
    begins = "wandb.init(mode='offline', settings=wandb.Settings(console='off', x_disable_stats=True))"
    before, _, loop = TRAINS.partition("for i in")
    loop = f"for i in{loop}".replace("range(20)", "range(10)")  # shorter than a window
    if how == "with":
        code = f"import wandb\n{before}\nwith {begins} as run:\n" + textwrap.indent(loop, "    ")
    else:
        code = f"import wandb\n{before}\n{begins}\n{loop}\nwandb.finish()"
    run = watched(tmp_path, sys.executable, "-c", code, options=("--wandb",))
    assert run.returncode == 0 and "takes no more data" not in run.stderr, run.stderr
    (folder,) = tmp_path.glob("wandb/offline-run-*/files")
    found = OfflineRun(SimpleNamespace(dir=folder))
    assert [row["trainer/global_step"] for row in found.history if "update_watch/efficiency" in row] == [10]
    assert found.summary["update_watch/health"] == "healthy"


def test_a_script_that_watches_itself_later_on_is_told_who_else_does(tmp_path: Path) -> None:
    code = f"import update_watch as uw\n{TRAINS}\nwith uw.watch(m, o):\n    o.step()"
    run = watched(tmp_path, sys.executable, "-c", code)
    assert run.returncode == 0, run.stderr
    assert "this SGD is watched already, by `update-watch run`: " in run.stderr


def test_a_process_that_outlives_the_command_leaves_no_note(tmp_path: Path) -> None:
    noted = claims.begin()
    assert noted
    claims.note(noted, tmp_path / "run.jsonl")
    assert claims.end(noted, tmp_path / "run.jsonl") == ([], 1)
    claims.note(noted, tmp_path / "later.jsonl")
    assert not Path(noted).exists()


def test_a_device_is_no_journal(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # as /dev/null: it was removed, being empty
    run = watched(tmp_path, sys.executable, "-c", TRAINS, options=("--journal", str(pipe)))
    assert run.returncode == 2 and "pipe is no file, name one" in run.stderr
    assert pipe.exists()
