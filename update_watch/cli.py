"""The command `update-watch`. Each subcommand imports what it needs when it runs; nothing here computes.

Exit status: 0 done; 1 it could not be done (a package is missing, a server refused); 2 wrong arguments or files;
130 interrupted. What goes wrong is said in one line on standard error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from update_watch.cli_types import count, positive, rate
from update_watch.wording import printable

_PIPE_CLOSED = 141  # as a shell reports a process that SIGPIPE ended
_FOUND = 3  # exit status of --strict: what was looked for is there


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class UsageError(ValueError):
    """Wrong arguments or files; the message names the argument, the value and the remedy."""


class Refusal(RuntimeError):
    """It could not be done; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    try:
        try:
            options = _parser().parse_args((sys.argv[1:] if arguments is None else arguments) or ["--help"])
        except SystemExit as end:  # --help, --version and wrong arguments
            return end.code if isinstance(end.code, int) else 2
        try:
            return _run(options)
        finally:
            if sys.stdout:  # a closed pipe shows here and not while the interpreter ends
                sys.stdout.flush()
    except BrokenPipeError:
        # what is still in the buffer would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    command: Callable[[argparse.Namespace], int | None] = options.run
    try:
        return command(options) or 0
    except BrokenPipeError:
        raise
    except (UsageError, OSError) as error:
        return _complain(options, error, 2)
    except (Refusal, ImportError) as error:
        return _complain(options, error, 1)


def _complain(options: argparse.Namespace, error: BaseException, status: int) -> int:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = printable(" ".join(str(error).split())) or type(error).__name__
    sys.stderr.write(f"update-watch {options.command}: error: {text}\n")
    return status


# --- commands -----------------------------------------------------------------------------------------


def _watch_command(options: argparse.Namespace) -> int:
    from update_watch.run.command import run

    command = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if not command:
        raise UsageError("name the command to run, as in: update-watch run python train.py --lr 1e-5")
    for path in (options.journal, options.report):
        if path is not None and path.exists() and not path.is_file():  # no device either: it would be written to
            raise UsageError(f"{path} is {'a folder, name a file in it' if path.is_dir() else 'no file, name one'}")
    return run(command, options.window, options.journal, options.report, options.wandb, options.fail_on_stall)


def _demo(options: argparse.Namespace) -> None:
    from update_watch.demo.demo import run
    from update_watch.demo.training import Settings

    try:
        settings = Settings(options.steps, options.lr, options.precision, options.out, options.seed, options.wandb)
    except ValueError as error:
        raise UsageError(str(error)) from error
    from update_watch.dashboards.journal import JournalError
    from update_watch.dashboards.outputs import OutputError

    try:
        run(settings, overwrite=options.force)
    except (JournalError, OutputError) as error:
        raise UsageError(str(error)) from error


def _report(options: argparse.Namespace) -> None:
    from update_watch.dashboards.journal import JournalError
    from update_watch.dashboards.journal.finding import journals_of
    from update_watch.dashboards.outputs import OutputError
    from update_watch.dashboards.report.html import write_report

    journals = journals_of(options.journals)
    if not options.live:  # that one waits for them
        for journal in journals:
            _need_file(journal)
    try:
        write_report(journals, options.out, live=options.live, png=options.png, overwrite=options.force)
    except (JournalError, OutputError) as error:
        raise UsageError(str(error)) from error
    except RuntimeError as error:  # no Chromium for the picture
        raise Refusal(str(error)) from error
    for path in (options.out, options.png):
        if path is not None:
            print(path)
    if options.open:
        import webbrowser

        webbrowser.open(options.out.absolute().as_uri())


def _top(options: argparse.Namespace) -> None:
    from update_watch.dashboards.journal import JournalError
    from update_watch.dashboards.journal.finding import journals_of
    from update_watch.dashboards.top import top

    (journal,) = journals_of([options.journal])
    _need_file(journal)
    try:
        top(journal, once=options.once)
    except JournalError as error:
        raise UsageError(str(error)) from error


def _audit(options: argparse.Namespace) -> None:
    from update_watch.audit.audit import audit

    made = _call(options.factory)
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise UsageError(
            f"{options.factory} returned {type(made).__name__}; it must return (model, optimizer) or"
            " (model, optimizer, averages)"
        )
    try:
        found = audit(*made)
    except TypeError as error:
        raise UsageError(f"{options.factory}: {error}") from error
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    if options.strict:
        from update_watch.audit.table import StallExpected

        try:
            found.check(options.allow)
        except StallExpected:
            sys.exit(_FOUND)


def _diff(options: argparse.Namespace) -> None:
    from update_watch.checkpoints.at_rate import of_files, text
    from update_watch.checkpoints.diff import diff_tensors
    from update_watch.checkpoints.files import CheckpointError, read_tensors

    limit, at = options.limit or None, options.at
    try:
        first, second = read_tensors(options.first), read_tensors(options.second)
        found = diff_tensors(first, second, f"{options.first} and {options.second}")
        ahead = None if at is None else of_files(options.second, at, options.optimizer, second)
    except (CheckpointError, ValueError) as error:
        raise UsageError(str(error)) from error
    if options.json:
        at_rate = {} if ahead is None else {"at_rate": list(map(vars, ahead))}
        print(json.dumps(found.to_dict() | at_rate, indent=2))
    else:
        print(found.text(limit) if ahead is None else f"{found.text(limit)}\n\n{text(ahead, at, limit)}")
    if options.strict and found.never_moved:
        sys.exit(_FOUND)


def _workspace(options: argparse.Namespace) -> None:
    from update_watch.dashboards.wandb.workspace import WorkspaceError, run

    try:
        print(run(options.entity, options.project, options.dry_run))
    except WorkspaceError as error:
        raise Refusal(str(error)) from error


def _automations(options: argparse.Namespace) -> None:
    from update_watch.dashboards.wandb.automations import AutomationError, run

    try:
        print(run(options.entity, options.project, options.dry_run))
    except AutomationError as error:
        raise Refusal(str(error)) from error


def _need_file(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder, a journal is a file in it")
    if not path.is_file():  # a pipe would be waited for
        raise UsageError(f"{path}: {'this is no file' if path.exists() else 'no such file'}")


def _call(factory: str) -> Any:
    """What "module:function" or "FILE.py:function" returns."""
    place, colon, name = factory.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"{factory!r}: expected module:function or FILE.py:function")
    folder = str(Path(place).resolve().parent) if place.endswith(".py") else os.getcwd()
    sys.path.insert(0, folder)  # as `python FILE.py` and `python -m module` do
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(error.name + ".")):
            raise UsageError(f"{factory}: there is no module {error.name} here") from error
        raise
    found = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"{factory}: {place} has no function {name}")
    return found()


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    name = f"audited_{path.stem}"  # a file called random.py must not take the place of the library's
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# --- arguments ----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="update-watch",
        description="Did the stored weights receive what the optimizer intended, and if not, why?",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)

    def add(name: str, run: Callable[[argparse.Namespace], int | None], summary: str, more: str = "") -> _Parser:
        text = textwrap.dedent(f"{summary[0].upper()}{summary[1:]}. {more}").strip()
        made = commands.add_parser(name, help=summary, description=text)
        made.set_defaults(run=run)
        return made

    watched = add(
        "run",
        _watch_command,
        "run a command, and watch what it trains",
        "Its exit status is passed on; 3 with --fail-on-stall where that is 0 and tensors are stalled at the end.",
    )
    watched.add_argument("--window", type=positive, default=128, metavar="N", help="optimizer steps per report (128)")
    watched.add_argument("--journal", type=Path, metavar="FILE", help="(update-watch-DATE.jsonl)")
    watched.add_argument("--report", type=Path, metavar="FILE", help="write the HTML report there at the end")
    watched.add_argument("--wandb", action="store_true", help="log to the W&B run that the script has open")
    watched.add_argument("--fail-on-stall", action="store_true", help="exit status 3 where tensors are stalled")
    watched.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="as python train.py --lr 1e-5"
    )

    demo = add("demo", _demo, "train a small GPT whose norms stall, beside a twin that does not; about a minute")
    demo.add_argument("--steps", type=positive, default=1000, metavar="N", help="optimizer steps (1000)")
    demo.add_argument("--lr", type=rate, default=1e-3, metavar="RATE", help="highest learning rate (0.001)")
    demo.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the weights (bf16)")
    demo.add_argument("--out", type=Path, default=Path("update-watch-demo"), metavar="FOLDER",
                      help="for journals, report, W&B runs; an earlier demo in it is replaced (update-watch-demo)")  # fmt: skip
    demo.add_argument("--force", action="store_true", help="replace files of these names that no demo made, too")
    demo.add_argument("--seed", type=count, default=0, metavar="N", help="of start and text (0)")
    demo.add_argument("--wandb", choices=("offline", "online", "disabled"), default="offline", help="(offline)")

    report = add("report", _report, "write one HTML file from the journals of one or more runs")
    report.add_argument("journals", nargs="*", type=Path, default=[Path()], metavar="JOURNAL",
                        help="or a folder: its newest journal (the current folder)")  # fmt: skip
    report.add_argument("-o", "--output", dest="out", type=Path, default=Path("report.html"), metavar="FILE")
    report.add_argument("--live", action="store_true", help="write it again whenever a journal grows, until Ctrl-C")
    report.add_argument("--open", action="store_true", help="show it in the browser")
    report.add_argument("--force", action="store_true", help="write over files that update-watch did not make, too")
    report.add_argument("--png", type=Path, metavar="FILE", help="a picture of it as well (needs Chromium)")

    top = add("top", _top, "show the tensors of a run in the terminal, live or after the fact")
    top.add_argument("journal", nargs="?", type=Path, default=Path(), metavar="JOURNAL",
                     help="or a folder: its newest journal (the current folder)")  # fmt: skip
    top.add_argument("--once", action="store_true", help="show the last window and end")

    audit = add(
        "audit",
        _audit,
        "say before the first step what accumulates, in which format, and what will be lost",
        "Runs your function, which returns (model, optimizer) or (model, optimizer, averages); does not train.",
    )
    audit.add_argument("factory", metavar="MODULE:FUNCTION", help="or FILE.py:FUNCTION")
    audit.add_argument("--json", action="store_true", help="as JSON")
    audit.add_argument("--strict", action="store_true", help="exit with 3 where something is expected to stall")
    audit.add_argument("--allow", action="append", default=[], metavar="PATTERN",
                       help="with --strict: tensors that may stall all the same; may be repeated")  # fmt: skip

    diff = add("diff", _diff, "compare two checkpoints bit by bit; nothing in them is run")
    diff.add_argument("first", type=Path, metavar="FIRST", help="safetensors file, folder of such, or torch file")
    diff.add_argument("second", type=Path, metavar="SECOND")
    diff.add_argument("--limit", type=count, default=40, metavar="N", help="tensors shown, 0 for all (40)")
    diff.add_argument("--json", action="store_true", help="as JSON, all tensors")
    diff.add_argument("--strict", action="store_true", help="exit with 3 where tensors never moved")
    diff.add_argument(
        "--at", type=float, metavar="LR", help="also: which tensors of SECOND would stall at this learning rate"
    )
    diff.add_argument("--optimizer", type=Path, metavar="FILE",
                      help="with --at: its optimizer's state, if not in SECOND")  # fmt: skip

    for name, run, summary in (
        ("workspace", _workspace, "save the dashboard in a W&B project, in place of an earlier one"),
        ("automations", _automations, "create the W&B automations that send stalls to Slack"),
    ):
        online = add(name, run, summary)
        online.add_argument("--entity", required=True, metavar="NAME", help="user or team")
        online.add_argument("--project", required=True, metavar="NAME")
        online.add_argument("--dry-run", action="store_true", help="print what would be sent, without a network")
    return parser


def _version() -> str:
    from update_watch import __version__

    return f"update-watch {__version__}"


if __name__ == "__main__":
    sys.exit(main())
