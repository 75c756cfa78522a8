"""Thousands of tensors at the price of a few: a window's evidence as columns, and fields of reports that are made when asked for.

Part of the vocabulary: may import `evidence` and nothing beside it.
"""
