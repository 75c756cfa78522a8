"""What is said where a kernel of ours is not used, and torch's operators are: a line in the log and one warning."""

from __future__ import annotations

import logging

from update_watch.worker import warn

logger = logging.getLogger("update_watch")


def say(message: str, error: Exception) -> None:
    """`message`: what is used instead; `error`: why."""
    text = f"update-watch: {message}: {error!r}"
    logger.warning(text, exc_info=error)
    warn(text)
