"""What accumulates in a training and what rounding will take from it, before the first step.

`audit` asks, `table` is the answer; `members` are the parameters looked at, `weights` and `states` make the rows of it.
May import `replay`, `judge.advice`, `measure.parameters`, `measure.sampling`, `measure.tap` and the root's types and
`wording`. Nobody imports it but the entrances (root, command line, demo).
"""

from update_watch.audit.audit import audit

__all__ = ["audit"]
