"""On a node with cgroup v2, what the daemon starts counts to the pod, and ends with it."""

import pytest

from flows.settings import JOB_TEMPLATES
from tests.support.cgroup2_node import INNER, Node
from tests.support.cgroup2_pod import DaemonPod

# gvisor_sidecar's daemon has cgroups of its sandbox's kernel, which is one process tree in the pod
TEMPLATES = sorted(path.stem for path in JOB_TEMPLATES.glob("*.yaml") if "gvisor" not in path.stem)
pytestmark = pytest.mark.timeout(600)  # every instruction is emulated
HUNGRY = f"--network=none {INNER} dd if=/dev/zero of=/dev/null bs=600M count=1"  # takes 600 MiB of memory


@pytest.mark.parametrize("template", TEMPLATES)
def test_container_counts_to_the_pod_and_dies_alone_at_its_own_limit(
    node: Node, template: str
) -> None:
    pod = DaemonPod(node, template)
    cgroup = node.run("cut -d: -f3 /proc/$(pgrep -nfx 'sleep 5000')/cgroup")
    assert cgroup.startswith(f"{pod.cgroup}/{pod.id}/docker/")
    pod.sh(f"docker run --name=hungry --memory=100m {HUNGRY} || true")
    state = "{{.State.ExitCode}} OOMKilled={{.State.OOMKilled}} Running={{.State.Running}} Error={{.State.Error}}"
    seen = pod.sh(f"docker inspect --format '{state}' hungry sleeper").splitlines()
    assert seen == [
        "137 OOMKilled=true Running=false Error=",
        "0 OOMKilled=false Running=true Error=",
    ]
    pod.stop()
    assert pod.ended()[0] == 0
    pod.remove()


@pytest.mark.parametrize("template", TEMPLATES)
def test_more_memory_than_the_pod_has_ends_the_daemon_with_all_containers(
    node: Node, template: str
) -> None:
    """What SIGKILL to all of them leaves is asserted as well."""
    pod = DaemonPod(node, template)
    with pytest.raises(AssertionError):  # the Docker client dies with all else
        pod.sh(f"docker run {HUNGRY}")
    assert pod.ended() == (137, "OOMKilled")
    pod.remove()


def test_nothing_is_left_after_sigkill(node: Node) -> None:
    pod = DaemonPod(node, "native_sidecar")
    node.run(f"crictl -t 100s stop --timeout 0 {pod.id}")
    assert pod.ended()[0] == 137
    pod.remove()
