"""The demo: what it promises to show, that it shows it again, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from update_watch.cli import main
from update_watch.demo import demo
from update_watch.demo.model import CONTEXT, GPT, batch, text
from update_watch.demo.screen import PlainScreen, open_screen, verdict
from update_watch.demo.training import MASTERS, Settings, Training, pieces, trainings
from update_watch.report import Cause, Health, Report, TensorReport

NORMS = [
    "blocks.0.norm1.weight",
    "blocks.0.norm2.weight",
    "blocks.1.norm1.weight",
    "blocks.1.norm2.weight",
    "norm.weight",
]


class Lines:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tables: list[Report] = []
        self.steps: dict[int, int] = {}
        self.names: Sequence[str] = ()

    def line(self, text: str = "") -> None:
        self.lines.append(text)

    @contextmanager
    def progress(self, names: Sequence[str], total: int) -> Iterator[None]:
        self.names = names
        yield

    def advance(self, row: int, done: int, text: str) -> None:
        self.steps[row] = done

    def table(self, report: Report) -> None:
        self.tables.append(report)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Lines, dict[str, list[Report]]]:
    """A run of 49 steps, seen by several tests; the last window is not full."""
    settings = Settings(steps=49, out=tmp_path_factory.mktemp("demo") / "out", wandb="disabled")
    screen = Lines()
    return settings, screen, demo.run(settings, screen)


def healths(report: Report) -> dict[str, Health]:
    return {tensor.name: tensor.health for tensor in report.tensors}


# --- what it shows ----------------------------------------------------------------------------------------


def test_the_norms_stall_in_bf16_and_with_fp32_masters_everything_is_healthy(
    short: tuple[Settings, Lines, dict[str, list[Report]]],
) -> None:
    _, screen, reports = short
    stalled = [t for t in reports["bf16"][-1].tensors if t.health is Health.stalled]
    assert sorted(t.name for t in stalled) == NORMS
    assert {t.cause for t in stalled} == {Cause.weight_rounding}
    assert all(t.efficiency == 0.0 and t.lost_fraction == 1.0 for t in stalled)
    assert set(healths(reports[MASTERS][-1]).values()) == {Health.healthy}
    assert screen.tables == [reports["bf16"][-1]]
    assert screen.names == ["BF16 weights", "FP32 masters"]
    assert screen.steps == {0: 49, 1: 49}
    assert reports["bf16"][-1].step == 49


def test_the_audit_has_said_so_before_the_first_step(short: tuple[Settings, Lines, dict[str, list[Report]]]) -> None:
    _, screen, _ = short
    assert screen.lines[0].startswith(
        "Before the first step the audit warns: 5 of 16 BF16 weight tensors are expected to stall at learning rate"
        f" 0.001: {', '.join(NORMS)}."
    )


def test_losses_cost_and_alert_are_told(short: tuple[Settings, Lines, dict[str, list[Report]]]) -> None:
    _, screen, reports = short
    alerts = [alert for report in reports["bf16"] for alert in report.alerts]
    assert alerts, [report.headline for report in reports["bf16"]]
    for alert in alerts:
        assert f"step {alert.step}: BF16 weights: {alert.level}: {alert.title}" in screen.lines
    early = [next((r for r in found if r.forecast is not None and r.step >= 10), None) for found in reports.values()]
    for name, report in zip(screen.names, early, strict=True):
        assert report is not None and report.forecast is not None
        assert screen.lines.count(f"step {report.step}: {name}: {report.forecast.headline}") == 1
    (losses,) = [line for line in screen.lines if line.startswith("Loss (nats per byte) on text held back: ")]
    assert " with BF16 weights, " in losses
    assert " with FP32 masters; " in losses
    (cost,) = [line for line in screen.lines if line.startswith("The verdict cost ")]
    known = [report.cost_ms for report in reports["bf16"] if report.cost_ms is not None]
    assert f"{sum(known) / len(known):.2g} ms" in cost


def test_journals_and_report_are_written_and_their_paths_come_last(
    short: tuple[Settings, Lines, dict[str, list[Report]]],
) -> None:
    from update_watch.dashboards.journal import read_journal

    settings, screen, reports = short
    paths = [settings.out / "bf16.jsonl", settings.out / f"{MASTERS}.jsonl"]
    assert screen.lines[-3:-1] == [f"journal: {path}" for path in paths]
    for path, seen in zip(paths, reports.values(), strict=True):
        assert [report.step for report in read_journal(path)] == [report.step for report in seen]
    page = settings.out / "report.html"
    assert screen.lines[-1] == f"report:  {page}"
    assert "blocks.0.norm1.weight" in page.read_text()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path: Path) -> None:
    def run(seed: int, name: str) -> list[Any]:
        torch.manual_seed(len(list(tmp_path.iterdir())))  # the process may have drawn any numbers before
        reports = demo.run(Settings(steps=10, seed=seed, out=tmp_path / name, wandb="disabled"), Lines())
        tensors = [t for found in reports.values() for report in found for t in report.tensors]
        return [dataclasses.asdict(t) for t in tensors]

    first = run(3, "a")
    assert run(3, "b") == first
    assert run(4, "c") != first


@pytest.mark.slow
def test_by_default_the_matrices_follow_late_and_bf16_learns_less(tmp_path: Path) -> None:
    screen = Lines()
    reports = demo.run(Settings(out=tmp_path, wandb="disabled"), screen)
    middle, end = reports["bf16"][9], reports["bf16"][-1]
    assert middle.counts["healthy"] >= 9
    assert end.counts["stalled"] >= 6  # the head has joined the norms
    assert end.counts["stalled"] + end.counts["stalling"] >= 14
    assert all(report.counts["healthy"] == 16 for report in reports[MASTERS])
    (losses,) = [line for line in screen.lines if line.startswith("Loss (nats per byte)")]
    bf16, masters = (float(part.split()[0]) for part in losses.partition("back: ")[2].partition(";")[0].split(", "))
    assert bf16 > masters + 0.02


@pytest.mark.parametrize(("precision", "names"), [("fp16", ["fp16", MASTERS]), ("fp32", ["fp32"])])
@pytest.mark.slow
def test_other_precisions_run_and_full_precision_needs_no_twin(
    precision: str, names: list[str], tmp_path: Path
) -> None:
    reports = demo.run(Settings(steps=16, precision=precision, out=tmp_path, wandb="disabled"), Lines())
    assert list(reports) == names
    for found in reports.values():
        assert found[-1].counts["broken"] == 0
        assert all(t.efficiency is not None for t in found[-1].tensors)


# --- its parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_runs_begin_with_the_same_loss_and_the_same_gradients(precision: str) -> None:
    settings = Settings(precision=precision)
    runs = trainings(settings)
    piece = pieces(settings)()
    losses = []
    for training in runs:
        loss = training.model.loss(piece)
        loss.backward()
        losses.append(loss)
    assert torch.equal(losses[0], losses[1])
    for low, full in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert low.dtype != full.dtype
        assert low.grad is not None
        assert full.grad is not None
        assert torch.equal(low.grad.float(), full.grad)


def test_the_schedule_warms_up_and_ends_at_a_tenth() -> None:
    training = trainings(Settings(steps=100))[0]
    rates = []
    for _ in range(100):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.optimizer.step()
        training.schedule.step()
    assert rates[0] == pytest.approx(2e-4)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4, rel=0.05)


def test_a_byte_is_predicted_from_those_before_it_only() -> None:
    model = GPT(torch.float32, torch.float32)
    index = torch.randint(256, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    changed = index.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 256
    before, after = model(index), model(changed)
    assert torch.allclose(before[0, :40], after[0, :40], atol=1e-6)
    assert not torch.allclose(before[0, 40:], after[0, 40:], atol=1e-6)


@pytest.mark.parametrize(("steps", "window"), [(1, 8), (9, 9), (100, 10), (1000, 50), (97, 14)])
def test_windows_fit_the_number_of_steps(steps: int, window: int) -> None:
    assert Settings(steps=steps).window == window


def test_text_held_back_is_not_trained_on() -> None:
    train, held = text()
    assert len(held) > 10_000
    assert len(train) > 15 * len(held)
    piece = batch(held, 4, torch.Generator().manual_seed(0))
    assert piece.shape == (4, CONTEXT + 1)
    assert bytes(piece[0].tolist()) in bytes(held.tolist())


def test_the_verdict_counts_the_worst_first() -> None:
    kinds = [Health.healthy, Health.stalled, Health.stalling, Health.healthy]
    report = Report(1, 1, Health.stalled, "", tuple(TensorReport(str(i), kind) for i, kind in enumerate(kinds)))
    assert verdict(report) == "1 stalled, 1 stalling, 2 healthy"
    assert verdict(None) == "first window open"


# --- arguments, ends, what is not there --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "--steps 0: at least 1 is needed"),
        ({"lr": 0.0}, "--lr 0: a positive learning rate is needed"),
        ({"precision": "fp8"}, "--precision fp8: one of bf16, fp16, fp32 is needed"),
        ({"seed": -1}, "--seed -1: a number from 0"),
        ({"wandb": "maybe"}, "--wandb maybe: one of offline, online, disabled is needed"),
    ],
)
def test_settings_that_cannot_be_used_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_the_command_runs_it_and_ends_with_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--steps", "17", "--wandb", "disabled", "--out", str(out), "--precision", "fp32"]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(f"report:  {out / 'report.html'}")
    assert (out / "fp32.jsonl").exists()


def test_a_folder_that_cannot_be_made_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--steps", "9", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"update-watch demo: error: {tmp_path / 'file'}: File exists\n"


def test_without_extras_one_line_each_says_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("rich", "wandb", "jinja2", "altair"):
        monkeypatch.setitem(sys.modules, package, None)
    screen = open_screen()
    assert isinstance(screen, PlainScreen)
    demo.run(Settings(steps=17, out=tmp_path), screen)
    printed = capsys.readouterr().out.splitlines()
    for package, extra in (("rich", "terminal"), ("wandb", "wandb"), ("HTML", "report")):
        (line,) = [line for line in printed if package in line and "pip install" in line]
        assert f"pip install 'update-watch[{extra}]'" in line
    assert any(line.split()[:2] == ["head.weight", "healthy"] or line.startswith("head.weight") for line in printed)


@pytest.mark.slow
def test_an_earlier_demo_in_the_folder_is_replaced(tmp_path: Path) -> None:
    from update_watch.dashboards.journal import read_journal

    for _ in range(2):
        demo.run(Settings(steps=17, precision="fp32", out=tmp_path, wandb="disabled"), Lines())
    assert [report.step for report in read_journal(tmp_path / "fp32.jsonl")] == [9, 17]


def test_an_interrupt_leaves_whole_journals_and_the_process_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from update_watch.dashboards.journal import read_journal

    class Interrupted(Lines):
        def advance(self, row: int, done: int, text: str) -> None:
            if done == 12:
                raise KeyboardInterrupt

    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    threads, handlers = torch.get_num_threads(), list(logging.getLogger("update_watch").handlers)
    random_state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        demo.run(Settings(steps=20, out=tmp_path, wandb="disabled"), Interrupted())
    assert [report.step for report in read_journal(tmp_path / "bf16.jsonl")] == [10, 12]
    assert asked == [1, threads]
    assert logging.getLogger("update_watch").handlers == handlers
    assert logging.getLogger("update_watch").propagate
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_step_is_the_optimizers_and_its_loss_is_kept() -> None:
    settings = Settings(steps=5)
    training: Training = trainings(settings)[1]
    before = [p.detach().clone() for p in training.model.parameters()]
    training.step(pieces(settings)())
    assert len(training.losses) == 1
    assert training.recent_loss == pytest.approx(5.55, abs=0.1)  # ln(256) for a guess
    assert all(not torch.equal(p, start) for p, start in zip(training.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in training.model.parameters())


@pytest.mark.slow
def test_an_offline_wandb_run_per_training_lies_in_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    screen = Lines()
    demo.run(Settings(steps=24, out=tmp_path), screen)
    logs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(logs) == 2
    told = [line for line in screen.lines if line.startswith("W&B: ")]
    assert [str(log.parent) in "\n".join(told) for log in logs] == [True, True]
