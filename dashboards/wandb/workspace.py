"""The W&B workspace as code: five questions, each a section of charts.

`workspace_spec` builds it without a network; `save_workspace` saves it under one name and updates it in place.
Everything drawn is a key of `update_watch.dashboards.metrics`. Needs `wandb-workspaces` 0.4: what is sent to the
server is read from a private attribute of it, so another version has to be tried before it is allowed.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from update_watch.dashboards import metrics
from update_watch.dashboards.wandb.charts import CHARTS, HEADROOM_CHART, HEATMAP_CHART, Chart

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

NAME = "Update watch"
INSTALL_HINT = "The W&B workspace needs wandb and wandb-workspaces: pip install 'update-watch[wandb]'"
STEP_KEY = "trainer/global_step"

_VIEWS_QUERY = """
query UpdateWatchViews($entityName: String, $projectName: String) {
  project(name: $projectName, entityName: $entityName) {
    allViews(viewType: "project-view") { edges { node { id name displayName } } }
  }
}
"""


_logger = logging.getLogger(__name__)


class WorkspaceError(RuntimeError):
    """The server did not take the workspace; the message says what to do."""


def workspace_spec(entity: str, project: str, step_key: str = STEP_KEY) -> dict[str, Any]:
    """What is saved, as plain data; no network. Panel ids are random, as W&B wants them.

    `step_key` is the one given to `WandbSink`.
    """
    spec: dict[str, Any] = json.loads(json.dumps(_build(entity, project, step_key)._spec))
    return spec


def save_workspace(entity: str, project: str, step_key: str = STEP_KEY, name: str = NAME) -> str:
    """Save the workspace `name` of a project, in place of one that has this name, and its two chart presets.

    Returns:
        Its address.

    Raises:
        ImportError: wandb or wandb-workspaces is missing.
        WorkspaceError: the server refused.
    """
    workspace = _build(entity, project, step_key, name)
    import wandb
    from wandb_workspaces._graphql import execute_graphql

    try:
        api = wandb.Api()
        _save_charts(api, entity)
        found = execute_graphql(api, _VIEWS_QUERY, {"entityName": entity, "projectName": project})
        for view in _views(found):
            if view["displayName"] == name:
                workspace._internal_id, workspace._internal_name = view["id"], view["name"]
                break
        workspace.save()  # type: ignore[no-untyped-call]
    except Exception as error:  # what a server may answer has many types, most of them private
        hint = "Is the entity's name right, does the project exist, and may this API key write to it?"
        raise WorkspaceError(
            f"W&B did not save the workspace of {entity}/{project}: {_sentence(error)} {hint}"
        ) from error
    return str(workspace.url)


def run(entity: str, project: str, dry_run: bool, step_key: str = STEP_KEY) -> str:
    """The command: the JSON of the workspace for a dry run, else the address under which it was saved."""
    if dry_run:
        return json.dumps(workspace_spec(entity, project, step_key), indent=2)
    return save_workspace(entity, project, step_key)


def _views(found: dict[str, Any]) -> Iterator[dict[str, str]]:
    if found.get("project") is None:
        raise LookupError("the project was not found.")
    for edge in found["project"]["allViews"]["edges"]:
        yield edge["node"]


def _save_charts(api: Any, entity: str) -> None:
    for chart in CHARTS:
        try:
            api.create_custom_chart(
                entity=entity,
                name=chart.name,
                display_name=chart.title,
                spec_type="vega2",
                access="private",
                spec=chart.spec,
            )
        except Exception as error:  # noqa: BLE001  # the rest of the workspace is worth saving without it
            # Whether it is there from an earlier time, the server says in words only.
            _logger.warning(
                "The chart preset %s was not made: %s If it is not there from an earlier time, its panel stays empty.",
                chart.preset(entity),
                _sentence(error),
            )


def _sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."


def _build(entity: str, project: str, step_key: str, name: str = NAME) -> Workspace:
    ws, _ = _import()
    workspace: Workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        settings=ws.WorkspaceSettings(x_axis=step_key, group_by_prefix="first"),
        sections=_sections(entity, step_key),
    )
    return workspace


def _import() -> tuple[Any, Any]:
    """`wandb_workspaces.workspaces` and `.reports.v2`; untyped, as neither exports its names explicitly."""
    try:
        # The library's own use of old pydantic validators, which a user of ours can do nothing about.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return (
                importlib.import_module("wandb_workspaces.workspaces"),
                importlib.import_module("wandb_workspaces.reports.v2"),
            )
    except ImportError as error:
        raise ImportError(f"{INSTALL_HINT} ({error})") from error  # one that is there may be too old


def _sections(entity: str, step_key: str) -> list[Section]:
    ws, wr = _import()

    def key(name: str) -> str:
        return next(m.key for m in metrics.RUN_METRICS if m.name == name)

    def lines(title: str, *names: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x=step_key, y=[key(n) for n in names], **options)

    def number(title: str, name: str) -> Any:
        return wr.ScalarChart(title=title, metric=key(name), groupby_aggfunc="max")

    def series(title: str, section: metrics.Series, **options: Any) -> Any:
        prefix = section.key("")
        return wr.LinePlot(title=title, x=step_key, metric_regex=f"^{prefix}.*", max_runs_to_show=1, **options)

    def custom(chart: Chart) -> Any:
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": chart.table}},
            chart_name=chart.preset(entity),
            chart_fields=chart.fields,
            chart_strings=chart.strings,
        )

    # Sections flow: the grid says how large a panel is.
    def grid(columns: int, rows: int) -> Any:
        return ws.SectionLayoutSettings(columns=columns, rows=rows)

    return [
        ws.Section(
            name="Is anything stalled?",
            is_open=True,
            pinned=True,
            layout_settings=grid(columns=3, rows=3),
            panels=[
                wr.MediaBrowser(title="Verdict, and what to change", media_keys=[metrics.VERDICT], num_columns=1),
                number("Tensors stalled", "tensors_stalled"),
                number("Tensors stalling", "tensors_stalling"),
                number("Tensors broken (NaN, infinity)", "tensors_broken"),
                lines("Efficiency: all, and the worst tensor", "efficiency", "efficiency_worst", range_y=(0.0, 1.05)),
                lines("Share of updates lost, of the model stalled", "lost_fraction", "stalled_share", range_y=(0, 1)),
                lines("Alerts", "alert", range_y=(0, 1)),
                wr.WeavePanelSummaryTable(table_name=metrics.TENSORS),
                lines(
                    "Weights grow as steps to the power of: above 2.5 for long, it blows up", "divergence_weight_growth"
                ),
            ],
        ),
        ws.Section(
            name="Which kinds, since when",
            is_open=True,
            layout_settings=grid(columns=1, rows=3),
            panels=[
                custom(HEATMAP_CHART),
                series("What arrives, by kind", metrics.BY_KIND, range_y=(0.0, 1.05)),
                series("What arrives, tensors that are not well", metrics.BY_TENSOR, range_y=(0.0, 1.05)),
            ],
        ),
        ws.Section(
            name="How far may the learning rate fall",
            is_open=True,
            layout_settings=grid(columns=2, rows=3),
            panels=[
                lines(
                    "Update to weight: BF16 loses what is under 2^-9, keeps what is over 2^-8",
                    "update_ratio",
                    "applied_ratio",
                    log_y=True,
                ),
                lines("Learning rate margin (under 1 more than half is lost)", "lr_margin", log_y=True),
                wr.LinePlot(title="Headroom: octaves above half a gap", x=step_key, y=[metrics.HEADROOM]),
                custom(HEADROOM_CHART),
                lines(
                    "Forecast at this schedule: share of the model stalled at its end, of the movement lost till then",
                    "forecast_stalling_share",
                    "forecast_lost_share",
                    range_y=(0.0, 1.0),
                ),
                lines(
                    "Forecast at this schedule: the step at which the next tensor begins to stall", "forecast_from_step"
                ),
            ],
        ),
        ws.Section(
            name="Optimizer state",
            layout_settings=grid(columns=3, rows=1),
            panels=[
                lines("Worst accumulator", "state_efficiency_worst", range_y=(0.0, 1.05)),
                lines("Update by stored state over FP32 state (healthy: 0.67 to 1.5)", "state_update_factor"),
                lines("Weight decay that arrives", "decay_efficiency", range_y=(0.0, 1.05)),
            ],
        ),
        ws.Section(
            name="Cost",
            layout_settings=grid(columns=3, rows=1),
            panels=[
                lines("Watching, ms per step", "cost_ms"),
                lines("Steps skipped for overflow, per window", "skipped_steps"),
                lines("Tensors idle, frozen, unknown", "tensors_idle", "tensors_frozen", "tensors_unknown"),
            ],
        ),
    ]
