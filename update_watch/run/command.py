"""Starts a command so that what it trains is watched, waits for it, and says at the end what was found.

The command keeps its input, output, exit status and signals; its processes find `startup` on their PYTHONPATH.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from update_watch.report import Health, Report
from update_watch.run import claims
from update_watch.run.settings import VARIABLE, Settings
from update_watch.wording import printable

STALLED = 3  # exit status with `fail_on_stall`
_NOT_FOUND, _NOT_RUNNABLE = 127, 126  # as shells have them
_FORWARDED = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def run(
    command: Sequence[str],
    window: int = 128,
    journal: Path | None = None,
    report: Path | None = None,
    wandb: bool = False,
    fail_on_stall: bool = False,
) -> int:
    """Run `command`. Returns its exit status, or `STALLED` where it is 0 and tensors are stalled at the end."""
    path = (journal or Path(time.strftime("update-watch-%Y%m%d-%H%M%S.jsonl"))).absolute()
    settings = Settings(str(path), window, wandb, claims.begin())
    try:
        status = _start(command, settings)
    except FileNotFoundError:
        _tell(f"update-watch run: {command[0]}: command not found{_by_python(command)}\n")
        return _NOT_FOUND
    except PermissionError:
        _tell(f"update-watch run: {command[0]}: permission denied{_by_python(command)}\n")
        return _NOT_RUNNABLE
    finally:
        journals, begun = claims.end(settings.claims, path)
    last = {one: found for one in journals if (found := _last(one)) is not None}
    _say(journals, begun, last, report)
    if status < 0:
        _end_as(-status)
    if (
        status == 0
        and fail_on_stall
        and any(t.health is Health.stalled for _, one in last.values() for t in one.tensors)
    ):
        return STALLED
    return status if status >= 0 else 128 - status


def _start(command: Sequence[str], settings: Settings) -> int:
    startup = str(Path(__file__).parent / "startup")
    paths = [startup, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), VARIABLE: settings.to_variable()}
    child = subprocess.Popen(list(command), env=environment)

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for name in _FORWARDED if (number := getattr(signal, name, None))}
    # Ctrl-C reaches the command by itself; whether it ends is its own affair
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _by_python(command: Sequence[str]) -> str:
    return (
        f"; a script is run by Python: update-watch run python {' '.join(command)}"
        if command[0].endswith(".py")
        else ""
    )


def _end_as(number: int) -> None:
    """End by the signal that ended the command."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):
            stream.flush()
    signal.signal(number, signal.SIG_DFL) if number not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), number)


def _last(journal: Path) -> tuple[str, Report] | None:
    """The model's name and the last report."""
    from update_watch.dashboards.frame import report_of
    from update_watch.dashboards.journal import JournalError, JournalReader

    reader, last = JournalReader(journal), None
    try:
        for frame in reader.frames(numbers=()):
            last = frame
        reader.warn()
        return None if last is None else (str(reader.run.get("model", "")), report_of(reader.newest(last)))
    except (JournalError, OSError) as error:
        _tell(f"update-watch run: {journal}: {error}\n")
    return None


def _say(journals: Sequence[Path], begun: int, last: Mapping[Path, tuple[str, Report]], report: Path | None) -> None:
    if not journals:
        ended = "training ended before anything was kept, or it could not be written,"
        nothing = ended if begun else "no step of a torch optimizer was seen"
        _tell(f"update-watch: {nothing} in the processes of this command\n")
        return
    for journal, (name, found) in last.items():
        own = journal.stem.removeprefix(f"{journals[0].stem}-")  # the second of a class has a number
        name = own if name and own.startswith(name) else name
        of = f" {name}:" if name and len(journals) > 1 else ""
        _tell(f"update-watch:{of} {printable(found.headline)}\n  Open: update-watch report --open {_short(journal)}\n")
    if report is None:
        return
    try:
        from update_watch.dashboards.report.html import write_report

        write_report(list(journals), report)
    except Exception as error:
        _tell(f"update-watch: no report was written: {error}\n")
    else:
        _tell(f"  report: {report}\n")


def _tell(text: str) -> None:
    """On standard error, if it is there: the status of the command is passed on whether this can be told or not."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
