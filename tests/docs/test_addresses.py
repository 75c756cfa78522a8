"""The public address is told in pyproject.toml; whoever repeats it says the same, and every link leads somewhere."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPEATS = ("CITATION.cff", "mkdocs.yml", "pyproject.toml")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def address() -> str:
    [found] = re.findall(r'^Repository = "(.+)"$', text_of("pyproject.toml"), re.MULTILINE)
    return str(found)


def test_whoever_repeats_the_address_says_that_of_pyproject() -> None:
    for name in REPEATS:
        told = re.findall(r"https?://[^\s\"')]*update-watch[^\s\"')]*", text_of(name))
        assert told, name
        assert [one for one in told if not (one + "/").startswith(address() + "/")] == [], name
    assert re.search(r'^version = "(.+)"$', text_of("pyproject.toml"), re.MULTILINE)[1] in text_of("CITATION.cff")  # type: ignore[index]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            slugs |= {found[1] for heading in headings if (found := re.search(r"\{#(.+)\}", heading))}
            assert anchor in slugs, link


def test_a_package_index_gets_absolute_links(monkeypatch: pytest.MonkeyPatch) -> None:
    import setuptools

    given: dict[str, str] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **told: given.update(told))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    runpy.run_path("setup.py")
    links = LINK.findall(given["long_description"])
    assert len(links) == len(LINK.findall(text_of("README.md"))) > 10
    assert [link for link in links if not link.startswith("https://")] == []
    assert f"{address()}/raw/main/docs/demo.png" in links
    assert f"{address()}/blob/main/docs/fix.md" in links
