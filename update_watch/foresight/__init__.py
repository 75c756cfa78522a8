"""What is known of the steps to come: `schedules` (learning rates), `rounding_curve` (what arrives of an update of a size),
`forecasts` and `divergence` (the results). `judge.forecast` puts them together. Vocabulary of everybody: imports nothing of the package.
"""
