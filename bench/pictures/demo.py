"""The picture in the README, and the demo's report in the docs: the demo is run, its journals are kept.

    python bench/pictures/demo.py [--run FOLDER]

Runs the demo (about a minute; on a quiet machine, as the page says what watching cost) unless FOLDER holds one. Its journals go to
docs/demo, from which `make docs` makes the page, and the top of the report of its first run to docs/demo.png, by Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from update_watch.dashboards.report import write_report
from update_watch.dashboards.report.picture import write_picture

HEIGHT, WIDTH = 880, 1240  # of the part that is shown, in the page's units
DOCS = Path(__file__).parents[2] / "docs"
RUNS = ("bf16.jsonl", "fp32-masters.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, help="folder of an earlier `update-watch demo --out`")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.run or Path(scratch)
        if given.run is None:
            command = [sys.executable, "-m", "update_watch", "demo", "--out", str(folder), "--wandb", "disabled"]
            subprocess.run(command, check=True)
        for name in RUNS:
            shutil.copy(folder / name, DOCS / "demo" / name)
        page = Path(scratch) / "page.html"
        write_report([DOCS / "demo" / RUNS[0]], page)
        write_picture(page, DOCS / "demo.png", width=WIDTH, scale=1.0, height=HEIGHT)
    print(DOCS / "demo.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
