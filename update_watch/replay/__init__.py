"""The optimizer's rule once more, on FP32 copies, and how it is found out by which way it can be replayed.

May import torch and the root's `formats`; knows nothing of steps, samples or windows.
"""
