"""The journal beside a run: what it says of the run, and what can be made of it at once (a page, a notebook's view)."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from update_watch import endings
from update_watch.report import Report
from update_watch.watching.trainers import trainer_at_work
from update_watch.worker import warn

Self = TypeVar("Self", bound="Shown")
NAME = "update_watch.jsonl"  # beside a trainer's logs


def facts(optimizers: Iterable[Any], trainer: str = "", **more: Any) -> dict[str, Any]:
    """What a journal's header says of a run: nothing that names a person, a machine or a path."""
    from update_watch import __version__

    names = dict.fromkeys(type(getattr(optimizer, "optimizer", optimizer)).__name__ for optimizer in optimizers)
    processes = torch.distributed.get_world_size() if _is_distributed() else 1
    found = {
        "optimizer": ", ".join(names),
        "trainer": trainer,
        "processes": processes,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "update_watch": __version__,
        **more,
    }
    return {key: value for key, value in found.items() if value not in ("", None)}


def keep(path: str | os.PathLike[str], optimizers: Iterable[Any], trainer: str = "", **more: Any) -> Any:
    """A sink that keeps a journal at `path`.

    Raises:
        TypeError: `path` names no file.
    """
    from update_watch.dashboards.journal import Journal

    return Journal(path, run=facts(optimizers, trainer, **more))


def after(
    sinks: Iterable[Any], path: str | os.PathLike[str] | None, optimizers: Iterable[Any], join: Any, model: Any
) -> list[Any]:
    """`sinks`, and the journal at `path` if there is to be one: kept by the first of the processes that join."""
    is_writer = join is False or not _is_distributed() or torch.distributed.get_rank() == 0
    if path is None or not is_writer:
        return [*sinks]
    return [*sinks, keep(path, optimizers, trainer_at_work(optimizers), model=name_of(model))]


def name_of(model: Any) -> str:
    """That of its class; "" for bare tensors that have none."""
    return type(model).__name__ if isinstance(model, torch.nn.Module) else str(getattr(model, "name", ""))


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def how_to_open(path: Path, last: Report) -> str:
    """One line for the end of a training; no way to a journal that was never written."""
    there = (
        f" Open: update-watch report --open {path}"
        if os.path.isfile(path)
        else f" No journal could be written ({path})."
    )
    return f"update-watch: {last.headline}{there}"


def write_page(path: str | os.PathLike[str], journal: str | os.PathLike[str] | None, last: Report | None) -> Path:
    """The HTML report at `path`, of the whole run where a journal is kept and can be read, else of the last window, which is in it
    also where the journal could not be written any more.

    Raises:
        ValueError: no window was closed so far.
        OutputError: a file that is no report is there already.
        ImportError: a package for it is missing.
    """
    from update_watch.dashboards.journal import JournalError
    from update_watch.dashboards.outputs import check_output, replace_text
    from update_watch.dashboards.report import history_of, read_history, render_html

    path, kept, history = Path(path), Path(journal or ""), None
    is_kept = journal is not None and os.path.isfile(kept)
    if last is None and not is_kept:
        raise ValueError("Watch.report: no window was closed so far; train on, or call flush() first")
    check_output(path, "report", "path", [kept] if is_kept else [])
    try:
        history = read_history(kept, last=last) if is_kept else None
    except (JournalError, OSError) as error:
        if last is None:
            raise
        warn(f"Watch.report: the page is of the last window, as the journal cannot be read: {error}")
    if history is None and last is not None:
        history = history_of([last], "last window")
    assert history is not None
    replace_text(path, render_html([history]))
    return path


def notebook_view(last: Report | None) -> str:
    """The first screen in HTML for a notebook; every text is escaped."""
    from update_watch.dashboards.report.notebook import first_screen_html

    return "<p>update-watch: no window was closed so far.</p>" if last is None else first_screen_html(last)


class Shown:
    """A watch as a person has it at hand: its `with` block, its line, its view in a notebook, its page."""

    last: Report | None
    journal: Path | None = None  # the one that `watch(journal=...)` keeps
    trainer = "torch"  # whose words advice takes: a key of `cures.TRAINERS`
    name = ""  # of the model
    _is_named = False

    def kept_in(
        self: Self, journal: str | os.PathLike[str] | None, name: str, model: Any, optimizers: Iterable[Any]
    ) -> Self:
        """Itself, knowing of its journal, its trainer and its name: of the model's class where none is given."""
        self.journal = None if journal is None else Path(journal).absolute()  # wherever the script goes later
        self._is_named = bool(name)
        self.hear(optimizers)
        self.name = name or name_of(model)
        return self

    def hear(self, optimizers: Iterable[Any]) -> None:
        """Learn which trainer is at work, from who calls now: whoever steps an optimizer that is found at its first step."""
        if self.trainer == "torch":
            self.trainer = trainer_at_work(optimizers)

    @property
    def told_as(self) -> str:
        """What alerts call the model: its name where one was given, or the process watches several."""
        return self.name if self._is_named or endings.has_several() else ""

    @property
    def step(self) -> int:
        raise NotImplementedError

    def flush(self, timeout: float | None = None) -> Report | None:
        raise NotImplementedError

    def report(self, path: str | os.PathLike[str] = "report.html") -> Path:
        """Write the HTML report: of the whole run where a journal is kept, else of the last window. Closes the window.

        Raises:
            ValueError: no window was closed so far.
            OutputError: a file that is no report is there already.
            ImportError: `pip install 'update-watch[report]'` is missing.
        """
        self.flush(10.0)
        return write_page(path, self.journal, self.last)

    def close(self, timeout: float = 5.0) -> None:
        raise NotImplementedError

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        """Raises TypeError: what a watch holds is of one process and one model."""
        raise TypeError(
            "a running Watch cannot be copied or pickled; keep it outside of what is (the model, its checkpoint):"
            " state_dict() is what goes into a checkpoint"
        )

    def __repr__(self) -> str:
        said = self.last.headline if self.last is not None else "no window was closed so far"
        return f"<update_watch.Watch, step {self.step:,}: {said}>"

    def _repr_html_(self) -> str:
        return notebook_view(self.last)
