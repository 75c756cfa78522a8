"""Weights & Biases: the sink that logs a run, its workspace as code, its automations.

`sink` is the entrance; `rows`, `names`, `grid`, `pictures`, `limits` say what is logged, how it is called and how often;
`workspace`, `charts`, `automations` are what is set up once for a project. May import `dashboards.metrics`,
`update_watch.report`, `kinds` and `naming`; wandb itself only where it is used.
"""

from update_watch.dashboards.wandb.sink import WandbSink

__all__ = ["WandbSink"]
