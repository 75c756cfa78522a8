"""From the numbers of a window to verdicts, advice and alerts: plain Python and numbers, no torch.

`diagnosis` is the entrance; `no_signal`, `efficiency_grade`, `beyond_steps` and `accumulators` give verdicts; `advice` with its
sentences, `reasons` and `remedies` the words; `history` is kept between windows; `run_summary` and `headline` are of the run,
`alerts` of its changes. May import the root's vocabulary: `evidence`, `report`, `thresholds`, `wording`, `cures`, `naming`.
"""
