"""How numbers, names, formats and foreign text are written, wherever somebody reads them: advice, alerts, audit, diff, demo.

Names come from models and files that may be hostile: nothing of what is `printable` is obeyed by a terminal.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

_SHORT = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32", "float64": "FP64"}
# a `report.Cause` in two or three words, where there is no room for its sentence
_CAUSES = {
    "weight_rounding": "rounded away",
    "state_rounding": "state is rounded",
    "decay_rounding": "decay rounded away",
    "average_rounding": "average is rounded",
    "accumulation_rounding": "gradient sum is rounded",
    "overwritten": "overwritten",
    "not_copied_back": "masters not copied back",
    "average_diverges": "average diverges",
    "average_not_updated": "average not updated",
    "negligible_gradient": "gradient is round-off",
    "requires_grad_off": "frozen",
    "not_in_optimizer": "in no optimizer",
    "no_gradient": "no gradient",
    "zero_gradient": "gradient is 0",
    "zero_learning_rate": "learning rate is 0",
    "skipped_steps": "steps are skipped",
    "not_written": "not written",
    "non_finite": "NaN or infinity",
    "replicas_differ": "ranks differ",
    "not_replayable": "cannot be replayed",
}
_NAMES = 8  # of tensors, in a sentence
_LONGEST = 200  # characters of an error, in a sentence
_LONGEST_NAME = 100  # characters, in a table


def size(count: int) -> str:
    """Bytes for people: "1.5 MB" (units of 1000)."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    return f"{count} B" if unit == "B" else f"{amount:.3g} {unit}"


def cause_label(cause: str | None) -> str:
    """A `report.Cause` in two or three words; "" for none."""
    return "" if cause is None else _CAUSES.get(str(cause), str(cause).replace("_", " "))


def listed(names: Sequence[str], most: int = _NAMES) -> str:
    """Names for a sentence, the rest counted."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def short(dtype: str) -> str:
    """ "bfloat16" -> "BF16"."""
    return _SHORT.get(dtype, dtype or "low-precision")


def number(value: float) -> str:
    """Two significant digits: learning rates and factors."""
    return f"{value:.2g}"


def fixed(value: float | None) -> str:
    """Two decimals: efficiencies."""
    return "unknown" if value is None else f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def percent(share: float | None) -> str:
    """A share in percent that says 0% and 100% only when it is."""
    if share is None:
        return "an unknown share"
    if 0 < share < 0.005:
        return "under 1%"
    if 0.995 <= share < 0.99995:  # beyond it sums of FP32 and what a journal keeps of them differ
        return "over 99%"
    return f"{100 * share:.0f}%"


def last_looked(seen: int, until: int) -> str:
    """That nothing was looked at since the report of step `seen`, up to step `until`."""
    age = until - seen
    return f"Not looked at since the report of step {seen:,} ({age:,} {'step' if age == 1 else 'steps'} ago)"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def printable(text: str, longest: int | None = None) -> str:
    """`text` with one sign for all that a terminal would obey: escape sequences, line ends, writing direction.

    Args:
        longest: characters kept; of a longer text the beginning.
    """
    plain = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return plain if longest is None or len(plain) <= longest else f"{plain[:longest]}..."


def end_of(name: str) -> str:
    """A name as it stands in a table: where it is long its end, which says more than its beginning."""
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"...{name[-_LONGEST_NAME + 3 :]}"


def first_line(error: BaseException) -> str:
    """What an error says in its first line, fit for a message of one line."""
    text = str(error).strip().partition("\n")[0]
    return printable(text, _LONGEST) or type(error).__name__


# --- beside a progress bar -----------------------------------------------------------------------------


@contextlib.contextmanager
def above_progress_bars() -> Iterator[None]:
    """What is printed or logged inside stands in lines of its own: bars of tqdm and of rich are drawn again below it."""
    entered = contextlib.ExitStack()
    for bars in (_tqdm_cleared, _handlers_of_rich):
        with contextlib.suppress(Exception):  # a bar of an unusual kind costs its looks, no message
            entered.enter_context(bars())
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            entered.close()


def _tqdm_cleared() -> contextlib.AbstractContextManager[None]:
    """tqdm's own way of writing beside its bars; where none is drawn its lock is not even made."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is None or not getattr(tqdm, "_instances", None):
        return contextlib.nullcontext()
    cleared: contextlib.AbstractContextManager[None] = tqdm.external_write_mode(file=sys.stderr)
    return cleared


@contextlib.contextmanager
def _handlers_of_rich() -> Iterator[None]:
    """While rich draws, it stands in place of stdout and stderr: handlers made before write past it, unless they are told."""
    proxies = [stream for stream in (sys.stdout, sys.stderr) if type(stream).__module__ == "rich.file_proxy"]
    instead = {id(proxy.rich_proxied_file): proxy for proxy in proxies}  # type: ignore[union-attr]
    moved: list[tuple[logging.StreamHandler[Any], Any, Any]] = []
    at: logging.Logger | None = logging.getLogger("update_watch") if instead else None
    while at is not None:
        for handler in at.handlers:
            if isinstance(handler, logging.StreamHandler) and id(handler.stream) in instead:
                moved.append((handler, handler.stream, instead[id(handler.stream)]))
                handler.setStream(instead[id(handler.stream)])
        at = at.parent if at.propagate else None
    try:
        yield
    finally:
        for handler, own, proxy in moved:
            if handler.stream is proxy:
                handler.setStream(own)
