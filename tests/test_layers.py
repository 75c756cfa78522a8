"""Rooms, and which may import which: read from the source, so an import within a function counts too.

What importing a room loads, optional packages above all, is tried in tests/test_loading.py.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "update_watch"
OTHERS = ("tests", "bench", "examples")
MOST_LINES, MOST_FILES = 350, 18

# The root holds two rooms: the words that everybody speaks, and the entrance, which puts the wings together.
VOCABULARY = {
    "columns",
    "cures",
    "evidence",
    "foresight",
    "formats",
    "kinds",
    "naming",
    "odd_tensors",
    "report",
    "thresholds",
    "wording",
    "worker",
    "wrappers",
}
# room -> rooms below it, whose files it may import beside its own
BELOW: dict[str, set[str]] = {
    "vocabulary": set(),
    "replay": {"vocabulary"},
    "measure": {"replay", "vocabulary"},
    "judge": {"vocabulary"},
    "ranks": {"vocabulary"},
    "audit": {"replay", "measure", "judge", "vocabulary"},
    "checkpoints": {"judge", "vocabulary"},
    "dashboards": {"vocabulary"},
    "watching": {"vocabulary", "replay", "measure", "judge", "ranks"},
    "entrance": {
        "watching",
        "vocabulary",
        "replay",
        "measure",
        "judge",
        "ranks",
        "audit",
        "checkpoints",
        "demo",
        "run",
        "dashboards",
    },
    "callbacks": {"entrance", "audit", "vocabulary"},
    "run": {"entrance", "measure", "dashboards", "vocabulary"},
    "demo": {"entrance", "audit", "judge", "dashboards", "vocabulary"},
}
# the one place where an upper room reaches into another: a trainer's W&B logger gets the sink, imported on use
EXCEPTIONS = {("callbacks", "update_watch.dashboards")}
WITHOUT_TORCH = {"judge", "dashboards"}
# of the vocabulary, what renderers know
DASHBOARDS_KNOW = {
    "update_watch.cures",
    "update_watch.foresight.divergence",
    "update_watch.foresight.forecasts",
    "update_watch.kinds",
    "update_watch.naming",
    "update_watch.report",
    "update_watch.wording",
    "update_watch.worker",
}


@dataclasses.dataclass(frozen=True)
class Import:
    """One name that a module takes from another; `name` is "" where the module itself is imported."""

    by: str
    of: str
    name: str


def modules() -> dict[str, Path]:
    """Every module of the package by the name it is imported by; links are not followed."""
    found = {}
    for top in (PACKAGE, "callbacks", "dashboards"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if not any(part.is_symlink() for part in path.parents):
                parts = path.relative_to(ROOT).with_suffix("").parts
                name = ".".join(parts if top == PACKAGE else (PACKAGE, *parts))
                found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(by: str, source: str, known: set[str]) -> set[Import]:
    """What a module imports of this package, anywhere in it, also within functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {Import(by, alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(Import(by, whole, "") if whole in known else Import(by, node.module or "", alias.name))
    return {one for one in found if one.of.partition(".")[0] == PACKAGE}


@functools.cache  # when they are asked for: every process collects this file
def all_imports() -> frozenset[Import]:
    return frozenset(
        one
        for name, path in MODULES.items()
        for one in imports_of(name, path.read_text(encoding="utf-8"), set(MODULES))
    )


def room(module: str) -> str:
    _, _, inside = module.partition(".")
    first = inside.partition(".")[0]
    if first in VOCABULARY:
        return "vocabulary"
    return first if (ROOT / PACKAGE / first).is_dir() and first else "entrance"


def against_the_direction(imports: Set[Import]) -> set[str]:
    wrong = set()
    for one in imports:
        by, of = room(one.by), room(one.of)
        is_version = one.of == PACKAGE and one.name == "__version__"
        if by != of and of not in BELOW[by] and not is_version and (by, one.of) not in EXCEPTIONS:
            wrong.add(f"{one.by} -> {one.of}: {by} does not import {of}")
    return wrong


def private_names(imports: Set[Import]) -> set[str]:
    """Names of another file that begin with one underscore."""
    return {
        f"{one.by}: imports {one.name} of {one.of}"
        for one in imports
        if one.name.startswith("_") and not one.name.startswith("__") and one.by != one.of
    }


def cycles(imports: Set[Import]) -> set[str]:
    """Modules that can be reached from themselves. The root, which imports everything for its types, is left out."""
    after: dict[str, set[str]] = {}
    for one in imports:
        if PACKAGE not in (one.by, one.of):
            after.setdefault(one.by, set()).add(one.of)
    found = set()
    for start in after:
        seen: set[str] = set()
        waiting = set(after[start])
        while waiting:
            at = waiting.pop()
            seen.add(at)
            waiting |= after.get(at, set()) - seen
        if start in seen:
            found.add(f"{start}: imports itself by way of others")
    return found


def files_that_are_too_long(files: dict[str, str]) -> set[str]:
    counts = {name: len(text.splitlines()) for name, text in files.items()}
    return {f"{name}: {count} lines" for name, count in counts.items() if count > MOST_LINES}


def folders_that_are_too_full(files: list[str]) -> set[str]:
    counts = Counter(name.rpartition("/")[0] for name in files)
    return {f"{folder}: {count} files" for folder, count in counts.items() if count > MOST_FILES}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sources() -> dict[str, str]:
    return {relative(path): path.read_text(encoding="utf-8") for path in MODULES.values()}


def others() -> list[str]:
    return [relative(path) for top in OTHERS for path in (ROOT / top).rglob("*.py")]


def test_rooms_import_only_what_is_below_them() -> None:
    assert len(all_imports()) > 200, "the imports were not found"
    assert {room(name) for name in MODULES} <= set(BELOW)
    assert against_the_direction(all_imports()) == set()


def test_every_import_names_a_module_that_is_there() -> None:
    tried = all_imports() | {
        one
        for top in OTHERS
        for path in (ROOT / top).rglob("*.py")
        for one in imports_of(relative(path), path.read_text(encoding="utf-8"), set(MODULES))
    }
    assert {(one.by, one.of) for one in tried if one.of not in MODULES} == set()


def test_no_private_name_is_imported_by_another_file() -> None:
    assert private_names(all_imports()) == set()


def test_imports_go_in_no_circle() -> None:
    assert cycles(all_imports()) == set()


def test_judging_and_showing_know_no_torch() -> None:
    with_torch = {
        name
        for name, path in MODULES.items()
        if room(name) in WITHOUT_TORCH
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == "torch" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch")
    }
    assert with_torch == set()


def test_dashboards_know_reports_and_nothing_else() -> None:
    known = {one.of for one in all_imports() if room(one.by) == "dashboards" and room(one.of) != "dashboards"}
    assert known <= DASHBOARDS_KNOW


def test_a_file_of_the_package_can_be_read_in_one_sitting() -> None:
    assert files_that_are_too_long(sources()) == set()


def test_a_folder_can_be_taken_in_at_a_glance() -> None:
    files = [*sources(), *others()]
    assert folders_that_are_too_full(files) == set()


def test_every_wing_says_what_is_in_it_and_what_it_may_import() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name != PACKAGE:
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert len(said) > 40, f"{name} does not say what is in it"


def test_the_map_names_files_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"[\w/*]+\.py", text) if "*" not in name}
    there = [
        relative(path) for top in (PACKAGE, "callbacks", "dashboards", *OTHERS) for path in (ROOT / top).rglob("*.py")
    ]
    assert len(named) > 30
    assert [name for name in sorted(named) if not any(f"/{path}".endswith(f"/{name}") for path in there)] == []


def test_the_scripts_behind_figures_are_where_the_documentation_says() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "Makefile"]
    named = {name for page in pages for name in re.findall(r"\bbench/[\w/]+\.py", page.read_text(encoding="utf-8"))}
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


# --- that these can fail ----------------------------------------------------------------------------------


def test_meta_imports_of_every_form_are_found() -> None:
    source = (
        "import os, update_watch.a\nfrom update_watch import b\ndef f():\n    from update_watch.c.d import e\n"
        "    from update_watch.report import Report\n"
    )
    found = imports_of("update_watch.x", source, {"update_watch.b"})
    assert {(one.of, one.name) for one in found} == {
        ("update_watch.a", ""),
        ("update_watch.b", ""),
        ("update_watch.c.d", "e"),
        ("update_watch.report", "Report"),
    }


@pytest.mark.parametrize(
    ("by", "of"),
    [
        ("replay.twin", "measure.sampling"),
        ("measure.sums", "judge.diagnosis"),
        ("judge.diagnosis", "measure.sums"),
        ("dashboards.frame", "watch"),
        ("watch", "callbacks.lightning"),
        ("report", "judge.advice"),
    ],
)
def test_meta_an_import_upwards_is_seen(by: str, of: str) -> None:
    one = Import(f"{PACKAGE}.{by}", f"{PACKAGE}.{of}", "")
    assert len(against_the_direction({one})) == 1
    other = Import(f"{PACKAGE}.measure.sums", f"{PACKAGE}.replay.twin", "")
    assert against_the_direction({other}) == set()


def test_meta_private_names_and_circles_are_seen() -> None:
    there = Import(f"{PACKAGE}.measure.a", f"{PACKAGE}.measure.b", "_hidden")
    back = Import(f"{PACKAGE}.measure.b", f"{PACKAGE}.measure.a", "open")
    assert private_names({there, back}) == {f"{there.by}: imports _hidden of {there.of}"}
    assert len(cycles({there, back})) == 2
    assert cycles({there}) == set()


def test_meta_long_files_and_full_folders_are_seen() -> None:
    assert files_that_are_too_long({"a.py": "x\n" * 350, "b.py": "x\n" * 351}) == {"b.py: 351 lines"}
    names = [f"few/{i}.py" for i in range(18)] + [f"many/{i}.py" for i in range(19)]
    assert folders_that_are_too_full(names) == {"many: 19 files"}


def test_the_distribution_holds_every_folder_of_the_package() -> None:
    """A folder that is left out of `packages` is there in a checkout and missing for everybody else."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(
        ast.literal_eval(
            text[text.index("packages = [") + len("packages = ") : text.index("]\n", text.index("packages = [")) + 1]
        )
    )
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    # what is read, or put on another process's path, and imported by nobody
    assert listed == folders | {"update_watch.dashboards.report.page", "update_watch.run.startup"}
