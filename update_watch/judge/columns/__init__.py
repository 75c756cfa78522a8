"""The verdicts on thousands of tensors at once: what most of them are is decided by masks on columns, the rest one by one.

`judge.diagnosis` says what is decided and `judge.efficiency_grade` how; here the same is done for all tensors side by side, and
`tests/judge/test_columns.py` holds one against the other. Nobody outside of `diagnosis` need know it.
"""
