"""Whose is a tensor that an optimizer steps: the model's own, a master, a piece of a flat partition, a part of the optimizer.

May import `measure.sampling`; knows neither sums nor windows.
"""
