"""The picture in the README: the top of the report of the demo's run in BF16.

    python bench/pictures/demo.py [--run FOLDER] [--png docs/demo.png]

Runs the demo (about a minute) unless FOLDER holds one, and draws the report of its first run in Chromium.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from update_watch.dashboards.report import write_report
from update_watch.dashboards.report.picture import write_picture

HEIGHT, WIDTH = 880, 1240  # of the part that is shown, in the page's units


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, help="folder of an earlier `update-watch demo --out`")
    parser.add_argument("--png", type=Path, default=Path(__file__).parents[2] / "docs" / "demo.png")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.run or Path(scratch)
        journal, page = folder / "bf16.jsonl", Path(scratch) / "bf16.html"
        if not journal.exists():
            command = [sys.executable, "-m", "update_watch", "demo", "--out", str(folder)]
            subprocess.run(command, check=True)
        write_report([journal], page)
        write_picture(page, given.png, width=WIDTH, scale=1.0, height=HEIGHT)
    print(given.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
