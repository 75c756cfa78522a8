"""The journal: one JSON line per window in an append-only file beside the run; every renderer reads it."""
