"""Trainers that a development environment does not bring: each script runs its trainer, in a process of its own."""
