"""The command line: what a person types, what comes back, and with which exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from update_watch import __version__
from update_watch.cli import main
from update_watch.dashboards.outputs import signed_png

PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
)  # one white pixel
COMMAND = [sys.executable, "-m", "update_watch.cli"]

FACTORY = """
import torch

def make():
    model = torch.nn.LayerNorm(64, bias=False).to(torch.bfloat16)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

def three():
    model, optimizer = make()
    return model, optimizer, {"ema": torch.optim.swa_utils.AveragedModel(model)}

def one():
    return make()[0]

def nothing_to_audit():
    return 1, 2

def interrupted():
    raise KeyboardInterrupt

def broken():
    raise ZeroDivisionError("mine")

number = 3
"""


@pytest.fixture(autouse=True)
def _import_path_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command may add to it: its process ends with it


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    path = tmp_path / "training_setup.py"
    path.write_text(FACTORY)
    return path


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    weights = {f"w{i}": torch.ones(4, dtype=torch.bfloat16) for i in range(3)}
    torch.save(weights, tmp_path / "a.pt")
    torch.save({**weights, "w0": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "b.pt")
    return tmp_path / "a.pt", tmp_path / "b.pt"


# --- arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nonsense", "update-watch: error: argument command: invalid choice: 'nonsense'"),
        ("demo --steps 0", "update-watch demo: error: argument --steps: '0' is not a whole number of 1 or more"),
        ("demo --steps 1.5", "update-watch demo: error: argument --steps: '1.5' is not a whole number of 1 or more"),
        ("demo --lr fast", "update-watch demo: error: argument --lr: 'fast' is not a positive number"),
        ("demo --lr nan", "update-watch demo: error: argument --lr: 'nan' is not a positive number"),
        ("demo --lr -1", "update-watch demo: error: argument --lr: '-1' is not a positive number"),
        ("demo --precision fp8", "update-watch demo: error: argument --precision: invalid choice: 'fp8'"),
        ("demo --seed -1", "update-watch demo: error: argument --seed: '-1' is not a whole number of 0 or more"),
        (f"demo --seed {2**63}", f"update-watch demo: error: --seed {2**63}: a number from 0 to 2**63 - 1 is needed"),
        ("demo --wandb maybe", "update-watch demo: error: argument --wandb: invalid choice: 'maybe'"),
        ("report .", "update-watch report: error: .: no journal in this folder or below"),
        ("report nowhere.jsonl", "update-watch report: error: nowhere.jsonl: no such file"),
        ("top nowhere.jsonl", "update-watch top: error: nowhere.jsonl: no such file"),
        ("top .", "update-watch top: error: .: no journal in this folder or below"),
        ("diff a.pt b.pt", "update-watch diff: error: a.pt: no such file"),
        ("diff a.pt", "update-watch diff: error: the following arguments are required: SECOND"),
        ("audit x", "update-watch audit: error: 'x': expected module:function or FILE.py:function"),
        ("audit :f", "update-watch audit: error: ':f': expected module:function or FILE.py:function"),
        ("audit nowhere:f", "update-watch audit: error: nowhere:f: there is no module nowhere here"),
        ("audit json.nowhere:f", "update-watch audit: error: json.nowhere:f: there is no module json.nowhere here"),
        ("audit json:nowhere", "update-watch audit: error: json:nowhere: json has no function nowhere"),
        ("audit nowhere.py:f", "update-watch audit: error: nowhere.py: no such file"),
        ("workspace --entity a", "update-watch workspace: error: the following arguments are required: --project"),
    ],
)
def test_wrong_arguments_get_one_line_and_status_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_and_version_end_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"update-watch {__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert main([]) == 0 and capsys.readouterr().out == text
    for command in ("demo", "report", "top", "audit", "diff", "workspace", "automations"):
        assert f"    {command} " in text or f"    {command}\n" in text
        assert main([command, "--help"]) == 0


# --- audit ----------------------------------------------------------------------------------------------


def test_audit_shows_the_table_for_what_a_function_in_a_file_returns(
    factory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", f"{factory}:make"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("what accumulates")
    assert "1 of 1 BF16 weight tensor is expected to stall at learning rate 0.001: weight." in text


def test_audit_takes_a_module_of_the_current_folder_and_averages(
    factory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(factory.parent)
    monkeypatch.delitem(sys.modules, "training_setup", raising=False)
    assert main(["audit", "training_setup:three", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["health"] == "stalled"
    assert [row["component"] for row in data["rows"]] == [
        "weights", "state step", "state exp_avg", "state exp_avg_sq", "gradients", "average ema",
    ]  # fmt: skip


def test_a_file_named_like_a_library_does_not_take_its_place(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = factory.rename(factory.with_name("statistics.py"))
    import statistics

    assert main(["audit", f"{path}:make"]) == 0
    assert sys.modules["statistics"] is statistics


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one", "returned LayerNorm; it must return (model, optimizer) or (model, optimizer, averages)"),
        ("nothing_to_audit", "int has no torch optimizer"),
        ("number", "has no function number"),
    ],
)
def test_a_function_that_returns_something_else_is_told_what_is_expected(
    name: str, message: str, factory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", f"{factory}:{name}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_error_of_the_users_own_code_keeps_its_traceback(factory: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="mine"):
        main(["audit", f"{factory}:broken"])


# --- diff -----------------------------------------------------------------------------------------------


def test_diff_names_what_never_moved(checkpoints: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", *map(str, checkpoints)]) == 0
    text = capsys.readouterr().out
    assert "- 2 of 3 tensors never moved: w1, w2." in text
    assert main(["diff", *map(str, checkpoints), "--limit", "1"]) == 0
    assert "... and 2 more, less alike" in capsys.readouterr().out
    assert main(["diff", *map(str, checkpoints), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["never_moved"] == ["w1", "w2"]


def test_a_file_that_is_no_checkpoint_gets_one_line_and_status_2(
    checkpoints: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints[1].write_text("hello")
    assert main(["diff", *map(str, checkpoints)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"update-watch diff: error: {checkpoints[1]}: ")
    assert error.count("\n") == 1


# --- journals -------------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    from update_watch.dashboards.journal.journal import Journal
    from update_watch.report import Cause, Health, Report, TensorReport

    tensor = TensorReport("norm.weight", Health.stalled, Cause.weight_rounding, "Lost.", numel=8, efficiency=0.0)
    sink = Journal(tmp_path / "run.jsonl")
    for step in (8, 16):
        sink(Report(step, 8, Health.stalled, "1 of 1 tensors is stalled.", (tensor,)))
    return tmp_path / "run.jsonl"


def test_report_writes_the_file_and_prints_its_path(
    journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("altair")
    out = tmp_path / "page.html"
    assert main(["report", str(journal), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "norm.weight" in out.read_text()


def test_report_refuses_what_is_no_journal_and_a_folder_as_its_output(
    journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(journal), "-o", str(tmp_path)]) == 2
    assert f"--output {tmp_path} is a folder; name a file in it" in capsys.readouterr().err
    journal.write_text("hello\n")
    assert main(["report", str(journal), "-o", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("option", ["--output", "--png"])
@pytest.mark.parametrize("spelling", ["same", "relative", "dotted", "link", "hard link", "link to it"])
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_report_never_writes_over_a_journal_it_reads(
    option: str,
    spelling: str,
    force: list[str],
    journal: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(journal.parent)
    other = journal.with_name("second.jsonl")
    other.write_bytes(journal.read_bytes())
    spelled = {"same": str(journal), "relative": journal.name, "dotted": f"../{journal.parent.name}/{journal.name}"}
    read, written = str(journal), spelled.get(spelling, "again.jsonl")
    if spelling == "link":
        Path("again.jsonl").symlink_to(journal)
    elif spelling == "hard link":
        os.link(journal, "again.jsonl")
    elif spelling == "link to it":
        Path("again.jsonl").symlink_to(journal)
        read, written = written, read
    before = journal.read_bytes()
    assert main(["report", str(other), read, option, written, *force]) == 2
    error = capsys.readouterr().err
    assert f"{option} {written} is the file that is read ({read}); name another file, nothing was written" in error
    assert error.count("\n") == 1
    assert journal.read_bytes() == before and not Path("report.html").exists()
    assert Path("again.jsonl").is_symlink() == spelling.startswith("link")


@pytest.mark.parametrize("option", ["--output", "--png"])
def test_report_writes_over_nothing_that_is_no_report_without_being_told(
    option: str, journal: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("altair")
    monkeypatch.chdir(journal.parent)
    monkeypatch.setattr(
        "update_watch.dashboards.report.html.write_picture", lambda page, png: png.write_bytes(signed_png(PICTURE))
    )
    others = {"model.pt": b"PK\x03\x04", "other.jsonl": journal.read_bytes(), "page.htm": b"<html>", "a.png": PICTURE}
    for name, content in others.items():
        Path(name).write_bytes(content)
        assert main(["report", "run.jsonl", option, name]) == 2
        assert f"{option} {name} is there already and is no " in capsys.readouterr().err
        assert Path(name).read_bytes() == content and not Path("report.html").exists()
    assert main(["report", "run.jsonl", option, "model.pt", "--force"]) == 0
    assert main(["report", "run.jsonl", option, "model.pt"]) == 0  # it is ours now
    assert Path("other.jsonl").read_bytes() == others["other.jsonl"]
    Path("report.html").unlink(missing_ok=True)
    assert main(["report", "run.jsonl", "-o", "one.html", "--png", "./one.html", "--force"]) == 2
    assert not Path("one.html").exists()


@pytest.mark.parametrize("name", ["bf16.jsonl", "fp32.jsonl", "report.html"])
def test_a_demo_replaces_no_file_that_no_demo_made(
    name: str, journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (b"mine", journal.read_bytes()):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
        assert main(["demo", "--steps", "1", "--wandb", "disabled", "--out", str(tmp_path / "out")]) == 2
        assert name in capsys.readouterr().err
        assert [(p.name, p.read_bytes()) for p in (tmp_path / "out").iterdir()] == [(name, content)]


def test_top_shows_the_last_window_once(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert main(["top", str(journal), "--once"]) == 0
    assert "norm.weight" in capsys.readouterr().out


# --- W&B ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["workspace", "automations"])
def test_a_dry_run_prints_json_without_a_network(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    assert main([command, "--entity", "me", "--project", "mine", "--dry-run"]) == 0
    assert "mine" in json.dumps(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(("command", "error"), [("workspace", "WorkspaceError"), ("automations", "AutomationError")])
def test_a_refusal_of_the_server_is_one_line_and_status_1(
    command: str, error: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(f"update_watch.dashboards.{command}")

    def refuse(*_: Any) -> str:
        raise getattr(module, error)("W&B says\nno.")

    monkeypatch.setattr(module, "run", refuse)
    assert main([command, "--entity", "me", "--project", "mine"]) == 1
    assert capsys.readouterr().err == f"update-watch {command}: error: W&B says no.\n"


def test_a_missing_package_is_one_line_with_the_remedy(
    journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(journal), "-o", str(tmp_path / "page.html")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("update-watch report: error: ")
    assert "pip install 'update-watch[report]'" in error
    assert error.count("\n") == 1


# --- ends -----------------------------------------------------------------------------------------------


def test_an_interrupt_is_quiet(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", f"{factory}:interrupted"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet(checkpoints: tuple[Path, Path]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    try:
        done = subprocess.run(
            [*COMMAND, "diff", *map(str, checkpoints)],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            env=buffered,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_optional_packages_are_imported_only_by_the_commands_that_need_them() -> None:
    heavy = "{'torch', 'numpy', 'rich', 'wandb', 'altair', 'jinja2', 'lightning', 'transformers', 'torch._dynamo', 'safetensors'}"
    code = f"import sys, update_watch.cli as c; c.main(['--version']); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[1:] == ["[]"]


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "update_watch", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"update-watch {__version__}\n"
