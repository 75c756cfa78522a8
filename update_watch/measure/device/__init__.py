"""What differs by device: streams and captures, how sums leave it, how samples are gathered on it.

Everything else in `measure` is the same arithmetic on every device.
"""
