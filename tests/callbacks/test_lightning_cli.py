"""UpdateWatch in LightningCLI: from a command line and from YAML, with every option typed and documented."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from tests.support.lightning_models import Module
from update_watch.callbacks import UpdateWatch
from update_watch.report import Report
from update_watch.thresholds import Thresholds

pytest.importorskip("jsonargparse")

YAML = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: update_watch.callbacks.UpdateWatch
      init_args:
        window: 5
        samples: 64
        sinks: [test_lightning_cli.keep]
        thresholds: {stalled: 0.05, minimum_steps: 2}
        averages: {ema: [twin, 0.5]}
        seed: 3
        on_stall: stop
        progress_bar: false
        print_audit: false
        check_replicas: true
model:
  batches: 10
"""
KEPT: list[Report] = []


def keep(report: Report) -> None:
    """A sink that a YAML can name."""
    KEPT.append(report)


class WithAverage(Module):
    """A module with a copy of itself, which nobody trains."""

    def __init__(self, batches: int = 12) -> None:
        super().__init__(batches=batches)
        # not a submodule: an average is not trained
        self.__dict__["twin"] = Module()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LightningCLI]:
    def make(*args: str, run: bool = False) -> LightningCLI:
        monkeypatch.setattr("sys.argv", ["train.py", *(["fit"] if run else []), *args])
        return LightningCLI(WithAverage, run=run, save_config_callback=None, seed_everything_default=False)

    return make


Cli = Callable[..., LightningCLI]


def watch_of(made: LightningCLI) -> UpdateWatch:
    (found,) = [c for c in made.trainer.callbacks if isinstance(c, UpdateWatch)]
    return found


def test_yaml_sets_every_option_and_the_run_uses_them(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(YAML)
    KEPT.clear()
    watch = watch_of(cli(f"--config={tmp_path / 'config.yaml'}", run=True))
    options = watch._options
    assert (options.window, options.samples, options.seed, options.on_stall) == (5, 64, 3, "stop")
    assert (options.progress_bar, options.print_audit, options.check_replicas) == (False, False, True)
    assert options.thresholds == Thresholds(stalled=0.05, minimum_steps=2)
    assert options.averages == {"ema": ["twin", 0.5]}
    assert [report.window for report in KEPT] == [5, 5] and watch.last == KEPT[-1]
    assert "average:ema" in KEPT[-1].tensors[0].accumulators


def test_the_yaml_and_the_options_of_the_docs_are_true(cli: Cli, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "config.yaml").write_text(block)
    options = watch_of(cli("--trainer.logger=false", f"--config={tmp_path / 'config.yaml'}"))._options
    assert (options.window, options.on_stall, options.averages) == (64, "stop", {"ema": ["twin", 0.999]})
    assert options.thresholds == Thresholds(stalled=0.05)

    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| .{20,} \|$", text, re.MULTILINE)
    parameters = inspect.signature(UpdateWatch).parameters.values()
    assert rows == [(p.name, repr(p.default).replace("'", '"')) for p in parameters]


@pytest.mark.parametrize("name", ["update_watch.callbacks.UpdateWatch", "UpdateWatch"], ids=["path", "short-name"])
def test_command_line_sets_options(cli: Cli, name: str) -> None:
    made = cli(
        "--trainer.logger=false",
        f"--trainer.callbacks+={name}",
        "--trainer.callbacks.window=7",
        "--trainer.callbacks.on_stall=raise",
    )
    assert (watch_of(made)._options.window, watch_of(made)._options.on_stall) == (7, "raise")


def test_on_stall_may_name_a_function(cli: Cli) -> None:
    made = cli(
        "--trainer.logger=false",
        "--trainer.callbacks+=UpdateWatch",
        "--trainer.callbacks.on_stall=test_lightning_cli.keep",
    )
    assert watch_of(made)._options.on_stall is keep


@pytest.mark.parametrize("option", ["window=0", "window=many", "on_stall=explode", "thresholds.stalled=7"])
def test_a_wrong_option_is_refused_with_its_name(cli: Cli, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as caught:
        cli("--trainer.callbacks+=UpdateWatch", f"--trainer.callbacks.{option}")
    told = str(caught.value) + capsys.readouterr().err
    assert option.split("=")[0].split(".")[-1] in told


def test_help_documents_every_option(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("--trainer.callbacks.help=update_watch.callbacks.UpdateWatch")
    told = " ".join(capsys.readouterr().out.split())
    for name in inspect.signature(UpdateWatch).parameters:
        assert f"{name}" in told, name
    for text in ("optimizer steps per report", "what to do when a tensor stalls", "elements looked at per parameter"):
        assert text in told
