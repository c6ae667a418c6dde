"""A stand-in for the API of Prefect Server 1.x, in memory, for the real client, CLI and Agent.

Prefect Server is five container images, and not every machine can pull them. This module answers
what Prefect 1.4.1 asks to register, run, watch, cancel and log flows. All else is an error to the
client, and is kept in `PrefectAPI.errors` for the test to see.

It follows the server's rules (https://github.com/PrefectHQ/server, src/prefect_server/api), the few
filters of Hasura (https://hasura.io/docs/1.0/graphql/core/queries/query-filters.html) that it is
sent, and what Apollo and PostgreSQL refuse. Where it matters to a test or to a page, it was
compared with the real server. Its services, and the buttons of the UI, act when a test says so.
"""

import json
import operator
import os
import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

from graphql import build_schema, graphql_sync
from prefect.engine.state import Cancelled, Cancelling, Failed, Pending, Resume, Scheduled, State
from prefect.utilities.graphql import decompress

from tests.support.background_server import BackgroundServer, QuietHandler

# By what they answer. What is in their inputs is said once, by the signatures in `Store`.
MUTATIONS = {
    "project": "create_project",
    "flow": "create_flow_from_compressed_string",
    "flow_run": "create_flow_run cancel_flow_run",
    "task_run": "get_or_create_task_run_info",
    "set_states": "set_flow_run_states set_task_run_states",
    "success": "register_tasks register_edges set_schedule_active"
    " update_flow_run_heartbeat write_run_logs",
    "agent": "register_agent",
    "queue": "get_runs_in_queue",
}
NAMES = {name: answer for answer, names in MUTATIONS.items() for name in names.split()}
INPUTS = " ".join(f"scalar {name}_input" for name in NAMES)
FIELDS = " ".join(f"{name}(input: {name}_input!): {answer}" for name, answer in NAMES.items())
TYPES = """
scalar DateTime scalar JSON
type Query {
  hello: String agent: [agent!] tenant: [tenant!] project(where: JSON): [project!]
  flow(where: JSON, order_by: JSON, limit: Int): [flow!] task_run(where: JSON): [task_run!]
  flow_run(where: JSON): [flow_run!] flow_run_by_pk(id: ID!): flow_run
}
type agent { id: ID name: String labels: [String!] last_queried: DateTime }
type tenant { id: ID name: String slug: String } type project { id: ID name: String }
type flow {
  id: ID name: String version: Int archived: Boolean settings: JSON core_version: String
  project: project flow_group: flow_group serialized_flow: JSON storage: JSON
  run_config: JSON environment: JSON
}
type flow_group { labels: [String!] }
type flow_run {
  id: ID name: String flow_id: ID flow: flow updated: DateTime scheduled_start_time: DateTime
  labels: [String!] parameters: JSON context: JSON run_config: JSON
  version: Int state: String serialized_state: JSON states: [state!] times_resurrected: Int
  task_runs(where: JSON): [task_run!] logs(where: JSON, order_by: JSON): [log!]
}
type task_run {
  id: ID name: String task_id: ID task: task map_index: Int flow_run_id: ID version: Int
  serialized_state: JSON
}
type task { id: ID slug: String } type state { timestamp: DateTime serialized_state: JSON }
type log { timestamp: DateTime level: String message: String } type success { success: Boolean }
type set_states { states: [set_state!] } type set_state { id: ID status: String message: String }
type queue { flow_run_ids: [ID!] }
"""
SCHEMA = build_schema(f"{TYPES} {INPUTS} type Mutation {{ {FIELDS} }}")

SCHEDULED = [
    "Scheduled",
    "Resume",
    "Retrying",
    "Paused",
    "Queued",
]  # what an agent may take, when it is due
RESTARTED = [
    "Failed",
    "TimedOut",
    "TriggerFailed",
    "Cancelled",
]  # the tasks that the button of the UI resets
LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
BODY_LIMIT = 5 * 1024 * 1024  # bytes
STATE_LIMIT = 1_000_000  # bytes of a state as JSON
SUBMITTED_SECONDS = 30  # so long after a run was Submitted it cannot be Submitted again
QUEUE_LENGTH = 25  # at most so many runs are given to an Agent at once
QUEUE_WINDOW = 3 * QUEUE_LENGTH  # so many due runs are looked at, before their labels are
RESURRECTIONS = 3  # so often Lazarus reschedules a run
APOLLO_ERROR = "request to http://graphql:4201/graphql/ failed, reason: connect ECONNREFUSED"
NUL_REFUSED = "unsupported Unicode escape sequence"
NUL = re.compile(r"\0|(?<!\\)(?:\\\\)*\\u0000")  # as it is, or escaped in JSON


class RefusedError(Exception):
    """The server's own "no" to a request that it understood: not kept in `PrefectAPI.errors`."""


class BadRequestError(RefusedError):
    """A "no" before anything is done, because of the type of an input: HTTP 400."""


def resolve(source: Any, info: Any, **args: Any) -> Any:
    """Answer a field of the schema from the attribute of its name: called, filtered or as it is."""
    value = getattr(source, info.field_name)
    if callable(value):
        return value(**args.get("input", args))
    return select(value, **args) if args else value


OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "_eq": operator.eq,
    "_gt": operator.gt,
    "_lte": operator.le,
    "_in": lambda value, operand: value in operand,
    "_nin": lambda value, operand: value not in operand,
}


def select(
    rows: list[Any], where: Any = None, order_by: Any = None, limit: int | None = None
) -> list[Any]:
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
    if key in OPERATORS:
        operand = time_of(operand) if isinstance(value, datetime) else operand
        return value is not None and OPERATORS[key](
            value, operand
        )  # as in SQL, null equals nothing
    if key.startswith("_"):
        raise NotImplementedError(f"operator {key}")
    if key == "id" or key.endswith("_id"):
        for ids in operand.values():
            check_ids(*(ids if isinstance(ids, list) else [ids]))
    return matches(getattr(value, key), operand)


def new_id() -> str:
    return str(uuid.uuid4())


def check_ids(*ids: str) -> None:
    """Refuse what is no UUID, as PostgreSQL does."""
    for found in ids:
        if not re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", str(found)):
            raise RefusedError(f"invalid input syntax for type uuid: {found!r}")


def time_of(text: str | None) -> datetime:
    """The time that an ISO 8601 text gives, in UTC unless it says otherwise; now without a text."""
    time = datetime.fromisoformat(text) if text else datetime.now(timezone.utc)
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def timestamptz(time: datetime) -> str:
    """A time as PostgreSQL gives it back: its fraction of a second without zeros at the end.

    Python 3.10's `datetime.fromisoformat` refuses such a text.
    """
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f".{time.microsecond:06}".rstrip("0").rstrip(".")
    return f"{seconds}{fraction}+00:00"


def jsonb(value: Any) -> Any:
    """A value as PostgreSQL gives it back: the keys of objects by their length, then by name."""
    if isinstance(value, list):
        return [jsonb(each) for each in value]
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: (len(name), name))
        return {name: jsonb(value[name]) for name in names}
    return value


@dataclass(eq=False)
class Run:
    """What flow runs and task runs share: a history, whose last entry is the current state."""

    id: str = field(default_factory=new_id, init=False)
    states: list[SimpleNamespace] = field(default_factory=list, init=False, repr=False)

    version = property(lambda self: len(self.states))
    state = property(lambda self: self.states[-1].state)
    message = property(lambda self: self.states[-1].message)
    serialized_state = property(lambda self: self.states[-1].serialized_state)
    state_start_time = property(lambda self: self.states[-1].start_time)
    updated = property(lambda self: self.states[-1].timestamp)

    def enter(self, state: State) -> None:
        entry = SimpleNamespace(
            timestamp=time_of(None), state=type(state).__name__, message=state.message
        )
        entry.start_time = getattr(state, "start_time", None)
        entry.serialized_state = jsonb(state.serialize())
        self.states.append(entry)


@dataclass(eq=False)
class TaskRun(Run):
    flow_run: "FlowRun" = field(repr=False)
    task: SimpleNamespace
    map_index: int = -1
    name: str | None = None

    task_id = property(lambda self: self.task.id)
    flow_run_id = property(lambda self: self.flow_run.id)


@dataclass(eq=False)
class FlowRun(Run):
    flow: SimpleNamespace = field(repr=False)
    name: str
    labels: list[str]
    parameters: dict[str, Any]
    context: dict[str, Any]
    run_config: dict[str, Any] | None
    scheduled_start_time: datetime
    idempotency_key: str | None = None
    times_resurrected: int = 0
    submitted_at: datetime | None = None
    task_runs: list[TaskRun] = field(default_factory=list)
    logs: list[SimpleNamespace] = field(default_factory=list, repr=False)
    heartbeats: int = 0

    flow_id = property(lambda self: self.flow.id)

    @property
    def task_states(self) -> dict[str, str]:
        """The state of each task by its slug; of mapped ones by slug[0], slug[1], ..."""
        return {
            r.task.slug + (f"[{r.map_index}]" if r.map_index >= 0 else ""): r.state
            for r in self.task_runs
        }

    def __str__(self) -> str:
        """What the run has been through, for a test that gives up on it."""
        events = [(entry.timestamp, entry.state, entry.message) for entry in self.states]
        events += [(log.timestamp, log.level, log.message) for log in self.logs]
        lines = [
            f"{time:%H:%M:%S.%f} {kind}: {message}"
            for time, kind, message in sorted(events, key=lambda e: e[0])
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
        self.asking_agent_id: str | None = None  # from a header of the request

    flow = property(lambda self: list(self.flows.values()))
    flow_run = property(lambda self: list(self.flow_runs.values()))
    task_run = property(
        lambda self: [task_run for run in self.flow_run for task_run in run.task_runs]
    )

    def flow_run_by_pk(self, id: str) -> Any:
        check_ids(id)
        return self.flow_runs.get(id)

    def _find(self, rows: list[Any], id: str, refusal: str) -> Any:
        check_ids(id)
        for row in rows:
            if row.id == id:
                return row
        raise RefusedError(f"{refusal} {id}")

    def create_project(self, name: str, **_: Any) -> Any:
        if select(self.project, {"name": {"_eq": name}}):
            raise RefusedError(
                "Uniqueness violation."
            )  # the words that the client takes for "there already"
        self.project.append(SimpleNamespace(id=new_id(), name=name))
        return self.project[-1]

    def create_flow_from_compressed_string(
        self, serialized_flow: Any, project_id: str, idempotency_key: str | None = None, **_: Any
    ) -> Any:
        """Add a version to the flow of this name, unless the last one came with the same key."""
        serialized_flow = decompress(serialized_flow)
        if NUL.search(json.dumps(serialized_flow)):
            raise RefusedError(NUL_REFUSED)
        project = self._find(self.project, project_id, "Invalid project")
        versions = [
            f for f in self.flow if f.project is project and f.name == serialized_flow["name"]
        ]
        if (
            versions
            and idempotency_key
            and versions[-1].flow_group.idempotency_key == idempotency_key
        ):
            return versions[-1]
        flow = SimpleNamespace(
            environment=None, settings={}, created=time_of(None), **serialized_flow
        )
        flow.id, flow.version, flow.archived, flow.project = (
            new_id(),
            len(versions) + 1,
            False,
            project,
        )
        flow.flow_group = versions[-1].flow_group if versions else SimpleNamespace(labels=None)
        flow.flow_group.idempotency_key = idempotency_key
        flow.core_version, flow.serialized_flow = serialized_flow["__version__"], serialized_flow
        for old in versions:
            old.archived = True
            for run in self.flow_run:
                if run.flow is old and run.state == "Scheduled":
                    self.enter(run, Cancelled("Flow run cancelled: its flow is archived"))
        self.flows[flow.id], flow.tasks = flow, []
        self.register_tasks(flow.id, serialized_flow.get("tasks", []))
        return flow

    def register_tasks(self, flow_id: str, serialized_tasks: list[dict[str, Any]]) -> Any:
        """Add tasks to a flow, which `Flow.register()` sends apart from it."""
        flow = self._find(self.flow, flow_id, "Invalid flow ID")
        known, slugs = (
            {task.slug for task in flow.tasks},
            [task["slug"] for task in serialized_tasks],
        )
        flow.tasks += [
            SimpleNamespace(id=new_id(), slug=slug) for slug in slugs if slug not in known
        ]
        return self.success

    def _ignore(self, **_: Any) -> Any:
        return self.success

    set_schedule_active = register_edges = _ignore  # no answer depends on them

    def update_flow_run_heartbeat(self, flow_run_id: str) -> Any:
        """Count a heartbeat. One of an unknown run is a success, too."""
        check_ids(flow_run_id)
        if flow_run_id in self.flow_runs:
            self.flow_runs[flow_run_id].heartbeats += 1
        return self.success

    def create_flow_run(
        self,
        flow_id: str,
        labels: Any = None,
        parameters: Any = None,
        run_config: Any = None,
        **more: Any,
    ) -> Any:
        """Schedule a run, for now if no time is given."""
        flow = self._find(self.flow, flow_id, "Flow not found:")
        if flow.archived:
            raise RefusedError(f"Flow {flow_id} is archived.")
        key = more.get("idempotency_key")
        for known in self.flow_run:
            if key and known.flow is flow and known.idempotency_key == key:
                return known
        run_config = run_config or flow.run_config or {}
        if labels is None:
            labels = run_config.get("labels") or []
        run = FlowRun(
            flow,
            name=more.get("flow_run_name") or f"{flow.name}-{len(self.flow_runs) + 1}",
            labels=sorted(labels),
            parameters=jsonb(self._parameters(flow, parameters or {})),
            context=jsonb(more.get("context") or {}),
            run_config=jsonb(run_config) or None,
            scheduled_start_time=time_of(more.get("scheduled_start_time")),
            idempotency_key=key,
        )
        run.enter(Scheduled("Flow run scheduled.", start_time=run.scheduled_start_time))
        for task in flow.tasks:
            run.add_task_run(task)
        self.flow_runs[run.id] = run
        return run

    def _parameters(self, flow: Any, given: dict[str, Any]) -> dict[str, Any]:
        """What a run stores: also the flow's defaults, but not those that are false, 0 or empty."""
        stored = {each["name"]: each["default"] for each in flow.parameters if each["default"]}
        stored |= given
        missing = {each["name"] for each in flow.parameters if each["required"]} - set(stored)
        if missing:
            raise RefusedError(f"Required parameters were not supplied: {missing}")
        return stored

    def get_or_create_task_run_info(self, flow_run_id: str, task_id: str, map_index: int) -> Any:
        run = self._find(self.flow_run, flow_run_id, "Invalid flow run ID")
        for task_run in run.task_runs:
            if (task_run.task_id, task_run.map_index) == (task_id, map_index):
                return task_run
        return run.add_task_run(self._find(run.flow.tasks, task_id, "Invalid task ID"), map_index)

    def set_flow_run_states(self, states: list[dict[str, Any]]) -> Any:
        """Add a state to each run, or refuse to in the words by which the Agent knows that."""
        done = []
        for item in states:
            run_id = item.get("flow_run_id") or item["task_run_id"]
            if len(json.dumps(item["state"])) > STATE_LIMIT:
                raise RefusedError("State payload is too large.")
            state = State.deserialize(item["state"])
            run = self._find(
                [*self.flow_run, *self.task_run], run_id, "State update failed for run ID"
            )
            if isinstance(run, TaskRun) and state.is_running() and run.flow_run.state != "Running":
                raise RefusedError(
                    f"State update failed for run ID {run_id}: its flow run is not running"
                )
            if isinstance(run, FlowRun) and state.is_submitted():
                self._lock_submitted(run)
            self.enter(run, state)
            done.append(SimpleNamespace(id=run_id, status="SUCCESS", message=None))
        return SimpleNamespace(states=done)

    set_task_run_states = set_flow_run_states

    def _lock_submitted(self, run: FlowRun) -> None:
        """Refuse a second Submitted soon after the first one, whatever came between."""
        now = time_of(None)
        if run.submitted_at and now - run.submitted_at < timedelta(seconds=SUBMITTED_SECONDS):
            raise RefusedError("State update failed: this run has already been submitted.")
        run.submitted_at = now

    def enter(self, run: Run, state: State) -> None:
        """Let a run enter a state, and the unfinished tasks of a cancelled run with it."""
        run.enter(state)
        for task_run in (
            run.task_runs if isinstance(run, FlowRun) and isinstance(state, Cancelled) else []
        ):
            if not State.deserialize(task_run.serialized_state).is_finished():
                task_run.enter(state)

    def cancel_flow_run(self, flow_run_id: str) -> Any:
        """Cancel a run. One that is running is Cancelling until its CloudFlowRunner ends it."""
        run = self._find(self.flow_run, flow_run_id, "Invalid flow run ID")
        state = State.deserialize(run.serialized_state)
        if not state.is_finished():
            cancel = Cancelling if state.is_running() else Cancelled
            self.enter(run, cancel("The flow run is cancelled"))
        return run

    def write_run_logs(self, logs: Any) -> Any:
        # `prefect execute flow-run` sends one log as it is, which GraphQL takes for a list of one.
        for log in [logs] if isinstance(logs, dict) else logs:
            run = self._find(self.flow_run, log["flow_run_id"], "Invalid flow run ID")
            check_ids(log.get("task_run_id") or run.id)
            if log["level"] not in LEVELS:
                raise BadRequestError(f"{log['level']!r} is no value of the enum log_level")
            time = time_of(log.get("timestamp"))
            run.logs.append(
                SimpleNamespace(timestamp=time, level=log["level"], message=log.get("message"))
            )
        return self.success

    def register_agent(self, name: str, labels: list[str], **_: Any) -> Any:
        agent = SimpleNamespace(id=new_id(), name=name, labels=labels, last_queried=time_of(None))
        self.agent.append(agent)
        return self.agent[-1]

    def get_runs_in_queue(self, before: str, labels: list[str], **_: Any) -> Any:
        """The runs that are due, or running with a task due again, and that fit the labels.

        Only the oldest are looked at, whatever their labels.
        """
        for agent in self.agent:
            if agent.id == self.asking_agent_id:
                agent.last_queried = time_of(None)
        due = {"state": {"_in": SCHEDULED}, "state_start_time": {"_lte": before}}
        with_a_due_task = {"state": {"_eq": "Running"}, "task_runs": due}
        runs = select(self.flow_run, {"_or": [due, with_a_due_task]})
        runs.sort(key=lambda run: (run.state_start_time is None, run.state_start_time or before))
        # An Agent with labels takes runs with some of these and no other; one without takes
        # those without.
        fit = [
            run.id
            for run in runs[:QUEUE_WINDOW]
            if set(run.labels) <= set(labels) and bool(run.labels) == bool(labels)
        ]
        return SimpleNamespace(flow_run_ids=fit[:QUEUE_LENGTH])


class PrefectAPI(BackgroundServer):
    """Serves a `Store` over HTTP as long as the `with` statement lasts.

    Pods have to reach `host` as well.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), _Handler)
        self.url = f"http://{host}:{self.server_port}"
        # points the CLI, an Agent or `prefect execute flow-run` here, whatever the user has set up
        self.env = {
            "PREFECT__BACKEND": "server",
            "PREFECT__CLOUD__API": self.url,
            "PREFECT__CLOUD__API_KEY": "",
            "PREFECT__USER_CONFIG_PATH": os.devnull,
            "PREFECT__BACKEND_CONFIG_PATH": os.devnull,
        }
        self.errors: list[str] = []  # what is not understood: a test wants this empty
        self.is_broken = False  # behind Apollo, which answers 200 with errors then
        self.requests = 0
        self._store = Store()
        self.flows = self._store.flows
        self.flow_runs = self._store.flow_runs
        self._lock = threading.Lock()  # requests are answered one at a time

    def create_flow_run(self, flow_id: str, **input: Any) -> str:
        """Create a run as the mutation of that name does; returns the run's id."""
        with self._lock:
            return str(self._store.create_flow_run(flow_id, **input).id)

    def cancel(self, flow_run_id: str) -> None:
        with self._lock:
            self._store.cancel_flow_run(flow_run_id)

    def delete(self, flow_run_id: str) -> None:
        """Delete a run, as the UI does."""
        with self._lock:
            del self.flow_runs[flow_run_id]

    def set_state(self, flow_run_id: str, state: State) -> None:
        """Set the state of a run, as the UI's Set State does."""
        with self._lock:
            self._store.enter(self.flow_runs[flow_run_id], state)

    def restart(self, flow_run_id: str) -> None:
        """Restart a run as the UI's button does. Tasks that had succeeded stay as they are."""
        with self._lock:
            run = self.flow_runs[flow_run_id]
            for task_run in run.task_runs:
                if task_run.state in RESTARTED:
                    task_run.enter(Pending("Task run restarted"))
            run.enter(Scheduled("Flow run restarted"))

    def resume(self, flow_run_id: str) -> None:
        """Resume the paused tasks of a run, as the UI does."""
        with self._lock:
            for task_run in self.flow_runs[flow_run_id].task_runs:
                if task_run.state == "Paused":
                    task_run.enter(Resume("Task run resumed"))

    def lose_heartbeats(self, flow_run_id: str) -> None:
        """Do what Prefect Server does if no heartbeat came for ten minutes.

        The zombie killer fails the tasks that are running, if they have no retries. Lazarus
        reschedules the run, if no task is running or waiting.
        """
        with self._lock:
            run = self.flow_runs[flow_run_id]
            for task_run in run.task_runs:
                if task_run.state == "Running":
                    task_run.enter(Failed("No heartbeat detected from the remote task"))
            waiting = {task_run.state for task_run in run.task_runs} & {*SCHEDULED}
            if run.state not in ("Submitted", "Running") or waiting:
                return
            if run.times_resurrected == RESURRECTIONS:
                run.enter(Failed("A Lazarus process attempted to reschedule this run 3 times"))
                return
            run.enter(Scheduled("Rescheduled by a Lazarus process."))
            run.times_resurrected += 1

    def answer(self, request: dict[str, Any], agent_id: str | None) -> tuple[int, Any]:
        """The HTTP status and body for a request: 400 if it could not even be executed."""
        if self.is_broken:
            return 200, {"data": None, "errors": [{"message": APOLLO_ERROR}]}
        variables = request.get("variables") or "{}"
        if not isinstance(variables, str):  # the client sends JSON within JSON
            variables = json.dumps(variables)
        if NUL.search(request["query"] + variables):
            return 200, {"data": None, "errors": [{"message": NUL_REFUSED}]}
        with self._lock:
            self.requests += 1
            self._store.asking_agent_id = agent_id
            result = graphql_sync(
                SCHEMA, request["query"], self._store, None, json.loads(variables), None, resolve
            )
        causes = [error.original_error for error in result.errors or []]
        for error, cause in zip(result.errors or [], causes):
            if not isinstance(cause, RefusedError):
                self.errors.append(f"{error.message} in {request}")
        is_bad = result.data is None or any(isinstance(cause, BadRequestError) for cause in causes)
        return (400 if is_bad else 200), result.formatted


class _Handler(QuietHandler):
    server: PrefectAPI

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = 413
        answer = None
        if len(body) <= BODY_LIMIT:
            agent_id = self.headers["X-PREFECT-AGENT-ID"]
            status, answer = self.server.answer(json.loads(body), agent_id)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer, default=timestamptz).encode())
