"""The job templates, without a cluster: valid for each Kubernetes, alike, with sound scripts."""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from kubernetes_validate.utils import all_versions

from flows.settings import load_job_template
from scripts.base import DAEMON
from tests.support import templates
from tests.support.templates import daemon_of

TEMPLATES = {name: load_job_template(name) for name in templates.TEMPLATES}
# SC2016: a script within the script has variables of its own.
SHELLCHECK = [
    str(Path(sys.executable).with_name("shellcheck")),
    "--shell=sh",
    "--exclude=SC2016",
    "-",
]


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The flow's and the daemon's, wherever the latter is."""
    pod = job["spec"]["template"]["spec"]
    return [*pod["containers"], *pod.get("initContainers", [])]


def scripts(job: dict[str, Any]) -> Iterator[str]:
    """The text of each shell script: what stands behind -c."""
    for container in containers(job):
        words = [*container.get("command", []), *container.get("args", [])]
        for hook in container.get("lifecycle", {}).values():
            words += hook["exec"]["command"]
        for option, text in itertools.pairwise(words):
            if re.fullmatch("-[eu]*c", option):
                yield text


def jobs_for(version: str) -> list[dict[str, Any]]:
    """The templates for a version of Kubernetes: 1.28 knows no restartable init containers."""
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < (1, 29):
        return [TEMPLATES["docker_sidecar"]]
    return list(TEMPLATES.values())


@pytest.mark.parametrize("version", sorted(set(all_versions())))
def test_the_templates_are_valid_for_kubernetes(version: str) -> None:
    jobs = {"apiVersion": "batch/v1", "kind": "JobList", "items": jobs_for(version)}
    kubernetes_validate.validate(jobs, version, strict=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_container_can_take_the_nodes_memory(name: str) -> None:
    for container in containers(TEMPLATES[name]):
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_container_requests_the_disk_that_its_limit_allows(name: str) -> None:
    """As Kubernetes does where a limit has no request."""
    for container in containers(TEMPLATES[name]):
        resources = container["resources"]
        if "ephemeral-storage" in resources["limits"]:
            assert "ephemeral-storage" in resources["requests"]


def test_the_templates_name_the_docker_that_the_scripts_provide() -> None:
    images = {daemon_of(template)["image"] for template in TEMPLATES.values()}
    assert images == {DAEMON}


def fields(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a template, and its path. Entries of lists have their name or mountPath."""
    if isinstance(part, dict):
        for name, value in part.items():
            yield from fields(value, f"{path}.{name}")
    elif isinstance(part, list) and part and isinstance(part[0], dict):
        for entry in part:
            name = entry.get("mountPath", entry.get("name"))
            yield from fields(entry, f"{path}[{name}]")
    else:
        yield path, part


def differences(part: Any, other: Any, known: list[str]) -> list[str]:
    """The fields that two parts of templates do not have in common, by the first known name."""
    ours = dict(fields(part))
    theirs = dict(fields(other))
    different = [path for path in ours | theirs if ours.get(path) != theirs.get(path)]
    return sorted({known_name(path, known) for path in different})


def known_name(path: str, known: list[str]) -> str:
    """The first known name that a path has in it, else the path."""
    for name in known:
        if name in path:
            return name
    return path


GVISOR = [
    ".annotations.dev.gvisor.spec.mount.",
    ".runtimeClassName",
    "[dind-daemon].args",
    "[dind-daemon].command",
    "[dind-daemon].env[POD_IP]",
    "[dind-daemon].securityContext.",
]
KEPT_LAYERS = [
    "[dind-daemon].args",
    "[dind-daemon].command",
    "[dind-daemon].env[TINI_SUBREAPER]",
    "[dind-daemon].volumeMounts[/store]",
    "[dind-daemon].volumeMounts[/var/lib/docker]",
    ".volumes[docker-graph-store]",
    ".volumes[no-slot]",
]


@pytest.mark.parametrize(
    ("name", "known"), [("gvisor_sidecar", GVISOR), ("kept_layers", KEPT_LAYERS)]
)
def test_what_a_template_has_of_its_own(name: str, known: list[str]) -> None:
    assert differences(TEMPLATES["native_sidecar"], TEMPLATES[name], known) == sorted(known)


def test_what_the_flow_container_of_docker_sidecar_has_of_its_own() -> None:
    known = [
        ".command",
        ".env[DOCKER_HOST].value",
        ".volumeMounts[/alive]",
        ".volumeMounts[/run/dind]",
    ]
    native, *_ = containers(TEMPLATES["native_sidecar"])
    recipe, *_ = containers(TEMPLATES["docker_sidecar"])
    assert differences(native, recipe, known) == sorted(known)


@pytest.mark.parametrize("name", TEMPLATES)
def test_scripts_are_sound(name: str) -> None:
    for script in scripts(TEMPLATES[name]):
        assert "$$" not in script, "Kubernetes makes $ of it"
        result = subprocess.run(SHELLCHECK, input=script, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
