"""Charts of the HTML report: functions from histories to Vega-Lite specifications, data included, one file per chart.

`parts` is what they share. A specification names styles and ranges; colours come from `palette`, names of tensors are
data and never part of an expression. May import the report's history, map and rows, nothing that draws or writes.
"""
