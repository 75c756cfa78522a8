"""update-watch: did the stored weights receive what the optimizer intended, and if not, why?"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from update_watch import formats
    from update_watch.audit.audit import audit
    from update_watch.audit.table import Audit
    from update_watch.endings import close_all
    from update_watch.evidence import WindowEvidence
    from update_watch.foresight.schedules import Schedule
    from update_watch.report import (
        AccumulatorReport,
        Alert,
        Cause,
        Health,
        LayerReport,
        Level,
        Report,
        TensorReport,
    )
    from update_watch.thresholds import Thresholds
    from update_watch.watch import Watch, watch

__version__ = "0.1.0"

__all__ = [
    "AccumulatorReport",
    "Alert",
    "Audit",
    "Cause",
    "Health",
    "LayerReport",
    "Level",
    "Report",
    "Schedule",
    "StallExpected",
    "TensorReport",
    "Thresholds",
    "Watch",
    "WindowEvidence",
    "audit",
    "close_all",
    "formats",
    "watch",
]

# where each name lives, if not in `report`
_HOMES = {
    "Audit": "audit.table",
    "Schedule": "foresight.schedules",
    "StallExpected": "audit.table",
    "Thresholds": "thresholds",
    "Watch": "watch",
    "WindowEvidence": "evidence",
    "audit": "audit.audit",
    "close_all": "endings",
    "formats": "formats",
    "watch": "watch",
}


class _Package(types.ModuleType):
    """Loads what is asked for: the command's `--version`, `top` and `report` do without torch."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'update_watch' has no attribute {name!r}")
        module = importlib.import_module(f"update_watch.{_HOMES.get(name, 'report')}")
        value = getattr(module, name, module)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system binds a submodule to its name; of `watch` and `audit` the function is meant
        if isinstance(value, types.ModuleType) and name in _HOMES:
            value = getattr(value, name, value)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
