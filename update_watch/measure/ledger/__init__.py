"""The ledger: a few elements of every tensor before and after every step. `sheet` reads them, `ledger` says what they show.

May import what `measure` may, and nothing of `measure` that imports it.
"""
