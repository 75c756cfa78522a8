"""`python -m update_watch`: the command `update-watch`."""

import sys

from update_watch.cli import main

sys.exit(main())
