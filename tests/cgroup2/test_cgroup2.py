"""On a node with cgroup v2, what the daemon starts counts to the pod, and ends with it."""

from __future__ import annotations

import pytest

from flows.settings import JOB_TEMPLATES
from tests.cgroup2.conftest import Pod
from tests.cgroup2.machine import Node

# gvisor_sidecar's daemon has cgroups of its sandbox's kernel, which is one process tree in the pod
TEMPLATES = [path.stem for path in JOB_TEMPLATES.glob("*.yaml") if "gvisor" not in path.stem]
HUNGRY = "dd if=/dev/zero of=/dev/null bs=600M count=1"  # 600 MiB of memory


def cgroup_of(node: Node, command: str) -> str:
    return node.run(f"cut -d: -f3 /proc/$(pgrep -fx '{command}')/cgroup")


@pytest.mark.parametrize("template", TEMPLATES)
def test_container_counts_to_the_pod_and_dies_alone_at_its_own_limit(node: Node, template: str) -> None:
    pod = Pod(node, template)
    pod.run("sleeper", "sleep 5000")
    assert cgroup_of(node, "sleep 5000").startswith(f"{pod.cgroup}/{pod.id}/docker/")
    pod.run("hungry", HUNGRY, "--memory=100m")
    assert pod.docker("wait hungry") == "137"
    assert pod.docker("inspect --format {{.State.OOMKilled}} hungry") == "true"
    assert pod.docker("inspect --format {{.State.Running}} sleeper") == "true"
    pod.stop()
    assert pod.ended()[0] == 0
    pod.remove()


@pytest.mark.parametrize("template", TEMPLATES)
def test_more_memory_than_the_pod_has_ends_the_daemon_with_all_containers(node: Node, template: str) -> None:
    pod = Pod(node, template)
    pod.run("sleeper", "sleep 5000")
    pod.run("hungry", HUNGRY)
    assert pod.ended() == (137, "OOMKilled")
    pod.remove()


@pytest.mark.parametrize("template", TEMPLATES)
def test_nothing_is_left_after_sigkill(node: Node, template: str) -> None:
    pod = Pod(node, template)
    pod.run("sleeper", "sleep 5000")
    node.run(f"crictl -t 100s stop --timeout 0 {pod.id}")
    assert pod.ended()[0] == 137
    pod.remove()


def test_without_a_cgroup_namespace_of_its_own_no_limit_holds(node: Node) -> None:
    """As docker:29.7.2-dind: the tests above would fail."""
    pod = Pod(node, "native_sidecar", command=["docker-init", "--"])
    pod.run("sleeper", "sleep 5000")
    assert cgroup_of(node, "sleep 5000").startswith("/docker/")
    pod.run("hungry", HUNGRY)
    assert pod.docker("wait hungry") == "0"
    node.run(f"crictl -t 100s stop --timeout 0 {pod.id}")
    with pytest.raises(AssertionError, match="nothing is left"):
        pod.remove()
