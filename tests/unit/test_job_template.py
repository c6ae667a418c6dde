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

from flows.settings import JOB_TEMPLATES, load_job_template

TEMPLATES = {
    path.stem: load_job_template(path.stem) for path in sorted(JOB_TEMPLATES.glob("*.yaml"))
}
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
        hooks = [hook["exec"]["command"] for hook in container.get("lifecycle", {}).values()]
        words = [
            *container.get("command", []),
            *container.get("args", []),
            *itertools.chain(*hooks),
        ]
        yield from (
            text for option, text in itertools.pairwise(words) if re.fullmatch("-[eu]*c", option)
        )


@pytest.mark.parametrize("version", sorted(set(all_versions())))
def test_valid_for_kubernetes(version: str) -> None:
    """All templates from 1.29 on. Older versions have no restartable init containers."""
    jobs = [
        job for job in TEMPLATES.values() if version >= "1.29" or "initContainers" not in str(job)
    ]
    assert jobs
    kubernetes_validate.validate(
        {"apiVersion": "batch/v1", "kind": "JobList", "items": jobs}, version, strict=True
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_limits(name: str) -> None:
    """No container can take the node's memory, and none requests the disk that its limit allows."""
    for resources in (container["resources"] for container in containers(TEMPLATES[name])):
        assert "memory" in resources["limits"]
        assert (
            "ephemeral-storage" in resources["requests"]
            or "ephemeral-storage" not in resources["limits"]
        )


def test_the_templates_name_one_docker() -> None:
    assert len({containers(template)[1]["image"] for template in TEMPLATES.values()}) == 1


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
    named = [next((name for name in known if name in path), path) for path in different]
    return sorted(set(named))


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
    native, recipe = (
        containers(TEMPLATES[name])[0] for name in ("native_sidecar", "docker_sidecar")
    )
    assert differences(native, recipe, known) == sorted(known)


@pytest.mark.parametrize("name", TEMPLATES)
def test_scripts_are_sound(name: str) -> None:
    for script in scripts(TEMPLATES[name]):
        assert "$$" not in script, "Kubernetes makes $ of it"
        result = subprocess.run(SHELLCHECK, input=script, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
