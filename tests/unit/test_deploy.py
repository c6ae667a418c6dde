"""deploy/ without a cluster: the Agent is the one that Prefect's CLI writes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from flows.settings import PROJECT

BASE = PROJECT / "deploy" / "base"
AGENT = BASE / "agent.yaml"
INSTALL = ["agent", "kubernetes", "install", "--label", "docker-sidecar"]


def deployment_in(text: str) -> dict[str, Any]:
    [found] = [each for each in yaml.safe_load_all(text) if each["kind"] == "Deployment"]
    return dict(found)


def variables(deployment: dict[str, Any]) -> dict[str, Any]:
    [agent] = deployment["spec"]["template"]["spec"]["containers"]
    return {each["name"]: each.get("value") for each in agent.pop("env")}


def test_the_agent_is_as_prefect_installs_it_but_for_its_account_and_limits() -> None:
    program = str(Path(sys.executable).with_name("prefect"))
    written = subprocess.run([program, *INSTALL], capture_output=True, text=True, check=True)
    theirs = deployment_in(written.stdout)
    ours = deployment_in(AGENT.read_text(encoding="utf-8"))
    theirs_set = {name: value for name, value in variables(theirs).items() if value}
    ours_set = variables(ours)
    assert set(ours_set) == set(theirs_set)
    same = set(ours_set) - {"NAMESPACE", "PREFECT__BACKEND", "PREFECT__CLOUD__API"}
    assert {name: ours_set[name] for name in same} == {name: theirs_set[name] for name in same}
    assert ours["spec"]["template"]["spec"].pop("serviceAccountName") == "prefect-agent"
    [agent] = ours["spec"]["template"]["spec"]["containers"]
    assert agent.pop("resources")["limits"]["memory"], "a quota on limits.memory asks for it"
    del ours["metadata"]["namespace"]
    assert ours == theirs


def test_the_way_to_an_api_in_the_cluster_is_opened_by_taking_away_the_marks() -> None:
    text = (BASE / "network.yaml").read_text(encoding="utf-8")
    start = text.index("    # - to:")
    opened = text[:start] + text[start:].replace("    # ", "    ")
    policy = yaml.safe_load(opened)
    assert [list(rule) for rule in policy["spec"]["egress"]] == [
        ["to"],
        ["to", "ports"],
        ["to", "ports"],
    ]
