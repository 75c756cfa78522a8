"""What comes from files is never run, what goes into files holds no secret, and no name of a run becomes markup."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import update_watch as uw
from tests.support.watch_nets import Net, train
from update_watch.checkpoints.files import CheckpointError, read_tensors
from update_watch.dashboards.journal import Journal, JournalError, read_journal

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("update_watch", "callbacks", "dashboards")
SECRET = "0123456789abcdef0123456789abcdef01234567"  # as long as an API key of W&B
OTHER_SECRET = "hunter2-of-the-environment"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_bomb_goes_off_when_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trace")))
    assert (tmp_path / "trace").is_dir()


def test_a_pickle_in_place_of_a_journal_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "trace")) + b"\n")
    with pytest.raises(JournalError, match="is not an update-watch journal"):
        list(read_journal(path))
    with pytest.raises(JournalError, match="is not an update-watch journal"):
        Journal(path)(uw.Report(1, 1, uw.Health.healthy, "", ()))
    assert not (tmp_path / "trace").exists()


def test_a_pickle_in_place_of_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    for name, write in (
        ("torch.pt", torch.save),
        ("plain.pt", lambda x, p: p.write_bytes(pickle.dumps(x, protocol=2))),
    ):
        write({"w": torch.ones(2), "bomb": Bomb(tmp_path / "trace")}, tmp_path / name)
        with pytest.raises(CheckpointError, match="could run code"):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "trace").exists()


def test_the_watchs_state_is_plain_data_all_through() -> None:
    model = Net(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with uw.watch(model, optimizer, window=8, averages={"ema": Net(torch.bfloat16)}) as watch:
        train(model, optimizer, 24)
        watch.flush()
        state = watch.state_dict()

    def check(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None)), type(value)
        for item in value.items() if type(value) is dict else value if type(value) is list else ():
            for part in item if type(item) is tuple else (item,):
                check(part)

    check(state)
    assert json.loads(json.dumps(state)) == state


def test_no_code_of_ours_unpickles_evaluates_or_opens_a_shell() -> None:
    """`torch.load` is allowed with `weights_only=True` alone."""
    forbidden = {"pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "os.system", "os.popen"}
    forbidden |= {"marshal.loads", "shelve.open", "joblib.load", "yaml.load", "dill.loads", "numpy.load", "np.load"}
    loads = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name, place = ast.unparse(node.func), f"{path.relative_to(ROOT)}:{node.lineno}"
                words = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert name not in forbidden, place
                assert words.get("shell") != "True", place
                if name == "torch.load":
                    loads.append(place)
                    assert words.get("weights_only") == "True", place
    assert len(loads) == 1 and loads[0].startswith("update_watch/checkpoints/files.py:")


# --- markup ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_names_of_a_hostile_model_are_text_in_the_report(tmp_path: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    assert jinja2
    pytest.importorskip("altair")
    from update_watch.dashboards.report.html import write_report

    hostile = [
        '</script><script>alert("x")</script>',
        "<img src=x onerror=alert(1)>",
        "{{ 7 * 7 }}",
        "']});alert(1);//",
    ]
    params = [torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in hostile]
    optimizer = torch.optim.AdamW(params, lr=1e-5)
    path = tmp_path / "j.jsonl"
    with uw.watch(
        zip(hostile, params, strict=True), optimizer, window=8, sinks=[Journal(path, run={"name": hostile[0]})]
    ):
        for n in range(32):
            for i, p in enumerate(params):
                p.grad = torch.randn(64, generator=torch.Generator().manual_seed(9 * n + i)).to(torch.bfloat16)
            optimizer.step()
    write_report([path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "stalled" in page and "alert(1)" in page  # the names are there
    assert "<script>alert" not in page and "<img src=x" not in page and "</script><script>a" not in page
    assert "{{ 7 * 7 }}" in page  # as it is: not a template of ours


# --- secrets ---------------------------------------------------------------------------------------------

RUN = """
import logging, sys, warnings
from pathlib import Path
import torch, wandb
import update_watch as uw
from update_watch.dashboards import Journal, WandbSink
from update_watch.dashboards.report.html import write_report

logging.basicConfig(level=logging.DEBUG)
folder = Path(sys.argv[1])
torch.set_num_threads(1)
run = wandb.init(mode="offline", project="p", dir=str(folder), settings=wandb.Settings(console="off", silent=True))
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8)).to(torch.bfloat16)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

def failing(report):
    raise OSError("cannot reach the server")

def step(n):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16)
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    optimizer.step()

sink = WandbSink(run)
sink.describe({"audit": uw.audit(model, optimizer).to_dict()})
with uw.watch(model, optimizer, window=8, sinks=[Journal(folder / "j.jsonl"), sink, failing]) as watch:
    for n in range(32):
        step(n)
    watch.flush()
    torch.save(watch.state_dict(), folder / "state.pt")
    watch._tap._fail(RuntimeError("an error of ours"))
    step(33)
write_report([folder / "j.jsonl"], folder / "report.html")
run.finish()
"""


@pytest.mark.slow
def test_no_secret_of_the_environment_gets_into_journal_report_state_wandb_run_or_logs(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("altair")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WANDB_API_KEY": SECRET,
        "HF_TOKEN": OTHER_SECRET,
        "AWS_SECRET_ACCESS_KEY": OTHER_SECRET,
        "WANDB_ERROR_REPORTING": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "STALLED" in done.stderr and "cannot reach the server" in done.stderr and "an error of ours" in done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"j.jsonl", "report.html", "state.pt"} <= {path.name for path in files}
    assert any(
        path.suffix == ".wandb" and b"exp_avg_sq" in path.read_bytes() for path in files
    )  # texts can be read in it
    for secret in (SECRET, OTHER_SECRET):
        assert secret not in done.stdout + done.stderr
        for path in files:
            assert secret.encode() not in path.read_bytes(), path
    for name in ("j.jsonl", "report.html", "state.pt"):  # nor where it ran
        assert str(tmp_path).encode() not in (tmp_path / name).read_bytes(), name
