"""A picture of an HTML file, through a headless Chromium that is on the machine anyway."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from update_watch.dashboards.outputs import signed_png

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=20000",
)
_SECONDS = 120
_TALLEST = 16_000  # pixels; what Chromium can still draw in one picture


def find_browser() -> str:
    """Path of a Chromium or Chrome.

    Raises:
        RuntimeError: there is none on the PATH.
    """
    for name in BROWSERS:
        found = shutil.which(name)
        if found:
            return found
    raise RuntimeError(
        f"A picture needs Chromium or Chrome, and none of {', '.join(BROWSERS)} is on the PATH. Install one (Debian: "
        "apt-get install chromium), or open the HTML report and print it."
    )


def write_picture(page: Path, png: Path, width: int = 1240, scale: float = 2.0, height: int | None = None) -> None:
    """Picture of the local file `page`, `width` pixels wide in the page's units.

    Args:
        height: pixels from the top in the page's units; None: the whole page.
        scale: picture pixels per pixel of the page.

    Raises:
        RuntimeError: there is no browser, or it makes no picture.
    """
    browser = find_browser()
    png = Path(png).absolute()
    png.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="update-watch-", ignore_cleanup_errors=True) as profile:
        flags = [*_FLAGS, f"--user-data-dir={profile}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chromium refuses to start as root with it
        url = Path(page).absolute().as_uri()
        # the page says how tall it is once its charts are drawn
        dumped = _run([browser, *flags, f"--window-size={width},1200", "--dump-dom", url])
        found = re.search(r'data-height="(\d+)"', dumped)
        if not found:
            raise RuntimeError(f"{browser} did not finish drawing {page}; open it in a browser to see why.")
        height = min(height or _TALLEST, int(found[1]), _TALLEST)
        shot = Path(profile) / "picture.png"
        window = f"--window-size={width},{height}"
        _run([browser, *flags, window, f"--force-device-scale-factor={scale:g}", f"--screenshot={shot}", url])
        if not shot.exists():
            raise RuntimeError(f"{browser} made no picture of {page}.")
        shot.write_bytes(signed_png(shot.read_bytes()))
        shutil.move(shot, png)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} did not finish within {_SECONDS} seconds.") from None
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"{command[0]} ended with code {done.returncode}: {' | '.join(last)}")
    return done.stdout.decode(errors="replace")
