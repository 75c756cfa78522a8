"""Tables for W&B, logged beside the rows of numbers by a thread of their own.

Logging a table asks the server a question first (whether an artifact of that name exists) and waits for the
answer, minutes long where the server is away. Neither the numbers nor the other sinks may wait for that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import wandb

# The caller waits so long for a table to be handed over, so that in a healthy run it is not lost when the run
# is finished right after the last window.
PATIENCE_SECONDS = 3.0

_logger = logging.getLogger(__name__)


class TableRows(NamedTuple):
    """Content of one table."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


class PictureLogger:
    """Logs rows with tables to one run; of those that come while one is stuck, the last is kept."""

    def __init__(self, run: wandb.Run, commit: bool | None, patience: float = PATIENCE_SECONDS) -> None:
        self._run = run
        self._commit = commit
        self._patience = patience
        self._lock = threading.Lock()
        self._waiting: tuple[dict[str, Any], dict[str, TableRows | str]] | None = None
        self._thread: threading.Thread | None = None

    def log(self, row: Mapping[str, Any], tables: Mapping[str, TableRows | str]) -> None:
        """Log `tables`, and pages in HTML, in one row, together with the values of `row` (the trainer's step)."""
        with self._lock:
            self._waiting = (dict(row), dict(tables))
            if self._thread is not None:  # stuck: it takes what is waiting when it is through
                return
            thread = self._thread = threading.Thread(target=self._work, name="update-watch-wandb-tables", daemon=True)
            thread.start()
        thread.join(self._patience)

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._waiting is None:
                    self._thread = None
                    return
                row, tables = self._waiting
                self._waiting = None
            try:
                self._run.log({**row, **_build(tables)}, commit=self._commit)
            except Exception as error:  # noqa: BLE001  # watching must not stop training
                # A picture is worth no warning: its numbers are in the rows, and the next picture replaces it.
                _logger.debug("WandbSink: tables of %s were not logged: %s", row, error)


def _build(tables: Mapping[str, TableRows | str]) -> dict[str, Any]:
    import wandb

    # Mixed types: W&B otherwise infers and checks a type per cell, which takes most of the time.
    return {
        key: wandb.Html(t, inject=False)
        if isinstance(t, str)
        else wandb.Table(list(t.columns), list(t.rows), allow_mixed_types=True)
        for key, t in tables.items()
    }
