"""Code in the README and the docs runs as it is printed there, block after block, as a reader would paste it."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import update_watch as uw

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ARE_RUN = ("README.md", "fabric-and-plain-torch.md", "frozen-norms.md", "journal.md", "sinks.md", "unknown.md")


def blocks_of(page: Path) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [block for block in found if not block.startswith(">>> ")]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=lambda page: page.name)
def test_what_a_page_imports_and_names_is_there(page: Path) -> None:
    for block in blocks_of(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("update_watch"):
                module = importlib.import_module(str(node.module))
                there = {
                    *dir(module),
                    *getattr(module, "__all__", ()),
                }  # the callbacks import their trainer when they are used
                assert [name.name for name in node.names if name.name not in there] == []
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "uw":
                assert hasattr(uw, node.attr), node.attr


class Place:
    """What a reader has before the first line of a page: a model in BF16, its optimizer, and the trainer's names."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 4)).bfloat16()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        stub: Callable[..., Any] = lambda *given, **named: SimpleNamespace(given=given, **named)  # noqa: E731
        self.names: dict[str, Any] = {
            **{
                "model": self.model,
                "optimizer": self.optimizer,
                "plain": self.model,
                "step": 1,
                "torch": torch,
                "uw": uw,
            },
            "callbacks": SimpleNamespace(UpdateWatch=stub),
            "url": "http://127.0.0.1:9/nobody-listens",
            "Trainer": stub,
            "fabric": SimpleNamespace(setup=lambda model, optimizer: (model, optimizer)),
            "pd": SimpleNamespace(DataFrame=list),
        }

    def train(self) -> None:
        """Some steps of whatever is watched now, and the end of its window."""
        model, optimizer = self.names["model"], self.names["optimizer"]
        for _ in range(8):
            F.cross_entropy(model(torch.randn(4, 8).bfloat16()).float(), torch.tensor([0, 1, 2, 3])).backward()
            optimizer.step()
            optimizer.zero_grad()
        watch = self.names.get("watch")
        if watch is not None:
            watch.flush()


@pytest.mark.parametrize("name", ARE_RUN)
def test_the_blocks_of_a_page_run_one_after_the_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    place, opened = Place(), []
    # trainers take seconds to import, and have tests of their own
    monkeypatch.setitem(sys.modules, "update_watch.callbacks", place.names.pop("callbacks"))
    [page] = [page for page in PAGES if page.name == name]
    for block in blocks_of(page):
        exec(compile(block, f"{name}: {block.splitlines()[0]}", "exec"), place.names)
        if place.names.get("watch") not in (None, *opened):
            opened.append(place.names["watch"])
        place.train()
    for watch in opened:
        watch.close()
    kept = [path for path in tmp_path.rglob("*.jsonl") if '"kind":"window"' in path.read_text()]
    assert bool(kept) == any(word in block for block in blocks_of(page) for word in ("journal=", "Journal("))
    assert "Traceback" not in capsys.readouterr().err
