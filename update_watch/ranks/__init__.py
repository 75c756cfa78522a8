"""Training on several processes: one collective per window joins what the ranks have seen.

May import `evidence`, `report` and `measure`; runs on the judging thread.
"""
