"""Whether somebody else writes to a journal: another watch of this process, or another process."""

from __future__ import annotations

from typing import BinaryIO


def is_alone(file: BinaryIO) -> bool:
    """Whether nobody else has this file open for writing a journal; who asks first holds it until it is closed.

    True where that cannot be told: on Windows, and on file systems without locks.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
