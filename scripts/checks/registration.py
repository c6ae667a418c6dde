"""What `prefect register` needs: settings, a Docker engine, Prefect's API, and an Agent."""

import json
import os
from datetime import datetime, timedelta, timezone
from typing import Any

import prefect
import requests
from docker.context import ContextAPI

from flows.settings import Settings
from scripts import engine
from scripts.base import root_cause
from scripts.checks.check import CheckFailed, Setup, Unsure
from scripts.checks.kubernetes_api import SECONDS


def settings_are_valid(setup: Setup) -> str:
    """The settings can be used, and say where to push the flow's image."""
    settings = Settings.from_environ()
    setup.settings = settings
    registry = settings.registry_url.rstrip("/")
    image = f"{registry}/{settings.image_name}:{settings.image_tag}"
    template = os.environ.get("JOB_TEMPLATE", "docker_sidecar")
    seen = f"{image}, built from {settings.base_image}; JOB_TEMPLATE={template}"
    if not os.environ.get("FLOW_REGISTRY_URL"):
        raise Unsure(
            f"{seen}. FLOW_REGISTRY_URL is not set, and {registry} is hardly yours to push to",
            "export FLOW_REGISTRY_URL=registry.example.com/team/",
        )
    return seen


def engine_answers(setup: Setup) -> str:
    """`prefect register` finds a Docker engine."""
    chosen = os.environ.get("DOCKER_HOST")
    client = engine.find()
    if client is None:
        raise CheckFailed(engine.how_to_get_one())
    url = os.environ["DOCKER_HOST"]
    if not chosen and url != ContextAPI.DEFAULT_CONTEXT.Host:
        raise CheckFailed(
            "prefect register does not know Docker contexts", f"export DOCKER_HOST={url}"
        )
    return f"Docker {client.version()['Version']} at {url}"


def prefect_answers(setup: Setup) -> str:
    """Prefect's API answers, and has the project."""
    query = "query($name: String) {project(where: {name: {_eq: $name}}) {id}}"
    found = _graphql(query, name=setup.project)["project"]
    if setup.project and not found:
        raise CheckFailed(
            f"no project {setup.project!r}", f"prefect create project {json.dumps(setup.project)}"
        )
    shown = setup.project or "(PROJECT) not set"
    return f"{prefect.config.cloud.api}, backend {prefect.config.backend!r}, project {shown}"


def agent_asks_for_runs(setup: Setup) -> str:
    """An Agent with the flow's labels lives: it takes the runs whose labels it has."""
    ours = set(setup.settings.labels)
    wanted = "no labels (FLOW_LABELS)"
    if ours:
        wanted = f"labels {', '.join(sorted(ours))}"
    since = (datetime.now(timezone.utc) - timedelta(minutes=5)).isoformat()
    for agent in _graphql("{agent {labels last_queried}}")["agent"]:
        labels = set(agent["labels"])
        # an Agent without labels takes the runs without labels
        takes_ours = ours <= labels and bool(ours) == bool(labels)
        if takes_ours and (agent["last_queried"] or "") > since:
            return f"one with {wanted} asks for runs"
    log = f"kubectl logs deployment/prefect-agent --namespace {setup.namespace}"
    raise Unsure(
        f"no Agent with {wanted} has asked for runs in the last 5 minutes",
        f"{log}; FLOW_LABELS must be the label in deploy/settings.yaml",
    )


def _graphql(query: str, **variables: str) -> Any:
    """The answer of Prefect's API. Prefect's own client would try for a minute."""
    url = prefect.config.cloud.api
    key = prefect.Client().api_key
    headers = {}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    body = {"query": query, "variables": variables}
    try:
        answer = requests.post(url, json=body, headers=headers, timeout=SECONDS)
    except requests.RequestException as error:
        raise CheckFailed(f"{url} does not answer: {root_cause(error)}") from None
    answer.raise_for_status()
    data = answer.json().get("data")
    if not data:
        raise CheckFailed(f"{url} does not answer as the Prefect API does")
    return data
