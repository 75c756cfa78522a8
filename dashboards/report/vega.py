"""Vega's scripts for a page, as one text: vl_convert makes it in seconds, so it is kept in the user's cache folder.

The file is named after vl_convert's version and begins with the SHA-256 of the rest: what another version made, was cut off or
belongs to somebody else is made anew. Where nothing can be written nothing is kept.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

from update_watch.dashboards.outputs import replace_text

_BUNDLE = "window.vegaEmbed = vegaEmbed;"
_HEAD = "// sha256 "


@functools.lru_cache(maxsize=1)
def vega() -> str:
    """The scripts.

    Raises:
        ImportError: vl_convert is not installed.
    """
    import vl_convert

    version = getattr(vl_convert, "__version__", "")
    path = _path(f"vega-{version}.js") if version else None
    kept = None if path is None else _read(path)
    if kept is None:
        kept = vl_convert.javascript_bundle(_BUNDLE)
        if path is not None:
            with suppress(OSError):
                replace_text(path, f"{_HEAD}{_digest(kept)}\n{kept}")
    # a closing tag inside a string would end the script element; Vega's bundle has none today
    return kept.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _path(name: str) -> Path | None:
    root = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    try:
        folder = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    except RuntimeError:  # nobody's home
        return None
    return folder / "update-watch" / name


def _read(path: Path) -> str | None:
    with suppress(OSError, ValueError):
        if hasattr(os, "geteuid") and path.stat().st_uid != os.geteuid():
            return None
        head, _, text = path.read_text(encoding="utf-8").partition("\n")
        if head == _HEAD + _digest(text):
            return text
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
