"""The journal: one JSON line per window in an append-only file beside the run; every renderer reads it.

`journal` writes the file and `reader` reads it; `lines` is its schema, `table`, `columns`, `histograms`, `sentences` and
`of_run` the parts of a line, `packing` how those of many tensors are written; `scanning` looks through long files, `thinning` keeps it bounded. May import
`dashboards.frame`, `update_watch.report` and numpy, nothing else of this package.
"""

from update_watch.dashboards.journal.journal import Journal
from update_watch.dashboards.journal.reader import EmptyJournalError, JournalError, JournalReader, read_journal

__all__ = ["EmptyJournalError", "Journal", "JournalError", "JournalReader", "read_journal"]
