"""From the numbers of a window to verdicts, advice and alerts: plain Python, no torch.

May import the root's `evidence`, `report`, `thresholds`.
"""
