"""Journals in a folder: people remember where their runs are, and not what the file is called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from update_watch.dashboards.journal.lines import START

_SKIPPED = {".git", "__pycache__", "node_modules", ".venv"}
_MOST = 50_000  # files looked at in a folder


def journals_in(folder: Path) -> list[Path]:
    """Journals below a folder, the newest first."""
    found: list[tuple[float, Path]] = []
    looked = 0
    for top, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        for name in files:
            looked += 1
            if looked > _MOST:
                break
            path = Path(top, name)
            if path.suffix == ".jsonl" and _is_journal(path):
                found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, key=lambda pair: (-pair[0], pair[1]))]


def journals_of(paths: Sequence[Path]) -> list[Path]:
    """Files as they are; a folder stands for the newest journal below it.

    Raises:
        FileNotFoundError: there is none in a folder.
    """
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = journals_in(path)
        if not inside:
            raise FileNotFoundError(
                f"{path}: no journal in this folder or below; give the file, or train with one: `update-watch run` and the "
                "callbacks keep it, a loop of your own by watch(..., journal='run.jsonl')"
            )
        found.append(inside[0])
    return found


def _is_journal(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(START)) == START
    except OSError:
        return False
