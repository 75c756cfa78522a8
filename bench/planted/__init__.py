"""Scenarios: faults planted in real training, healthy twins, and the full comparison that says what really happened.

`run` holds what a scenario is, `optimizers` the rules that keep, lose or randomise what rounding takes, `faults` and `twins`
the scenarios themselves, `elsewhere` faults that are not of a step's rounding, `truth` the comparison in FP64. `bench/scenarios.py` plays them.
"""
