"""On a node with cgroup v2, what the daemon starts counts to the pod, and ends with it."""

import pytest

from tests.support.cgroup2_node import INNER, Node
from tests.support.cgroup2_pod import DaemonPod
from tests.support.templates import TEMPLATES

pytestmark = pytest.mark.timeout(600)  # every instruction is emulated
# gvisor_sidecar's daemon has cgroups of its sandbox's kernel, which is one process tree in the pod.
TEMPLATES_WITH_CGROUPS = [name for name in TEMPLATES if name != "gvisor_sidecar"]
TAKE_600_MIB = f"--network=none {INNER} dd if=/dev/zero of=/dev/null bs=600M count=1"
EXIT_CODE = "docker inspect --format '{{.State.ExitCode}} OOMKilled={{.State.OOMKilled}}'"
IS_RUNNING = "docker inspect --format '{{.State.Running}}'"


@pytest.mark.parametrize("template", TEMPLATES_WITH_CGROUPS)
def test_container_counts_to_the_pod_and_dies_alone_at_its_own_limit(
    node: Node, template: str
) -> None:
    pod = DaemonPod(node, template)
    cgroup = node.run("cut -d: -f3 /proc/$(pgrep -nfx 'sleep 5000')/cgroup")
    assert cgroup.startswith(f"{pod.cgroup}/{pod.id}/docker/")
    pod.sh(f"docker run --name=hungry --memory=100m {TAKE_600_MIB} || true")
    assert pod.sh(f"{EXIT_CODE} hungry") == "137 OOMKilled=true"
    assert pod.sh(f"{IS_RUNNING} sleeper") == "true"
    pod.stop()
    exit_code, _ = pod.ended()
    assert exit_code == 0
    pod.remove()


@pytest.mark.parametrize("template", TEMPLATES_WITH_CGROUPS)
def test_more_memory_than_the_pod_has_ends_the_daemon_with_all_containers(
    node: Node, template: str
) -> None:
    """The removal asserts that nothing is left on the node."""
    pod = DaemonPod(node, template)
    with pytest.raises(AssertionError):  # the Docker client dies with all else
        pod.sh(f"docker run {TAKE_600_MIB}")
    assert pod.ended() == (137, "OOMKilled")
    pod.remove()


def test_nothing_is_left_after_sigkill(node: Node) -> None:
    pod = DaemonPod(node, "native_sidecar")
    node.run(f"crictl -t 100s stop --timeout 0 {pod.id}")
    exit_code, _ = pod.ended()
    assert exit_code == 137
    pod.remove()
