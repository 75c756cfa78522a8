"""Settings are in pyproject.toml; here is only looked whether this checkout can be built."""

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
setup()
