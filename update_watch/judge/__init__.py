"""From the numbers of a window to verdicts, advice and alerts: plain Python and numbers, no torch.

`diagnosis` is the entrance; `efficiency_grade` and `accumulators` give the verdicts, `advice` and `reasons` their sentences,
`history` is what is remembered between windows, `run_summary` speaks of the run, `alerts` of its changes.
May import the root's `evidence`, `report`, `thresholds`, `wording`.
"""
