"""The HTML report: one file with charts, from a journal."""
