"""Training on several processes: one collective per window joins what the ranks have seen.

`joining` is the entrance (`Ranks`), `gloo_group` the connection, `shared_plan` what is sent, `weighted_means` how it adds up.
May import the root's `evidence`, `report`; runs on the judging thread.
"""
