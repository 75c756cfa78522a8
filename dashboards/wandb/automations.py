"""W&B automations: W&B's server watches the logged metrics and writes to Slack, with no code in the training script.

They are an addition to the alerts that `WandbSink` sends: set once for a project, they also cover runs of people
who did not ask for alerts. W&B offers them on metrics of runs in Pro and Enterprise plans of its multi-tenant
cloud, and fires each at most once per run in 24 hours.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

from update_watch.dashboards.metrics import RUN_METRICS

INSTALL_HINT = "W&B automations need wandb: pip install 'update-watch[wandb]'"
PLAN_HINT = (
    "Automations on run metrics need a Pro or Enterprise plan on W&B's multi-tenant cloud and the right to change "
    "the project. WandbSink's own alerts need neither: see docs/wandb.md."
)


class AutomationError(RuntimeError):
    """The server did not take an automation; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Fires when the average of a metric over `rows` rows exceeds `threshold`."""

    name: str  # W&B knows it as "update-watch, <project>: <name>"
    metric: str  # name of a RunMetric
    threshold: float
    rows: int
    level: str  # INFO | WARN | ERROR
    title: str
    message: str

    @property
    def key(self) -> str:
        return next(m.key for m in RUN_METRICS if m.name == self.metric)

    def name_in(self, project: str) -> str:
        """Name of the automation; W&B wants names to differ beyond the project."""
        return f"update-watch, {project}: {self.name}"

    def filter(self) -> Any:
        """The condition as wandb has it."""
        from wandb.automations import RunEvent

        metric = RunEvent.metric(self.key)
        return (metric.avg(self.rows) if self.rows > 1 else metric) > self.threshold


RULES: tuple[Rule, ...] = (
    Rule(
        name="tensors stalled",
        metric="tensors_stalled",
        threshold=0.5,
        rows=2,  # two windows: one may be chance
        level="ERROR",
        title="Updates are stalled",
        message="The stored weights of a tensor no longer change. The run's summary names the tensor and the remedy "
        "(update_watch/headline, update_watch/worst.advice).",
    ),
    Rule(
        name="tensors broken",
        metric="tensors_broken",
        threshold=0.5,
        rows=1,
        level="ERROR",
        title="NaN or infinity in the weights",
        message="A watched tensor holds NaN or infinity; update_watch/worst.tensor in the run's summary names it.",
    ),
)


def describe(project: str) -> list[dict[str, Any]]:
    """What `run` would create, as plain data; no network."""
    _import()
    return [
        {
            **dataclasses.asdict(rule),
            "name": rule.name_in(project),
            "metric": rule.key,
            "filter": json.loads(rule.filter().model_dump_json()),
        }
        for rule in RULES
    ]


def run(entity: str, project: str, dry_run: bool) -> str:
    """The command: create the automations of RULES in a project; those that exist stay as they are.

    Returns:
        For a dry run the JSON of what would be created, else one line per automation.

    Raises:
        ImportError: wandb is missing.
        AutomationError: no Slack integration, or the plan, the server or the rights do not allow it.
    """
    if dry_run:
        return json.dumps({"entity": entity, "project": project, "automations": describe(project)}, indent=2)
    wandb, automations = _import()
    try:
        api = wandb.Api()
        scope = api.project(project, entity=entity)
        _ = scope.id  # asks the server: is there such a project?
        slack = next(iter(api.slack_integrations(entity=entity)), None)
    except Exception as error:  # what a server may answer has many types, most of them private
        raise AutomationError(
            f"W&B did not answer for {entity}/{project}: {error}. Check the names and the API key."
        ) from error
    if slack is None:
        raise AutomationError(
            f"The entity {entity} has no Slack integration. Connect one in the settings of the user or team on W&B, "
            "then run this again."
        )
    lines = [f"{slack.team_name}/{slack.channel_name} on Slack hears of {entity}/{project}:"]
    for rule in RULES:
        name = rule.name_in(project)
        try:
            # wandb's own use of its deprecated fields, which a user of ours can do nothing about
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                event = automations.OnRunMetric(scope=scope, filter=rule.filter())
                action = automations.SendNotification.from_integration(
                    slack, title=rule.title, text=rule.message, level=rule.level
                )
                api.create_automation(event >> action, name=name, description=rule.message, fetch_existing=True)
        except Exception as error:
            raise AutomationError(f"W&B did not create the automation {name!r}: {error}. {PLAN_HINT}") from error
        lines.append(f"  {name}: {rule.key} > {rule.threshold:g}")
    return "\n".join(lines)


def _import() -> tuple[Any, Any]:
    try:
        import wandb
        import wandb.automations
    except ImportError as error:
        raise ImportError(INSTALL_HINT) from error
    return wandb, wandb.automations
