"""What happens in the step and on the device: hooks, samples, gathers, sums, and the vector that leaves at a window's end.

The way of a step: `tap` -> `watched_optimizer` -> `device_rows` (`cohort`, `gathers`, `step_replay`, `sums`) -> `transfer` ->
`window_evidence`, which runs on the judging thread. `parameters`, `sampling` and `positions` say what is read of a tensor, `device.turns` when.
May import `replay` and the root's vocabulary; never `judge`, `ranks` or anything above.
Nothing here reads from the device inside a step.
"""
