"""Settings and audit of a watch, in the config and summary of a W&B run."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from update_watch.dashboards.metrics import RUN_SECTION
from update_watch.dashboards.wandb.names import KeyNames

if TYPE_CHECKING:
    import wandb


# where the facts of a run are: beside a section of that name that its user has, as of a configuration file
_PLACES: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_BESIDE = f"{RUN_SECTION}_facts"


def _place(run: wandb.Run) -> str:
    if run not in _PLACES:
        found = run.config.get(RUN_SECTION)
        is_ours = found is None or (
            getattr(run, "resumed", False) and isinstance(found, Mapping)
        )  # of an earlier process
        is_users = not is_ours or _BESIDE in run.config
        _PLACES[run] = _BESIDE if is_users else RUN_SECTION
    return _PLACES[run]


def write_facts(run: wandb.Run, facts: Mapping[str, Any]) -> None:
    run.config.update({_place(run): _trim(facts)}, allow_val_change=True)  # type: ignore[no-untyped-call]
    audit = facts.get("audit")
    scalars = {k: v for k, v in audit.items() if isinstance(v, (str, int, float))} if isinstance(audit, Mapping) else {}
    if scalars:
        run.summary.update({f"{RUN_SECTION}/audit": _trim(scalars)})


def _trim(value: Any, items: int = 100, characters: int = 1_000) -> Any:
    """Plain data of bounded size; W&B reads a dot in a config key as nesting, so there are none."""
    if isinstance(value, Mapping):
        names = KeyNames()
        kept = {names[str(k)]: _trim(v) for k, v in list(value.items())[:items]}
        return {**kept, "more": len(value) - items} if len(value) > items else kept
    if isinstance(value, (list, tuple, set, frozenset)):
        listed = [_trim(v) for v in list(value)[:items]]
        return [*listed, f"and {len(value) - items} more"] if len(value) > items else listed
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    text = str(value)
    return text if len(text) <= characters else text[: characters - 1] + "…"
