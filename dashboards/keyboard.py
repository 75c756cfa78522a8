"""Single keys from a terminal, without waiting for Enter; nothing where there is no such terminal."""

from __future__ import annotations

import sys
import time
from typing import Any


class Keyboard:
    """A context in which keys can be taken; the terminal is as before when it ends."""

    def __init__(self) -> None:
        self._before: Any = None

    def __enter__(self) -> Keyboard:
        try:
            import termios
            import tty

            number = sys.stdin.fileno()
            if sys.stdin.isatty():
                self._before = termios.tcgetattr(number)
                tty.setcbreak(number)
        except (ImportError, OSError, ValueError, AttributeError):  # Windows, a pipe, a closed or replaced stdin
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            import termios

            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)
            self._before = None

    def wait(self, seconds: float) -> None:
        """Wait for a key, or so long."""
        if self._before is None:
            time.sleep(seconds)
            return
        import select

        select.select([sys.stdin], [], [], seconds)

    def take(self) -> str:
        """The key that was pressed; "" where none was."""
        if self._before is None:
            return ""
        import os
        import select

        if not select.select([sys.stdin], [], [], 0)[0]:
            return ""
        return os.read(sys.stdin.fileno(), 16).decode(errors="ignore")[:1]
