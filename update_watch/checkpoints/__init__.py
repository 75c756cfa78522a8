"""Checkpoint files: reading them without running anything in them, and what changed between two.

May import the root's `formats`; needs no training.
"""
