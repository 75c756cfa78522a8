"""Settings are in pyproject.toml; here it is looked whether this checkout can be built, and the README's links are made absolute."""

import re
from pathlib import Path

from setuptools import setup

for name in ("callbacks", "dashboards"):
    link = Path("update_watch") / name
    if not link.is_dir():
        raise SystemExit(
            f"{link} should be a link to ../{name}, and is none: this checkout was made without symbolic links (Windows, a"
            " zip archive, core.symlinks=false). On Windows switch on developer mode; then run\n\n"
            "    git config core.symlinks true && git checkout -- update_watch\n\n"
            "and install again, or install a release, which has real folders: pip install update-watch"
        )


def description() -> str:
    """The README for a package index, where links relative to the repository lead nowhere."""
    [address] = re.findall(r'^Repository = "(.+)"$', Path("pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    text = re.sub(
        r"!\[([^]]*)\]\((?!https?:|#)", rf"![\1]({address}/raw/main/", Path("README.md").read_text(encoding="utf-8")
    )
    return re.sub(r"(?<!!)\[([^]]*)\]\((?!https?:|#)", rf"[\1]({address}/blob/main/", text)


setup(long_description=description(), long_description_content_type="text/markdown")
