"""Weights & Biases: the sink, its workspace and its automations."""
