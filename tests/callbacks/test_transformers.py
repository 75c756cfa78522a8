"""UpdateWatch in Hugging Face's Trainer, on small models with random weights."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.lightning_models import FullComparison
from update_watch import StallExpected
from update_watch.callbacks import StalledError
from update_watch.callbacks.packed_state import packed, unpacked
from update_watch.dashboards import read_journal
from update_watch.report import Report
from update_watch.thresholds import Thresholds

transformers = pytest.importorskip("transformers", minversion="5")
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402  after importorskip

from update_watch.callbacks.transformers import UpdateWatch  # noqa: E402

FAST = Thresholds(minimum_steps=2)
LOW = 1e-6
WIDTH, BATCH = 8, 4

pytestmark = [pytest.mark.filterwarnings("ignore:.*pin_memory.*")]


class Model(nn.Module):
    """A regression whose weights lie around 1 in the norm, around 0.1 elsewhere."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 1)).to(dtype)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.net(x.to(self.net[0].weight.dtype)).float()
        return {"loss": (out - x.sum(1, keepdim=True)).pow(2).mean()}


class Watched(UpdateWatch):
    """Keeps every report, and prints nothing."""

    def __init__(self, **options: Any) -> None:
        self.reports: list[Report] = []
        super().__init__(**{"window": 4, "sinks": [self.reports.append], "print_audit": False, **options})


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Trainer]:
    def run(model: nn.Module, *callbacks: Any, steps: int = 12, resume: Any = None, **options: Any) -> Trainer:
        arguments: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "logging_steps": 4,
        }
        data = torch.randn(400 * BATCH, WIDTH, generator=torch.Generator().manual_seed(1))
        trainer = Trainer(
            model,
            TrainingArguments(**{**arguments, **options}),
            train_dataset=[{"x": row} for row in data],  # type: ignore[arg-type]
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def stalled_names(report: Report) -> set[str]:
    return {t.name for t in report.tensors if t.health == "stalled"}


def inner(trainer: Trainer) -> torch.optim.Optimizer:
    assert trainer.optimizer is not None
    found: torch.optim.Optimizer = trainer.optimizer.optimizer  # type: ignore[attr-defined]
    return found


Train = Callable[..., Trainer]


def test_reports_are_numbered_by_the_global_step_and_kept_in_the_log_history(train: Train) -> None:
    watch = Watched()
    trainer = train(Model(), watch)
    assert [(r.step, r.window) for r in watch.reports] == [(4, 4), (8, 4), (12, 4)]
    assert watch.last == watch.reports[-1]
    ours = [entry for entry in trainer.state.log_history if "update_watch/efficiency" in entry]
    assert [entry["step"] for entry in ours] == [4, 8, 12]
    assert [entry["update_watch/efficiency"] for entry in ours] == [r.efficiency for r in watch.reports]
    assert all(0.98 < entry["update_watch/efficiency"] < 1.02 for entry in ours)


def test_the_last_window_comes_before_the_summary_with_step_and_epoch_and_is_in_the_last_line(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watched(thresholds=FAST, window=6)
    trainer = train(Model(torch.bfloat16), watch, steps=20, learning_rate=LOW, logging_steps=10)
    history = trainer.state.log_history
    assert "train_loss" in history[-1] and history[-1]["step"] == 20
    ours = [entry for entry in history if "update_watch/efficiency" in entry]
    assert [entry["step"] for entry in ours] == [6, 12, 18, 20]
    assert all(0 < entry["epoch"] < 1 for entry in ours)
    assert watch.last is not None and (watch.last.step, watch.last.window) == (20, 2)
    last = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line][-1]
    assert f"'efficiency': '{round(watch.last.efficiency, 4)}'" in last  # type: ignore[arg-type]


def test_a_loop_that_is_stopped_early_reports_its_last_step(train: Train) -> None:
    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 7

    watch = Watched()
    trainer = train(Model(), watch, Stop(), steps=20)
    assert [(r.step, r.window) for r in watch.reports] == [(4, 4), (7, 3)]
    assert trainer.state.global_step == 7


def test_every_tracker_of_the_trainer_gets_the_numbers(train: Train, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    watch = Watched()
    train(Model(), watch, report_to="tensorboard")
    (folder,) = {path.parent for path in (tmp_path / "tb").rglob("events.out.*")}
    events = EventAccumulator(str(folder)).Reload()
    scalars = events.Scalars("train/update_watch/efficiency")
    assert [s.step for s in scalars] == [4, 8, 12]
    assert [s.value for s in scalars] == pytest.approx([r.efficiency for r in watch.reports])


def test_a_tracker_that_fails_costs_its_numbers_alone(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(TrainerCallback):  # type: ignore[misc]
        def on_log(self, *_: Any, logs: Any, **__: Any) -> None:
            if any(key.startswith("update_watch/") for key in logs):
                raise RuntimeError("planted")

    Failing.__module__ = "transformers.integrations.planted"
    watch = Watched()
    train(Model(), Failing(), watch)
    assert len(watch.reports) == 3
    assert caplog.text.count("Failing takes none of its numbers") == 1


def test_gradient_accumulation_counts_updates(train: Train) -> None:
    watch = Watched()
    train(Model(), watch, steps=8, gradient_accumulation_steps=3)
    assert [(r.step, r.window) for r in watch.reports] == [(4, 4), (8, 4)]


class Full(TrainerCallback):  # type: ignore[misc]
    """Compares every element of every step."""

    def __init__(self) -> None:
        self.comparison = FullComparison()

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.comparison.before(optimizer.optimizer)

    def on_optimizer_step(self, *_: Any, optimizer: Any, model: Any, **__: Any) -> None:
        self.comparison.after(optimizer.optimizer, {id(p): name for name, p in model.named_parameters()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_report_equals_the_full_comparison_and_training_is_bit_identical(
    train: Train, dtype: torch.dtype, accumulate: int
) -> None:
    states = []
    watch, full = Watched(window=128), Full()
    for callbacks in ([], [watch, full]):
        model = Model(dtype)
        optimizer = inner(train(model, *callbacks, gradient_accumulation_steps=accumulate))
        tensors = [torch.as_tensor(v) for state in optimizer.state.values() for v in state.values()]
        states.append([*model.state_dict().values(), *tensors, torch.get_rng_state()])
    assert len(states[0]) == len(states[1]) > 18
    assert all(map(torch.equal, *states))

    (report,) = watch.reports
    assert {t.name for t in report.tensors} == set(full.comparison.sums) and len(report.tensors) == 6
    for t in report.tensors:
        assert t.efficiency == pytest.approx(full.comparison.efficiency(t.name), abs=0.03), t.name
        assert t.lost_fraction == pytest.approx(full.comparison.lost_fraction(t.name), abs=0.03), t.name
    assert (min(t.efficiency or 0.0 for t in report.tensors) < 0.5) == (dtype == torch.bfloat16)


def test_nothing_stays_attached_after_training(train: Train) -> None:
    optimizer = inner(train(Model(), Watched()))
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.slow
def test_training_twice_is_watched_twice_and_once_each(train: Train) -> None:
    watch = Watched()
    model = Model()
    train(model, watch)
    train(model, watch)
    assert [r.window for r in watch.reports] == [4] * 6


def test_a_scheduler_and_clipping_are_seen_as_they_are(train: Train) -> None:
    watch = Watched(window=12)
    train(Model(), watch, lr_scheduler_type="linear", max_grad_norm=1e-3)
    (report,) = watch.reports
    assert report.efficiency == pytest.approx(1.0, abs=0.02)
    assert report.tensors and all(t.lr == pytest.approx(1e-3 / 12) for t in report.tensors)


# --- state ---------------------------------------------------------------------------------------------


def test_the_trainers_schedule_gives_a_forecast_and_a_constant_one_none_to_fear(train: Train) -> None:
    watch, constant = Watched(), Watched()
    train(Model(torch.bfloat16), watch, lr_scheduler_type="linear", warmup_steps=2)
    train(Model(torch.bfloat16), constant)
    first = watch.reports[0].forecast
    assert first is not None and (first.step, first.until) == (4, 12)
    ahead = constant.reports[0].forecast
    assert ahead is not None and ahead.from_step is None
    lr = 1e-3 * (12 - 4) / 10  # warm-up of 2, then linear to 0
    for t in watch.reports[0].tensors:
        assert t.lr == pytest.approx(lr, rel=0.15)


@pytest.mark.slow
def test_state_goes_through_the_trainers_checkpoint(train: Train, tmp_path: Path) -> None:
    first = Watched(thresholds=FAST)
    train(Model(torch.bfloat16), first, learning_rate=LOW, save_strategy="steps", save_steps=12)
    told = {name for report in first.reports for alert in report.alerts for name in alert.tensors}
    assert told
    path = tmp_path / "run" / "checkpoint-12"
    stored = json.loads((path / "trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["Watched"]["attributes"]["memory"]
    assert any("update_watch/efficiency" in entry for entry in stored["log_history"])

    resumed = Watched(thresholds=FAST)
    train(Model(torch.bfloat16), resumed, steps=24, learning_rate=LOW, resume=str(path))
    assert [r.step for r in resumed.reports] == [16, 20, 24]
    again = [a for r in resumed.reports for a in r.alerts if a.level == "ERROR" and set(a.tensors) <= told]
    assert stalled_names(resumed.reports[-1]) and not again


@pytest.mark.slow
def test_what_checkpoints_hold_is_a_few_kilobytes_for_hundreds_of_tensors(train: Train, tmp_path: Path) -> None:
    class Many(Model):
        def __init__(self) -> None:
            super().__init__(torch.bfloat16)
            self.scales = nn.ParameterList(nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(600))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            loss = super().forward(x)["loss"]
            return {"loss": loss * torch.stack([p.float().mean() for p in self.scales]).mean()}

    watch = Watched(thresholds=FAST)
    train(Many(), watch, learning_rate=LOW, save_strategy="steps", save_steps=12)
    assert len(stalled_names(watch.reports[-1])) > 250
    text = (tmp_path / "run" / "checkpoint-12" / "trainer_state.json").read_text()
    held = json.loads(text)["stateful_callbacks"]["Watched"]
    assert len(json.dumps(held)) < 16_000
    assert len(unpacked(held["attributes"]["memory"])["diagnosis"]) > 0


def test_a_run_begun_without_it_can_be_resumed_and_saved_with_it(train: Train, tmp_path: Path) -> None:
    train(Model(), save_strategy="steps", save_steps=12)
    watch = Watched()
    train(Model(), watch, steps=16, resume=str(tmp_path / "run" / "checkpoint-12"), save_strategy="steps", save_steps=4)
    assert [r.step for r in watch.reports] == [16]
    assert (tmp_path / "run" / "checkpoint-16" / "trainer_state.json").exists()


@pytest.mark.slow
def test_the_trainer_can_restore_the_callback_itself(train: Train, tmp_path: Path) -> None:
    train(Model(), UpdateWatch(window=6, on_stall="stop"), save_strategy="steps", save_steps=12)
    trainer = train(
        Model(),
        UpdateWatch(window=3),
        steps=24,
        resume=str(tmp_path / "run" / "checkpoint-12"),
        restore_callback_states_from_checkpoint=True,
    )
    (restored,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, UpdateWatch)]
    assert restored._options.window == 6 and restored._options.on_stall == "stop"
    assert restored.last is not None and restored.last.step == 24


def test_a_callback_that_the_trainer_makes_anew_has_all_that_a_checkpoint_can_hold_and_tells_what_it_cannot(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = UpdateWatch(window=6, journal=tmp_path / "mine.jsonl", include=("net*",), schedule=None, on_audit="raise")
    assert given.state()["attributes"]["left_out"] == []
    made = UpdateWatch(**json.loads(json.dumps(given.state()))["args"])
    assert vars(made._options) == {
        **vars(given._options),
        "journal": str(tmp_path / "mine.jsonl"),
        "include": ["net*"],
    }
    first = Watched(thresholds=FAST, on_stall=lambda report: False, journal=None)
    train(Model(), first, save_strategy="steps", save_steps=12)
    trainer = train(
        Model(),
        Watched(),
        steps=16,
        resume=str(tmp_path / "run" / "checkpoint-12"),
        restore_callback_states_from_checkpoint=True,
    )
    (restored,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, UpdateWatch)]
    assert restored.left_out == ["sinks", "thresholds", "on_stall"] and restored._options.journal is None
    assert "made anew from the checkpoint, without its sinks, thresholds, on_stall: none can hold them" in caplog.text


def test_one_that_is_added_when_training_has_begun_says_so_once(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    watch = Watched()

    class Late(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > 2:
                watch.on_step_begin(args, state, control)  # as the Trainer calls what was added to it

    train(Model(), Late())
    assert caplog.text.count("added when training had begun") == 1 and watch.last is None
    train(Model(), Watched())
    assert caplog.text.count("added when training had begun") == 1


# --- what it tells ----------------------------------------------------------------------------------------


def test_printed_lines_have_efficiency_and_stalled(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watched(thresholds=FAST)
    train(Model(torch.bfloat16), watch, steps=24, learning_rate=LOW)
    lines = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert len(lines) == 6
    assert "'efficiency': " in lines[-1] and f"'stalled': {len(stalled_names(watch.reports[-1]))}" in lines[-1]


def test_printed_lines_stay_as_they_are_without_the_entry(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(Model(), Watched(progress_bar=False))
    lines = capsys.readouterr().out.splitlines()
    assert any("'loss'" in line for line in lines)
    assert not any("efficiency" in line for line in lines if not line.startswith("update-watch:"))


def test_audit_is_printed_once(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(Model(), UpdateWatch(window=4, journal=None))
    lines = [line for line in capsys.readouterr().out.splitlines() if "update-watch" in line]
    assert lines == ["update-watch: 6 tensors watched; nothing in their formats will stall."]
    train(Model(torch.bfloat16), UpdateWatch(window=4, journal=None), learning_rate=LOW)
    out = capsys.readouterr().out
    assert out.count("update-watch:") == 1 and "nothing in their formats will stall" not in out


def test_a_run_that_will_stall_may_be_ended_before_its_first_step(train: Train) -> None:
    model = Model(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(StallExpected, match=r"(?s)expected to stall.*net\.1\.weight"):
        train(model, Watched(on_audit="raise"), learning_rate=LOW)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert train(Model(), Watched(on_audit="raise"), weight_decay=0.0).state.global_step == 12  # the healthy twin


def test_a_journal_is_kept_beside_the_checkpoints_and_the_last_line_says_how_to_open_it(
    train: Train, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train(Model(), UpdateWatch(window=4))
    (path,) = tmp_path.rglob("update_watch.jsonl")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("update-watch: All 6 tensors are healthy")
    assert last.endswith(f"Open: update-watch report --open {path}")
    assert [report.step for report in read_journal(path)][0] == 4
    header = json.loads(path.read_text().splitlines()[0])["run"]
    assert (header["trainer"], header["optimizer"]) == ("transformers", "AdamW")


def test_no_journal_is_kept_where_it_is_switched_off(train: Train, tmp_path: Path) -> None:
    train(Model(), UpdateWatch(window=4, journal=None))
    assert list(tmp_path.rglob("*.jsonl")) == []


@pytest.mark.slow
def test_the_trainers_wandb_run_gets_everything_on_its_axis(train: Train, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    # the Trainer uses a run that is there
    run = wandb.init(mode="offline", dir=tmp_path, project="p", settings=wandb.Settings(silent=True, console="off"))
    watch = Watched()
    train(Model(), watch, report_to="wandb")
    summary = dict(run.summary)
    run.finish()
    assert summary["train/global_step"] == watch.reports[-1].step == 12
    assert summary["update_watch/efficiency"] == pytest.approx(watch.reports[-1].efficiency)
    assert {"update_watch/heatmap", "update_watch/worst", "update_watch/audit"} <= set(summary)
    assert "trainer/global_step" not in summary


# --- on_stall --------------------------------------------------------------------------------------------


def test_stop_ends_the_run_with_a_checkpoint(train: Train, tmp_path: Path) -> None:
    watch = Watched(thresholds=FAST, on_stall="stop")
    trainer = train(Model(torch.bfloat16), watch, steps=400, learning_rate=LOW, save_strategy="steps", save_steps=1000)
    stopped = trainer.state.global_step
    assert 4 <= stopped < 400
    assert (tmp_path / "run" / f"checkpoint-{stopped}" / "trainer_state.json").exists()


def test_raise_raises_with_the_report(train: Train) -> None:
    with pytest.raises(StalledError, match=r"update-watch: .*stalled") as caught:
        train(Model(torch.bfloat16), Watched(thresholds=FAST, on_stall="raise"), steps=400, learning_rate=LOW)
    assert caught.value.report is not None and stalled_names(caught.value.report)


@pytest.mark.parametrize("answer", [True, None])
@pytest.mark.slow
def test_a_function_decides(train: Train, answer: bool | None) -> None:
    heard: list[Report] = []

    def on_stall(report: Report) -> bool | None:
        heard.append(report)
        return answer

    watch = Watched(thresholds=FAST, on_stall=on_stall)
    trainer = train(Model(torch.bfloat16), watch, steps=60, learning_rate=LOW)
    assert (trainer.state.global_step < 60) == (answer is True)
    assert heard and all(stalled_names(report) for report in heard)


def test_a_healthy_twin_is_not_stopped(train: Train) -> None:
    trainer = train(Model(), Watched(thresholds=FAST, on_stall="stop"), steps=24)
    assert trainer.state.global_step == 24


def test_an_error_of_ours_does_not_reach_training(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    watch = Watched()
    watch._options = None  # type: ignore[assignment]
    watch.state = dict  # type: ignore[method-assign]
    trainer = train(Model(), watch)
    assert trainer.state.global_step == 12 and watch.last is None
    assert "stopped watching, training goes on" in caplog.text


# --- packing ---------------------------------------------------------------------------------------------


def test_packed_state_comes_back_and_damage_is_a_value_error() -> None:
    state = {"version": 1, "names": ["a.weight"] * 100, "value": 0.25}
    text = packed(state)
    assert unpacked(text) == state and packed(text) == text and packed({}) == {}
    assert unpacked(state) == state  # of a checkpoint from before
    (key,) = text
    for damaged in (text[key][:-5], text[key][:10], "no base85 \x00", 7):
        with pytest.raises(ValueError, match="cannot be read"):
            unpacked({key: damaged})
    bomb = base64.b85encode(zlib.compress(b"[" + b" " * (65 * 2**20) + b"]", 9)).decode()
    with pytest.raises(ValueError, match="too large"):
        unpacked({key: bomb})
