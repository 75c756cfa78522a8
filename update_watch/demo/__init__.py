"""`update-watch demo`: a stall on real text within a minute, beside the same run with FP32 master weights.

Uses `watch`, `audit` and the dashboards as a user would.
"""
