"""`update-watch demo`: a stall on real text within a minute, beside the same run with FP32 master weights.

Two runs of one small GPT (`demo_model`) go step by step, with the same start, the same text and the same AdamW. One
keeps its weights in BF16, the other keeps FP32 masters and rounds them to BF16 before use. In the first the norms,
which begin at 1.0, never move: at 1.0 BF16 loses every update under 0.002, and the learning rate is at most 0.001. As
the learning rate decays, the matrices follow. In the second everything arrives.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from update_watch import run_journal
from update_watch.audit.audit import audit
from update_watch.demo.screen import Screen, open_screen, verdict
from update_watch.demo.training import FORMATS, MASTERS, Settings, Training, pieces, trainings
from update_watch.report import Report
from update_watch.thresholds import Thresholds
from update_watch.watch import Watch, watch
from update_watch.wording import fixed, number, percent

_STEP_KEY = "trainer/global_step"
_ARRIVES = Thresholds().stalling  # efficiency below which a tensor stalls in part
_MARK = "is_demo"  # in what a journal says of its run


@dataclasses.dataclass
class _Watched:
    """A run, its watch, and where its reports go."""

    training: Training
    watch: Watch
    reports: list[Report]
    journal: Path
    wandb_run: Any = None
    announced: int = 0  # reports whose alerts were shown


def run(settings: Settings, screen: Screen | None = None, overwrite: bool = False) -> dict[str, list[Report]]:
    """Run the demo: progress, verdicts and tables on the screen, journals and report into `settings.out`.

    Returns the reports of each run by its name. An earlier demo in the folder is replaced; with `overwrite` also files
    of its names that no demo made.

    Raises:
        OSError: nothing can be written to `settings.out`.
        OutputError: a file of the demo's names is there that no demo made; nothing is touched then.
    """
    screen = open_screen() if screen is None else screen
    settings.out.mkdir(parents=True, exist_ok=True)
    _clear(settings.out, overwrite)
    with ExitStack() as stack:
        stack.enter_context(_one_thread())
        stack.enter_context(_log_on(screen))
        runs = [_attach(training, settings, screen, stack) for training in trainings(settings)]
        _train(runs, settings, screen)
        for one in runs:
            one.watch.flush()
            _announce(one, screen)
        _show(runs, screen)
    # the journals and W&B runs are whole only now
    _show_files(runs, settings, screen)
    return {one.training.name: one.reports for one in runs}


def _clear(out: Path, overwrite: bool) -> None:
    """Remove an earlier demo: a journal that is there would be continued."""
    from update_watch.dashboards.journal import JournalReader
    from update_watch.dashboards.outputs import OutputError, check_output

    journals = [out / f"{name}.jsonl" for name in (*FORMATS, MASTERS)]
    check_output(out / "report.html", "report", "--out:", journals, overwrite)
    for path in journals:
        check_output(path, "journal", "--out:", (), overwrite)
        if path.exists() and not overwrite and not JournalReader(path).header().get(_MARK):
            raise OutputError(f"--out: {path} is the journal of a run, not of a demo; name another folder")
    for path in journals:
        path.unlink(missing_ok=True)


def _attach(training: Training, settings: Settings, screen: Screen, stack: ExitStack) -> _Watched:
    """Watch a run; what cannot be recorded for want of a package is said in one line."""
    from update_watch.dashboards.journal.journal import Journal

    facts = {**dataclasses.asdict(settings), "out": str(settings.out), "run": training.title, _MARK: True}
    expected = audit(training.model, training.optimizer)
    if training.name != MASTERS:
        screen.line(f"Before the first step the audit {_expectation(expected.warnings)}")
    journal, reports = settings.out / f"{training.name}.jsonl", list[Report]()
    sinks: list[Callable[[Report], object]] = [reports.append, Journal(journal, run=_told(training, settings))]
    wandb_run = _open_wandb(training, settings, facts, screen) if settings.wandb != "disabled" else None
    if wandb_run is not None:
        from update_watch.dashboards.wandb.sink import WandbSink

        stack.callback(wandb_run.finish)
        sink = WandbSink(wandb_run, step_key=_STEP_KEY)
        sink.describe({"audit": expected.to_dict(), "demo": facts})
        sinks.append(sink)
    # a step of this model takes less time than the usual look at it would: 256 elements of each tensor are enough
    watched = watch(
        training.model,
        training.optimizer,
        window=settings.window,
        samples=32,
        budget=None,  # the runs are compared window by window
        schedule=training.rates,
        seed=settings.seed,
        sinks=sinks,
    )
    return _Watched(training, stack.enter_context(watched), reports, journal, wandb_run)


def _told(training: Training, settings: Settings) -> dict[str, Any]:
    """What the journal says of a run: how it was trained, and nothing of this machine."""
    more = {"name": training.title, "seed": settings.seed, _MARK: True}
    return run_journal.facts([training.optimizer], "torch", **more)


def _expectation(warnings: tuple[str, ...]) -> str:
    return f"warns: {warnings[0]}" if warnings else "expects nothing to be lost."


def _open_wandb(training: Training, settings: Settings, facts: dict[str, Any], screen: Screen) -> Any:
    try:
        import wandb
    except ImportError:
        if training.name != MASTERS:
            screen.line("No W&B run: wandb is not installed (pip install 'update-watch[wandb]').")
        return None
    try:
        return wandb.init(
            project="update-watch-demo",
            group=f"seed {settings.seed}, lr {settings.lr:g}",
            name=training.title,
            config=facts,
            mode=settings.wandb,  # type: ignore[arg-type]
            dir=str(settings.out),
            reinit="create_new",  # the two runs are open side by side
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
    except Exception as error:  # of many kinds: no key, no network, no rights; the demo goes on
        screen.line(f"No W&B run: {str(error).strip().partition(chr(10))[0] or type(error).__name__}")
        return None


def _train(runs: list[_Watched], settings: Settings, screen: Screen) -> None:
    next_piece = pieces(settings)
    with screen.progress([one.training.title for one in runs], settings.steps):
        for step in range(1, settings.steps + 1):
            piece = next_piece()
            for row, one in enumerate(runs):
                one.training.step(piece)
                screen.advance(row, step, f"loss {one.training.recent_loss:.2f}  {verdict(one.watch.last)}")
                _announce(one, screen)
                if one.wandb_run is not None and step % 10 == 0:
                    one.wandb_run.log({"train/loss": one.training.recent_loss, _STEP_KEY: step})


def _announce(one: _Watched, screen: Screen) -> None:
    """Show alerts that are new; the list of reports is filled by the watch's thread."""
    while one.announced < len(one.reports):
        report = one.reports[one.announced]
        if report is _early(one.reports, one.training.settings.steps) and report.forecast is not None:
            screen.line(f"step {report.step}: {one.training.title}: {report.forecast.headline}")
        for alert in report.alerts:
            screen.line(f"step {alert.step}: {one.training.title}: {alert.level}: {alert.title}")
        one.announced += 1


def _show(runs: list[_Watched], screen: Screen) -> None:
    watched = runs[0]
    last = watched.reports[-1]
    screen.line()
    screen.line(f"{watched.training.title}, steps {last.step - last.window + 1} to {last.step}:")
    screen.table(last)
    if held := _how_the_forecast_held(watched.reports, watched.training.settings.steps):
        screen.line(held)
    for one in runs[1:]:
        screen.line(f"Beside it, the same run with {one.training.title}: {one.reports[-1].headline}")
    screen.line()
    losses = [(one.training.held_back_loss(), one.training) for one in runs]
    told = ", ".join(f"{loss:.3f} with {training.title}" for loss, training in losses)
    trained = ", ".join(f"{training.recent_loss:.3f}" for _, training in losses)
    screen.line(f"Loss (nats per byte) on text held back: {told}; in the last training steps: {trained}.")
    screen.line(_cost(watched))


def _early(reports: list[Report], steps: int) -> Report | None:
    """The first report with a forecast from a fifth of the run on."""
    return next((r for r in reports if r.forecast is not None and r.step >= steps / 5), None)


def _how_the_forecast_held(reports: list[Report], steps: int) -> str:
    """The forecast at a fifth of the run against what then happened; "" where there is none."""
    early = _early(reports, steps)
    if early is None or early is reports[-1] or early.forecast is None:
        return ""
    ends = {t.name: t.efficiency for t in reports[-1].tensors}
    moving = {t.name for t in early.tensors if t.efficiency is not None and t.efficiency >= _ARRIVES}
    held = [(t, end) for t in early.forecast.tensors if t.name in moving and (end := ends.get(t.name)) is not None]
    if not held:
        return ""
    off = sum(abs(min(t.final_efficiency, 1.0) - min(end, 1.0)) for t, end in held) / len(held)
    said = {t.name for t, _ in held if t.stalling_step is not None}
    happened = {t.name for t, end in held if end < _ARRIVES}
    return (
        f"At step {early.step} {len(said)} of the {len(held)} tensors that still moved were forecast to stall by now:"
        f" {len(said & happened)} of these did, and {len(happened - said)} others; efficiencies at the end were forecast within"
        f" {fixed(off)} on average."
    )


def _cost(watched: _Watched) -> str:
    known = [report.cost_ms for report in watched.reports if report.cost_ms is not None]
    if not known:
        return "What the watch costs was not measured."
    cost = sum(known) / len(known)
    step = 1e3 * watched.training.seconds / len(watched.training.losses)
    return (
        f"The verdict cost {number(cost)} ms of the {step:.0f} ms of a step ({percent(cost / step)}). This model is tiny;"
        " the watch looks at a fixed sample, so its share falls as tensors grow."
    )


def _show_files(runs: list[_Watched], settings: Settings, screen: Screen) -> None:
    screen.line()
    for one in runs:
        screen.line(f"journal: {one.journal}")
    try:
        from update_watch.dashboards.report.html import write_report

        write_report([one.journal for one in runs], settings.out / "report.html")
        screen.line(f"report:  {settings.out / 'report.html'}")
    except ImportError as error:
        screen.line(f"No HTML report: {error}")
    for one in runs:
        if one.wandb_run is not None and settings.wandb == "online":
            screen.line(f"W&B:     {one.wandb_run.url}")
        elif one.wandb_run is not None:
            screen.line(f"W&B:     {Path(one.wandb_run.settings.sync_dir)} (upload it with `wandb sync`)")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One core: sums come out the same on every machine, and matrices this small gain nothing from two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _log_on(screen: Screen) -> Iterator[None]:
    """Warnings of the package as lines above the progress; alerts are shown from the reports."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.module not in ("alerts", "wandb_alerts"):
                screen.line(record.getMessage())

    logger, handler = logging.getLogger("update_watch"), Lines(logging.WARNING)
    was = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = was
        logger.removeHandler(handler)
