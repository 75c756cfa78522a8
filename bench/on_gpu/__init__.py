"""Sections of bench/gpu.py. Each stands alone: a function that returns plain data."""
