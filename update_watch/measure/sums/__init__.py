"""The sums of a window: how they are added up on the device, how they lie in the vector that leaves, what is made of them.

`layout` names them, `device_sums` adds, `packing` ends a window, `window_sums` makes ratios of them on the host, `error_bars` says how far
these may be from the truth. May import the root's vocabulary; `window_sums` and `error_bars` know no torch.
"""
