"""update-watch: did the stored weights receive what the optimizer intended, and if not, why?"""

from update_watch import formats
from update_watch.audit import audit
from update_watch.audit_table import Audit
from update_watch.evidence import WindowEvidence
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
    "TensorReport",
    "Thresholds",
    "Watch",
    "WindowEvidence",
    "audit",
    "formats",
    "watch",
]
