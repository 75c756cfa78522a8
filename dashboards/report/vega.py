"""Vega's scripts for a page, as one text: vl_convert makes it in seconds, so it is kept in the user's cache folder.

The file is named after vl_convert's version and begins with the SHA-256 of the rest: what another version made, was cut off or
belongs to somebody else is made anew. Where nothing can be written nothing is kept.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

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
            _keep(path, kept)
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
        head, _, text = path.read_bytes().decode("utf-8").partition("\n")
        if head == _HEAD + _digest(text):
            return text
    return None


def _keep(path: Path, text: str) -> None:
    """As a whole or not at all: others may be reading."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(f"{_HEAD}{_digest(text)}\n{text}".encode())
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
