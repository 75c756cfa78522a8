"""What happens in the step and on the device: hooks, samples, gathers, sums, and the vector that leaves at a window's end.

May import `replay`, and the root's `evidence`, `formats`, `report` types; never `judge`, `ranks` or anything above.
Nothing here reads from the device inside a step.
"""
