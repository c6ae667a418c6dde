"""gvisor_sidecar: what the sandbox keeps from a run, seen from the node; native_sidecar shows what it would have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from flows.settings import PROJECT
from scripts import cluster
from tests.kubernetes.conftest import Namespace, Submit, Template
from tests.support.pages import example

# all that a container can ask its daemon for
GREEDY = {"privileged": True, "pid_mode": "host", "network_mode": "host", "binds": ["/:/host"]}
LOOK = """
echo "kernel $(cat /proc/sys/kernel/random/boot_id)"
echo "disks $(find /dev -type b | wc -l)"
echo "files $(find /host -xdev -name dockerd-entrypoint.sh -o -xdev -name kubelet)"
echo "processes $(cat /proc/[0-9]*/comm | grep -cx kubelet) $(cat /proc/[0-9]*/comm | grep -cx dockerd)"
echo up; sleep 600
"""
# of each process of a pod: its user namespace and its capabilities there
PROCESSES = """
for process in $(grep -l "pod$0" /proc/[0-9]*/cgroup | cut -d/ -f3); do
    echo $(readlink /proc/$process/ns/user && sed -n 's/^CapEff:.//p' /proc/$process/status)
done 2>/dev/null
"""


@pytest.mark.parametrize("template_name", ["native_sidecar", "gvisor_sidecar"], indirect=True)
def test_a_container_that_asks_for_everything(
    submit: Submit, template: Template, template_name: str, namespace: Namespace, on_node: Callable[..., str]
) -> None:
    is_sandbox = template_name == "gvisor_sidecar"
    run = submit(template, command=["sh", "-c", LOOK], host_config=GREEDY)
    name = run.container_writes("up")
    pod = namespace.core.read_namespaced_pod(name, namespace.name)
    privileged = [c.security_context.privileged for c in (*pod.spec.containers, *pod.spec.init_containers)]
    assert any(privileged) is not is_sandbox

    logs = run.logs().splitlines()
    kernel = on_node("cat", "/proc/sys/kernel/random/boot_id")
    assert (f"kernel {kernel}" in logs) is not is_sandbox, "the node's"
    assert ("disks 0" in logs) is is_sandbox
    assert "files /host/usr/local/bin/dockerd-entrypoint.sh" in logs, "the files are the daemon's, not the node's"
    assert "processes 0 1" in logs, "so are the processes"

    node = on_node("readlink", "/proc/1/ns/user")
    processes = [line.split() for line in on_node("sh", "-c", PROCESSES, pod.metadata.uid).splitlines()]
    assert processes
    rights = {tuple(process) for process in processes} - {(node, "0" * 16), ()}  # one may have ended meanwhile
    assert any(user_namespace == node for user_namespace, _ in rights) is not is_sandbox, processes


def test_the_node_is_configured_as_the_page_says() -> None:
    node = PROJECT / "scripts" / "airgap" / "node"
    assert (node / "runsc.toml").read_text() == example("gvisor-runsc")
    assert (node / "containerd.toml").read_text().endswith(example("gvisor-containerd"))
    assert yaml.safe_load(example("gvisor-runtime-class")) == cluster.GVISOR
