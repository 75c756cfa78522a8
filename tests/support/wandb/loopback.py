"""A W&B server on the loopback, small enough to read: GraphQL, file_stream and uploads, with faults on demand.

It answers what the real client asks during a run, and keeps what arrived:

    with LoopbackServer() as server:
        run = wandb.init(..., settings=server.settings())
        ...
    server.history, server.summary, server.config, server.alerts, server.uploads

Faults: `server.outage(seconds)` closes every connection unanswered, `server.fail("file_stream", 500, times=3)`
answers a kind of request with a status, `server.latency` delays every answer (seconds).
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "0" * 40
ENTITY = "loopback"


@dataclasses.dataclass
class Run:
    """What the server knows about one run."""

    name: str
    project: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by line number
    complete: bool = False
    exit_code: int | None = None


class LoopbackServer:
    """The server, running in threads of this process; a context manager."""

    def __init__(self) -> None:
        self.latency = 0.0  # seconds before every answer
        self.runs: dict[str, Run] = {}
        self.alerts: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}  # path -> content
        self.operations: list[tuple[str, dict[str, Any]]] = []  # GraphQL, in order of arrival
        self.unknown: list[str] = []  # GraphQL operations nobody wrote an answer for
        self.has_project = True
        self.views: dict[str, dict[str, Any]] = {}  # saved workspaces by id
        self.charts: dict[str, dict[str, Any]] = {}  # custom chart presets by entity/name
        self.automations: list[dict[str, Any]] = []
        self.integrations: list[dict[str, Any]] = []  # Slack integrations of the entity
        self.refused: dict[str, str] = {}  # GraphQL operation -> error message
        self.dropped = 0  # connections closed unanswered
        self._faults: dict[str, collections.deque[int]] = collections.defaultdict(collections.deque)
        self._down_until = 0.0  # time.monotonic
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = _QuietServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> LoopbackServer:  # noqa: PYI034  # typing.Self needs Python 3.11
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)

    # what arrived

    @property
    def run(self) -> Run:
        """The only run."""
        (run,) = self.runs.values()
        return run

    @property
    def history(self) -> list[dict[str, Any]]:
        return [self.run.history[line] for line in sorted(self.run.history)]

    def defined_metrics(self) -> dict[str, dict[str, Any]]:
        """Metric name (or glob) -> what `define_metric` said; W&B keeps it packed in the config under `_wandb.m`.

        Packed keys are field numbers of the client's MetricRecord: 1 name, 2 glob, 4 step metric, 5 index of the
        step metric (1-based).
        """
        packed = self.run.config["_wandb"]["value"]["m"]
        names = [m.get("1") or m.get("2") for m in packed]
        return {
            name: {"step_metric": m.get("4") or (names[m["5"] - 1] if "5" in m else None)}
            for name, m in zip(names, packed, strict=False)
        }

    # faults

    def outage(self, seconds: float) -> None:
        """Close every connection unanswered for so long, from now on."""
        self._down_until = time.monotonic() + seconds

    def fail(self, kind: str, status: int, times: int = 1) -> None:
        """Answer the next `times` requests of a kind with `status`: a GraphQL operation's name or "file_stream"."""
        self._faults[kind].extend([status] * times)

    def remaining_faults(self, kind: str) -> int:
        return len(self._faults[kind])

    def is_down(self) -> bool:
        return time.monotonic() < self._down_until

    def next_fault(self, kind: str) -> int | None:
        with self._lock:
            return self._faults[kind].popleft() if self._faults[kind] else None

    # the protocol

    def stream(self, run_name: str, body: dict[str, Any]) -> None:
        """A file_stream post: lines of history with their offset, the whole summary, the end."""
        with self._lock:
            run = self.runs[run_name]
            for file, chunk in (body.get("files") or {}).items():
                lines = [json.loads(line) for line in chunk["content"]] if file.endswith((".jsonl", ".json")) else []
                if file == "wandb-history.jsonl":
                    run.history.update({chunk["offset"] + i: row for i, row in enumerate(lines)})
                elif file == "wandb-summary.json":
                    run.summary = lines[-1]
            run.complete |= bool(body.get("complete"))
            run.exit_code = body.get("exitcode", run.exit_code)

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data for one GraphQL operation."""
        with self._lock:
            self.operations.append((operation, variables))
            method = getattr(self, "_" + re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower(), None)
            if method is None:
                self.unknown.append(operation)
                return {}
            answer: dict[str, Any] = method(variables)
            return answer

    def _viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "user", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "admin": False}
        return {"viewer": {**viewer, "name": ENTITY, "teams": {"edges": []}, "apiKeys": {"edges": []}}}

    def _server_features_query(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _run_resume_status(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        if run is None:
            return {"model": None}
        counts = {"logLineCount": 0, "historyLineCount": len(run.history), "eventsLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]), "eventsTail": "[]"}
        texts = {
            "summaryMetrics": json.dumps(run.summary),
            "config": json.dumps(run.config),
            "wandbConfig": json.dumps({"t": {"value": 1}}),
        }
        bucket = {"id": _global_id("Run", run.name), "name": run.name, "displayName": run.name, "tags": []}
        model = {"id": "project", "name": run.project, "entity": {"id": "entity", "name": ENTITY}}
        return {"model": {**model, "bucket": {**bucket, **counts, **tails, **texts}}}

    def _upsert_bucket(self, v: dict[str, Any]) -> dict[str, Any]:
        inserted = v["name"] not in self.runs
        run = self.runs.setdefault(v["name"], Run(v["name"], v["project"]))
        if v.get("config"):
            run.config = json.loads(v["config"])
        project = {"id": "project", "name": run.project, "entity": {"id": "entity", "name": ENTITY}}
        bucket = {"id": _global_id("Run", run.name), "name": run.name, "displayName": v.get("displayName") or run.name}
        rest = {"description": "", "config": None, "sweepName": None, "historyLineCount": len(run.history)}
        return {"upsertBucket": {"bucket": {**bucket, **rest, "project": project}, "inserted": inserted}}

    def _notify_scriptable_run_alert(self, v: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append(v)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _create_run_files(self, v: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": f, "uploadUrl": f"{self.url}/upload/{v['run']}/{f}"} for f in v["files"]]
        run_id = _global_id("Run", v["run"])
        return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}

    def _run_state(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"id": _global_id("Run", v["run"]), "state": "running"}}}

    def _artifact_type(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _create_artifact(self, v: dict[str, Any]) -> dict[str, Any]:
        artifact = {"id": f"artifact-{v['input']['clientID']}", "state": "PENDING"}
        return {"createArtifact": {"artifact": {**artifact, "artifactSequence": {"latestArtifact": None}}}}

    def _create_artifact_manifest(self, v: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "manifest", "uploadUrl": f"{self.url}/upload/manifest/{v['artifactID']}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"manifest-{v['artifactID']}", "file": file}}}

    def _update_artifact_manifest(self, v: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/upload/manifest/{v['artifactManifestID']}"
        file = {"id": "manifest", "uploadUrl": url, "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": v["artifactManifestID"], "file": file}}}

    def _create_artifact_files(self, v: dict[str, Any]) -> dict[str, Any]:
        def node(file: dict[str, Any]) -> dict[str, Any]:
            path = f"{file['artifactID']}/{file['name']}"
            url = {"storagePath": path, "uploadUrl": f"{self.url}/upload/{path}", "uploadHeaders": []}
            return {"node": {**url, "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}}

        files = v["input"]["artifactFiles"]
        return {"createArtifactFiles": {"files": {"edges": [node(f) for f in files]}}}

    def _commit_artifact(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": ""}}}

    def _create_custom_chart(self, v: dict[str, Any]) -> dict[str, Any]:
        name = f"{v['entity']}/{v['chartName']}"
        self.charts[name] = v
        return {"createCustomChart": {"chart": {"id": name}}}

    def _update_watch_views(self, _: dict[str, Any]) -> dict[str, Any]:
        nodes = [{"node": {k: view[k] for k in ("id", "name", "displayName")}} for view in self.views.values()]
        return {"project": {"allViews": {"edges": nodes}} if self.has_project else None}

    def _upsert_view2(self, v: dict[str, Any]) -> dict[str, Any]:
        view_id = v.get("id") or f"view-{len(self.views)}"
        inserted = view_id not in self.views
        self.views[view_id] = {**v, "id": view_id}
        return {"upsertView": {"view": {"id": view_id, "name": v["name"]}, "inserted": inserted}}

    def _integrations_by_entity(self, _: dict[str, Any]) -> dict[str, Any]:
        page = {"endCursor": None, "hasNextPage": False}
        return {"entity": {"integrations": {"pageInfo": page, "edges": [{"node": n} for n in self.integrations]}}}

    def _get_project(self, v: dict[str, Any]) -> dict[str, Any]:
        fields = {"id": _global_id("Project", v["name"]), "internalId": _global_id("ProjectInternalId", "1")}
        rest = {"name": v["name"], "entityName": v["entity"], "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False}
        return {"project": {**fields, **rest, "user": None, "tags": []} if self.has_project else None}

    def _create_automation(self, v: dict[str, Any]) -> dict[str, Any]:
        given = v["input"]
        self.automations.append(given)
        notification = given["triggeredActionConfig"]["notificationActionInput"]
        action = {"__typename": "NotificationTriggeredAction", "integration": self.integrations[0]}
        trigger = {
            "__typename": "Trigger",
            "id": f"trigger-{len(self.automations)}",
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
            "name": given["name"],
            "description": given["description"],
            "enabled": True,
            "scope": {"__typename": "Project", "id": given["scopeID"], "name": "p"},
            "event": {
                "__typename": "FilterEventTriggeringCondition",
                "eventType": given["triggeringEventType"],
                "filter": given["eventFilter"],
            },
            "action": {**action, **{k: notification[k] for k in ("title", "message", "severity")}},
        }
        return {"result": {"trigger": trigger}}


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may close a connection whenever they like."""


class _Handler(BaseHTTPRequestHandler):
    server_state: LoopbackServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        server, body = self.server_state, self._read_body()
        if self._is_dropped():
            return
        if self.path.endswith("/graphql"):
            self._graphql(json.loads(body))
        elif match := re.search(r"/files/[^/]+/[^/]+/([^/]+)/file_stream$", self.path):
            if (status := server.next_fault("file_stream")) is not None:
                return self._send(status, {"error": "fault"})
            server.stream(match[1], json.loads(body))
            self._send(200, {"exitcode": None, "limits": {}})
        else:
            self._send(404, {"error": self.path})

    def do_PUT(self) -> None:
        body = self._read_body()
        if not self._is_dropped():
            self.server_state.uploads[self.path.removeprefix("/upload/")] = body
            self._send(200, {})

    def do_GET(self) -> None:
        if not self._is_dropped():
            self._send(200 if self.path == "/" else 404, {})

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _graphql(self, request: dict[str, Any]) -> None:
        server = self.server_state
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", request["query"])
        operation = found[1] if found else "anonymous"
        if (status := server.next_fault(operation)) is not None:
            return self._send(status, {"errors": [{"message": f"fault {status}"}]})
        if operation in server.refused:
            return self._send(200, {"data": None, "errors": [{"message": server.refused[operation]}]})
        self._send(200, {"data": server.answer(operation, request.get("variables") or {})})

    def _is_dropped(self) -> bool:
        server = self.server_state
        if server.is_down():
            server.dropped += 1
            self.close_connection = True
            self.connection.close()
            return True
        time.sleep(server.latency)
        return False

    def _read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _global_id(kind: str, name: str) -> str:
    """Relay-style id, which the client decodes in places."""
    return base64.b64encode(f"{kind}:v1:{name}:project:{ENTITY}".encode()).decode()


@contextlib.contextmanager
def connected(server: LoopbackServer, monkeypatch: Any) -> Iterator[None]:
    """Inside, `wandb.Api()` of this process talks to `server` and to nothing else."""
    import wandb

    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    wandb.teardown()  # forgets the settings of earlier sessions of the process
    try:
        assert wandb.Api().settings["base_url"] == server.url
        server.operations.clear()
        yield
    finally:
        wandb.teardown()
