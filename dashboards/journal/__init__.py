"""The journal: one JSON line per window in an append-only file beside the run; every renderer reads it.

`journal` writes and reads the file, `lines` and `columns` are its schema, `thinning` keeps it bounded. May import
`dashboards.frame`, `update_watch.report` and numpy, nothing else of this package.
"""

from update_watch.dashboards.journal.journal import (
    EmptyJournalError,
    Journal,
    JournalError,
    JournalReader,
    read_journal,
)

__all__ = ["EmptyJournalError", "Journal", "JournalError", "JournalReader", "read_journal"]
