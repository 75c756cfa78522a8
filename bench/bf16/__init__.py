"""Figures on BF16 weights: optimizers as the watch sees them, and the schemes that keep what rounding takes."""
