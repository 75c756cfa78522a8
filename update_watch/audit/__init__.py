"""What accumulates in a training and what rounding will take from it, before the first step.

May import `replay`, `measure.sampling` and the root's types.
"""

from update_watch.audit.audit import audit

__all__ = ["audit"]
