"""A stand-in for the GraphQL API of Prefect Server 1.x, in memory, for the real client, CLI and Agent.

Prefect Server is five container images, and not every machine can pull them. What Prefect 1.4.1 asks of it to
register, run, watch, cancel and log flows is little, and this module answers just that. What it does not
understand is an error to the client, and is kept in `PrefectAPI.errors` for the test to see.

It follows the server's rules (https://github.com/PrefectHQ/server, src/prefect_server/api) and the few
filters of Hasura (https://hasura.io/docs/1.0/graphql/core/queries/query-filters.html) that it is sent. Left
out: schedules, concurrency limits, Lazarus, zombie killer, artifacts, key-value store, tenants, any login.

`python -m tests.support.prefect_api --host 127.0.0.1 --port 4200` keeps one running in the foreground.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import operator
import os
import threading
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

from graphql import build_schema, graphql_sync
from prefect.engine.state import Cancelled, Cancelling, Failed, Pending, Scheduled, State
from prefect.utilities.graphql import decompress

logger = logging.getLogger(__name__)

# What the client asks for. It names the types of the inputs, too, but what is in them is said once, by the
# signatures in `Store`: here they are scalars.
SCHEMA = build_schema("""
scalar DateTime scalar JSON
scalar create_project_input scalar create_flow_input scalar create_flow_from_compressed_string_input
scalar register_tasks_input scalar register_edges_input scalar set_schedule_active_input
scalar create_flow_run_input scalar cancel_flow_run_input scalar set_flow_run_states_input
scalar set_task_run_states_input scalar set_task_run_name_input scalar write_run_logs_input
scalar register_agent_input scalar get_runs_in_queue_input

type Query {
  hello: String agent: [agent!] tenant: [tenant!] project(where: JSON): [project!]
  flow(where: JSON, order_by: JSON, limit: Int): [flow!] flow_by_pk(id: ID!): flow
  flow_run(where: JSON): [flow_run!] flow_run_by_pk(id: ID!): flow_run
  task_run(where: JSON, order_by: JSON, limit: Int): [task_run!] get_task_run_info(task_run_id: ID!): task_run
}
type Mutation {
  create_project(input: create_project_input!): project
  create_flow(input: create_flow_input!): flow
  create_flow_from_compressed_string(input: create_flow_from_compressed_string_input!): flow
  register_tasks(input: register_tasks_input!): success
  register_edges(input: register_edges_input!): success
  set_schedule_active(input: set_schedule_active_input!): success
  create_flow_run(input: create_flow_run_input!): flow_run
  cancel_flow_run(input: cancel_flow_run_input!): flow_run
  set_flow_run_states(input: set_flow_run_states_input!): set_states
  set_task_run_states(input: set_task_run_states_input!): set_states
  set_task_run_name(input: set_task_run_name_input!): success
  get_or_create_task_run_info(input: JSON!): task_run
  update_flow_run_heartbeat(input: JSON!): success
  write_run_logs(input: write_run_logs_input!): success
  register_agent(input: register_agent_input!): agent
  get_runs_in_queue(input: get_runs_in_queue_input!): queue
}
type agent { id: ID name: String labels: [String!] last_queried: DateTime }
type tenant { id: ID name: String slug: String }
type project { id: ID name: String }
type flow {
  id: ID name: String version: Int archived: Boolean settings: JSON core_version: String project: project
  flow_group_id: ID flow_group: flow_group
  serialized_flow: JSON storage: JSON run_config: JSON environment: JSON
}
type flow_group { labels: [String!] }
type flow_run {
  id: ID name: String flow_id: ID flow: flow updated: DateTime scheduled_start_time: DateTime
  labels: [String!] parameters: JSON context: JSON run_config: JSON
  version: Int state: String serialized_state: JSON states(where: JSON): [state!]
  task_runs(where: JSON): [task_run!] logs(where: JSON, order_by: JSON): [log!]
}
type task_run {
  id: ID name: String task_id: ID task: task map_index: Int flow_run_id: ID
  version: Int serialized_state: JSON state_start_time: DateTime
}
type task { id: ID slug: String }
type state { timestamp: DateTime created: DateTime start_time: DateTime serialized_state: JSON }
type log { timestamp: DateTime level: String message: String }
type success { success: Boolean }
type set_states { states: [set_state!] }
type set_state { id: ID status: String message: String }
type queue { flow_run_ids: [ID!] }
""")

SCHEDULED = ["Scheduled", "Resume", "Retrying", "Paused", "Queued"]  # what an agent may take, when it is due


class RefusedError(Exception):
    """The server's own "no" to a request that it understood: not kept in `PrefectAPI.errors`."""


def resolve(source: Any, info: Any, **args: Any) -> Any:
    """Answer a field of the schema from the attribute of its name: called, filtered or as it is."""
    value = getattr(source, info.field_name)
    if callable(value):
        return value(**args.get("input", args))
    return select(value, **args) if args else value


# ---------------------------------------------------------------------------------------------- filters

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "_eq": operator.eq,
    "_neq": operator.ne,
    "_gt": operator.gt,
    "_gte": operator.ge,
    "_lte": operator.le,
    "_in": lambda value, operand: value in operand,
    "_nin": lambda value, operand: value not in operand,
}


def select(rows: list[Any], where: Any = None, order_by: Any = None, limit: int | None = None) -> list[Any]:
    """The rows that pass the filter, in the order asked for, at most `limit` of them."""
    found = [row for row in rows if matches(row, where or {})]
    for column, direction in reversed((order_by or {}).items()):
        found.sort(key=operator.attrgetter(column), reverse={"asc": False, "desc": True}[direction])
    return found[:limit]


def matches(value: Any, where: dict[str, Any]) -> bool:
    """Whether a row, or the value of a column, passes the filter; of several rows one has to."""
    if isinstance(value, list):
        return any(matches(row, where) for row in value)
    results = [_passes(value, key, operand) for key, operand in where.items()]
    return all(results)  # not before all are there, so that nothing unknown is passed over


def _passes(value: Any, key: str, operand: Any) -> bool:
    if key in ("_and", "_or"):
        wheres = operand if isinstance(operand, list) else [operand]
        return (all if key == "_and" else any)([matches(value, where) for where in wheres])
    if key == "_is_null":
        return (value is None) == bool(operand)
    if key in OPERATORS:
        operand = time_of(operand) if isinstance(value, datetime) else operand
        return value is not None and OPERATORS[key](value, operand)  # as in SQL, null equals nothing
    if key.startswith("_"):
        raise NotImplementedError(f"operator {key}")
    return matches(getattr(value, key), operand)


# ------------------------------------------------------------------------------------------------ store


def new_id() -> str:
    return str(uuid.uuid4())


def time_of(text: str | None) -> datetime:
    """The time that an ISO 8601 text gives, in UTC unless it says otherwise; now without a text."""
    time = datetime.fromisoformat(text) if text else datetime.now(timezone.utc)
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


class RunState(NamedTuple):
    timestamp: datetime
    state: str
    message: str | None
    start_time: datetime | None
    serialized_state: dict[str, Any]
    created: datetime


class Log(NamedTuple):
    timestamp: datetime
    level: str
    name: str | None
    message: str | None


@dataclass(eq=False)
class Run:
    """What flow runs and task runs share: a history, whose last entry is the state that the run is in."""

    id: str = field(default_factory=new_id, init=False)
    states: list[RunState] = field(default_factory=list, init=False, repr=False)

    version = property(lambda self: len(self.states) - 1)  # a run begins as Pending with version 0
    state = property(lambda self: self.states[-1].state)
    message = property(lambda self: self.states[-1].message)
    serialized_state = property(lambda self: self.states[-1].serialized_state)
    state_start_time = property(lambda self: self.states[-1].start_time)
    state_timestamp = updated = property(lambda self: self.states[-1].timestamp)

    def enter(self, state: State) -> None:
        time, start_time = time_of(None), getattr(state, "start_time", None)
        entry = RunState(time, type(state).__name__, state.message, start_time, state.serialize(), time)
        self.states.append(entry)


@dataclass(eq=False)
class TaskRun(Run):
    flow_run: FlowRun = field(repr=False)
    task: SimpleNamespace
    map_index: int = -1
    name: str | None = None

    task_id = property(lambda self: self.task.id)
    cache_key = property(lambda self: self.task.cache_key)
    flow_run_id = property(lambda self: self.flow_run.id)
    flow = property(lambda self: self.flow_run.flow)


@dataclass(eq=False)
class FlowRun(Run):
    flow: SimpleNamespace = field(repr=False)
    name: str
    labels: list[str]
    parameters: dict[str, Any]
    context: dict[str, Any]
    run_config: dict[str, Any] | None
    scheduled_start_time: datetime
    idempotency_key: str | None
    task_runs: list[TaskRun] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list, repr=False)
    heartbeats: int = 0

    flow_id = property(lambda self: self.flow.id)

    @property
    def task_states(self) -> dict[str, str]:
        """The state of each task by its slug; of the children of a mapped task by slug[0], slug[1], ..."""
        keys = [r.task.slug + (f"[{r.map_index}]" if r.map_index >= 0 else "") for r in self.task_runs]
        return dict(zip(keys, [r.state for r in self.task_runs]))

    def __str__(self) -> str:
        """What the run has been through, for a test that gives up on it."""
        events = [(entry.timestamp, entry.state, entry.message) for entry in self.states]
        events += [(log.timestamp, log.level, log.message) for log in self.logs]
        lines = [
            f"{time:%H:%M:%S.%f} {kind}: {message}"
            for time, kind, message in sorted(events, key=lambda event: event[0])
        ]
        return "\n".join([f"flow run {self.name} {self.task_states}", *lines])

    def add_task_run(self, task: SimpleNamespace, map_index: int = -1) -> TaskRun:
        run = TaskRun(self, task, map_index)
        run.enter(Pending("Task run created"))
        self.task_runs.append(run)
        return run


class Store:
    """The server's data and rules: each field of Query and Mutation is the member of that name."""

    hello = "👋"
    success = SimpleNamespace(success=True)

    def __init__(self) -> None:
        self.tenant = [SimpleNamespace(id=new_id(), name="default", slug="default")]
        self.project: list[SimpleNamespace] = []
        self.agent: list[SimpleNamespace] = []
        self.flows: dict[str, SimpleNamespace] = {}
        self.flow_runs: dict[str, FlowRun] = {}

    flow = property(lambda self: list(self.flows.values()))
    flow_run = property(lambda self: list(self.flow_runs.values()))
    task_run = property(lambda self: [task_run for run in self.flow_run for task_run in run.task_runs])

    def flow_by_pk(self, id: str) -> Any:
        return self.flows.get(id)

    def flow_run_by_pk(self, id: str) -> Any:
        return self.flow_runs.get(id)

    def get_task_run_info(self, task_run_id: str) -> Any:
        return self._find(self.task_run, task_run_id, "Invalid task run ID")

    def _find(self, rows: list[Any], id: str, refusal: str) -> Any:
        for row in rows:
            if row.id == id:
                return row
        raise RefusedError(f"{refusal} {id}")

    def create_project(self, name: str, description: str | None, tenant_id: str) -> Any:
        if select(self.project, {"name": {"_eq": name}}):
            raise RefusedError("Uniqueness violation.")  # the words that the client takes for "there already"
        self.project.append(SimpleNamespace(id=new_id(), name=name))
        return self.project[-1]

    def create_flow_from_compressed_string(self, serialized_flow: str, **input: Any) -> Any:
        return self.create_flow(decompress(serialized_flow), **input)

    def create_flow(
        self,
        serialized_flow: dict[str, Any],
        project_id: str,
        version_group_id: str | None = None,
        set_schedule_active: bool = True,
        idempotency_key: str | None = None,
    ) -> Any:
        """Add a version to the project's flow of this name, unless the last one came with the same key."""
        if version_group_id:
            raise NotImplementedError("version_group_id")
        project = self._find(self.project, project_id, "Invalid project")
        versions = [f for f in self.flow if f.project is project and f.name == serialized_flow["name"]]
        if versions and idempotency_key and versions[-1].flow_group.idempotency_key == idempotency_key:
            return versions[-1]
        flow = SimpleNamespace(environment=None, settings={}, created=time_of(None), **serialized_flow)
        flow.id, flow.version, flow.archived, flow.project = new_id(), len(versions) + 1, False, project
        flow.flow_group = versions[-1].flow_group if versions else SimpleNamespace(id=new_id(), labels=None)
        flow.flow_group_id = flow.flow_group.id
        flow.flow_group.idempotency_key = idempotency_key
        flow.core_version, flow.serialized_flow = serialized_flow["__version__"], serialized_flow
        for old in versions:
            old.archived = True
        self.flows[flow.id] = flow
        flow.tasks = []
        self.register_tasks(flow.id, serialized_flow.get("tasks", []))
        return flow

    def register_tasks(self, flow_id: str, serialized_tasks: list[dict[str, Any]]) -> Any:
        """Add tasks to a flow: `Flow.register()` sends them apart from it, `prefect register` does not."""
        flow = self._find(self.flow, flow_id, "Invalid flow ID")
        known = {task.slug for task in flow.tasks}
        flow.tasks += [
            SimpleNamespace(id=new_id(), slug=task["slug"], cache_key=task.get("cache_key"))
            for task in serialized_tasks
            if task["slug"] not in known
        ]
        return self.success

    def set_schedule_active(self, **_: Any) -> Any:
        return self.success  # sent for flows without a schedule, too

    register_edges = set_schedule_active  # no answer depends on them

    def create_flow_run(
        self,
        flow_id: str,
        flow_run_name: str | None = None,
        idempotency_key: str | None = None,
        labels: list[str] | None = None,
        parameters: dict[str, Any] | None = None,
        context: dict[str, Any] | None = None,
        run_config: dict[str, Any] | None = None,
        scheduled_start_time: str | None = None,
    ) -> Any:
        """Schedule a run, for now if no time is given; a key that came before gives the run that it made."""
        flow = self._find(self.flow, flow_id, "Flow not found:")
        for run in self.flow_run:
            if idempotency_key and run.idempotency_key == idempotency_key and run.flow is flow:
                return run
        if flow.archived:
            raise RefusedError(f"Flow {flow_id} is archived.")
        parameters, run_config = parameters or {}, run_config or flow.run_config or {}
        if missing := {p["name"] for p in flow.parameters if p["required"]} - set(parameters):
            raise RefusedError(f"Required parameters were not supplied: {missing}")
        labels = sorted((run_config.get("labels") or []) if labels is None else labels)
        name = flow_run_name or f"{flow.name}-{len(self.flow_runs) + 1}"
        start_time = time_of(scheduled_start_time)
        run = FlowRun(flow, name, labels, parameters, context or {}, run_config or None, start_time, idempotency_key)
        run.enter(Pending("Flow run created"))
        run.enter(Scheduled("Flow run scheduled.", start_time=start_time))
        for task in flow.tasks:
            run.add_task_run(task)
        self.flow_runs[run.id] = run
        return run

    def get_or_create_task_run_info(self, flow_run_id: str, task_id: str, map_index: int) -> Any:
        run = self._find(self.flow_run, flow_run_id, "Invalid flow run ID")
        for task_run in run.task_runs:
            if (task_run.task_id, task_run.map_index) == (task_id, map_index):
                return task_run
        return run.add_task_run(self._find(run.flow.tasks, task_id, "Invalid task ID"), map_index)

    def set_flow_run_states(self, states: list[dict[str, Any]]) -> Any:
        """Add a state to each run, or refuse to with the words that the Agent knows such a refusal by."""
        done = []
        for item in states:
            run_id, state = item.get("flow_run_id") or item["task_run_id"], State.deserialize(item["state"])
            run = self._find([*self.flow_run, *self.task_run], run_id, "State update failed for run ID")
            # The server looks at versions only if the flow's settings say so, which by default they do not.
            # (VERSION_LOCKING_ERROR, which the client knows as well, comes from Prefect Cloud only.)
            locking = run.flow.settings.get("version_locking_enabled")
            if locking and item.get("version") not in (None, run.version):
                raise RefusedError(f"State update failed for run ID {run_id}: it has version {run.version}")
            if isinstance(run, TaskRun) and state.is_running() and run.flow_run.state != "Running":
                raise RefusedError(f"State update failed for run ID {run_id}: its flow run is not running")
            run.enter(state)
            if isinstance(run, FlowRun) and isinstance(state, Cancelled):
                for task_run in run.task_runs:
                    if not State.deserialize(task_run.serialized_state).is_finished():
                        task_run.enter(state)
            done.append(SimpleNamespace(id=run_id, status="SUCCESS", message=None))
        return SimpleNamespace(states=done)

    set_task_run_states = set_flow_run_states

    def cancel_flow_run(self, flow_run_id: str) -> Any:
        """Cancel a run; one that is running is told to (Cancelling), the rest is its CloudFlowRunner's."""
        run = self._find(self.flow_run, flow_run_id, "Invalid flow run ID")
        state = State.deserialize(run.serialized_state)
        if not state.is_finished():
            cancel: State = Cancelling("Flow run is cancelling")
            if not state.is_running():
                cancel = Cancelled("Flow run is cancelled")
            self.set_flow_run_states([{"flow_run_id": run.id, "state": cancel.serialize()}])
        return run

    def set_task_run_name(self, task_run_id: str, name: str) -> Any:
        self.get_task_run_info(task_run_id).name = name
        return self.success

    def update_flow_run_heartbeat(self, flow_run_id: str) -> Any:
        self._find(self.flow_run, flow_run_id, "Invalid flow run ID").heartbeats += 1
        return self.success

    def write_run_logs(self, logs: Any) -> Any:
        # `prefect execute flow-run` sends one log as it is, which GraphQL takes for a list of one.
        for log in [logs] if isinstance(logs, dict) else logs:
            run = self._find(self.flow_run, log["flow_run_id"], "Invalid flow run ID")
            entry = Log(time_of(log.get("timestamp")), log["level"], log.get("name"), log.get("message"))
            run.logs.append(entry)
        return self.success

    def register_agent(self, type: str, name: str, labels: list[str], tenant_id: str, agent_config_id: None) -> Any:
        self.agent.append(SimpleNamespace(id=new_id(), name=name, labels=labels, last_queried=None))
        return self.agent[-1]

    def get_runs_in_queue(self, tenant_id: str, before: str, labels: list[str]) -> Any:
        """The runs that are due, or running with a task due again, and that fit the agent's labels."""
        due = {"state": {"_in": SCHEDULED}, "state_start_time": {"_lte": before}}
        runs = select(self.flow_run, {"_or": [due, {"state": {"_eq": "Running"}, "task_runs": due}]})
        # An agent with labels takes runs with some of these and no other; one without, runs without.
        fit = [run.id for run in runs if set(run.labels) <= set(labels) and bool(run.labels) == bool(labels)]
        return SimpleNamespace(flow_run_ids=fit)


# ----------------------------------------------------------------------------------------------- server


class PrefectAPI(ThreadingHTTPServer):
    """Serves a `Store` over HTTP, from a thread of its own, as long as the `with` statement lasts.

    Args:
        host: the address to listen on. Pods use the address that their agent uses, so where there are any, it
            has to be one of this machine's own that leads here from a pod, too.
        port: the port to listen on; 0 takes any free one.

    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), _Handler)
        self.url = f"http://{host}:{self.server_port}"
        self.env = client_env(self.url)
        self.errors: list[str] = []  # what was asked for and is not understood: a test wants this empty
        self._store = Store()
        self.flows = self._store.flows
        self.flow_runs = self._store.flow_runs
        self._lock = threading.Lock()  # requests are answered one at a time

    def __enter__(self) -> PrefectAPI:
        poll = {"poll_interval": 0.02}  # how long shutdown() may take
        threading.Thread(target=self.serve_forever, kwargs=poll, name="prefect-api", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def create_flow_run(self, flow_id: str, **input: Any) -> str:
        """Create a run as the mutation of that name does, with its other arguments; returns the run's id."""
        with self._lock:
            return str(self._store.create_flow_run(flow_id, **input).id)

    def cancel(self, flow_run_id: str) -> None:
        with self._lock:
            self._store.cancel_flow_run(flow_run_id)

    def restart(self, flow_run_id: str) -> None:
        """Restart a failed run as the UI's button does. Tasks that had succeeded stay as they are."""
        with self._lock:
            run = self.flow_runs[flow_run_id]
            for task_run in run.task_runs:
                if State.deserialize(task_run.serialized_state).is_failed():
                    task_run.enter(Pending("Task run restarted"))
            run.enter(Scheduled("Flow run restarted"))

    def kill_zombies(self, flow_run_id: str) -> None:
        """Fail the run's tasks that are Running, as the zombie killer does when heartbeats are 10 minutes old."""
        with self._lock:
            for task_run in self.flow_runs[flow_run_id].task_runs:
                if task_run.state == "Running":
                    task_run.enter(Failed("No heartbeat detected from the remote task; marking the run as failed."))

    def lazarus(self, flow_run_id: str) -> None:
        """Reschedule a run as Lazarus does when heartbeats are 10 minutes old."""
        with self._lock:
            self.flow_runs[flow_run_id].enter(Scheduled("Rescheduled by a Lazarus process."))

    def answer(self, request: dict[str, Any], agent_id: str | None) -> tuple[int, Any]:
        """The HTTP status and body for a request: 400, as from Apollo, if it could not even be executed."""
        variables = request.get("variables")
        if isinstance(variables, str):  # the client sends JSON within JSON
            variables = json.loads(variables)
        with self._lock:
            for agent in self._store.agent:
                agent.last_queried = time_of(None) if agent.id == agent_id else agent.last_queried
            result = graphql_sync(
                SCHEMA, request["query"], self._store, variable_values=variables, field_resolver=resolve
            )
            for error in result.errors or []:
                if not isinstance(error.original_error, RefusedError):
                    self.errors.append(f"{error.message} in {request}")
                    logger.error("%s", self.errors[-1])
        return 400 if result.data is None else 200, result.formatted


class _Handler(BaseHTTPRequestHandler):
    server: PrefectAPI

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = self.server.answer(request, self.headers["X-PREFECT-AGENT-ID"])
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer, default=datetime.isoformat).encode())

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def client_env(url: str) -> dict[str, str]:
    """The environment that points the CLI, an agent or `prefect execute flow-run` at the API at this URL."""
    return {
        "PREFECT__BACKEND": "server",
        "PREFECT__CLOUD__API": url,
        # What a developer has set up for another server takes no part.
        "PREFECT__CLOUD__API_KEY": "",
        "PREFECT__USER_CONFIG_PATH": os.devnull,
        "PREFECT__BACKEND_CONFIG_PATH": os.devnull,
    }


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.prefect_api")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", default=4200, type=int, help="port to listen on (%(default)s)")
    options = parser.parse_args()
    logging.basicConfig()
    with PrefectAPI(options.host, options.port) as api, contextlib.suppress(KeyboardInterrupt):
        print(*(f"export {name}={value}" for name, value in api.env.items()), sep="\n", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
