"""Pods with the daemon's container of a job template, started through containerd's CRI as kubelet would."""

import itertools
import json
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

import scripts.engine
from flows.settings import PROJECT, load_job_template
from scripts.base import DAEMON
from tests.cgroup2.machine import INNER, Node, built
from tests.support.waiting import wait_for

LIMIT = 300 << 20  # bytes: the memory of a daemon's container, in place of the templates' 4 GiB
# the node's network, and process ids of the container's own
PRIVILEGED = {"privileged": True, "namespace_options": {"network": 2, "pid": 1}}
# what kubelet sets for a burstable pod; memory.oom.group since Kubernetes 1.28, on cgroup v2
RESOURCES = {
    "memory_limit_in_bytes": LIMIT,
    "oom_score_adj": 875,
    "unified": {"memory.oom.group": "1"},
}
LEFT = "find /sys/fs/cgroup -type d; ps -o args= --ppid=2 --pid=2 --deselect"
_names = (f"run-{number}" for number in itertools.count())


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """The machine. The test that is the first to ask for it waits until it is built and booted."""
    install = [
        PROJECT / "scripts/apt-install.sh",
        "--no-install-recommends",
        "qemu-system-x86",
        "e2fsprogs",
    ]
    subprocess.run(install, check=True)
    with scripts.engine.running() as client:
        folder = built(client)
    found = Node(folder, tmp_path_factory.mktemp("node") / "console")
    yield found
    found.end()


class Pod:
    """A pod with the daemon of a template, and with a process on the node in place of the flow."""

    def __init__(self, node: Node, template: str) -> None:
        self.node, self.name, self.before = node, next(_names), node.run(LEFT)
        self.cgroup = f"/kubepods/burstable/pod{self.name}"
        spec = load_job_template(template)["spec"]["template"]["spec"]
        [daemon] = [
            it
            for it in spec.get("initContainers", []) + spec["containers"]
            if it["name"] == "dind-daemon"
        ]
        mounts = {
            mount["mountPath"]: f"/pods/{self.name}/{mount['name']}"
            for mount in daemon["volumeMounts"]
        }
        pod = {
            "metadata": {"name": self.name, "namespace": "default", "uid": self.name},
            "log_directory": f"/var/log/pods/{self.name}",
            "linux": {"cgroup_parent": self.cgroup, "security_context": PRIVILEGED},
        }
        container = {
            "metadata": {"name": "dind-daemon"},
            "image": {"image": f"docker.io/library/{DAEMON}"},
            "command": daemon.get("command", []),
            "args": daemon.get("args", []),
            "envs": [
                {"key": variable["name"], "value": variable["value"]} for variable in daemon["env"]
            ],
            "mounts": [
                {"container_path": inside, "host_path": folder} for inside, folder in mounts.items()
            ],
            "log_path": "log",
            "linux": {"security_context": PRIVILEGED, "resources": RESOURCES},
        }
        node.run("mkdir -p " + " ".join([*mounts.values(), pod["log_directory"]]))
        for name, config in (("pod", pod), ("container", container)):
            node.run(f"printf %s {shlex.quote(json.dumps(config))} >/tmp/{name}.json")
        self.flow = ""
        if alive := mounts.get(
            "/alive"
        ):  # docker_sidecar's flow takes the lock before the daemon starts
            script = "exec 9>taking; flock 9; mv taking lock; exec sleep 6000"
            self.flow = node.run(f"cd {alive}; sh -c '{script}' >/dev/null 2>&1 & echo $!")
        self.sandbox = node.run("crictl -t 100s runp /tmp/pod.json")
        self.id = node.run(
            f"crictl -t 100s create {self.sandbox} /tmp/container.json /tmp/pod.json"
        )
        node.run(f"crictl -t 100s start {self.id}")
        if hook := daemon.get("lifecycle", {}).get("postStart"):
            self.exec(*hook["exec"]["command"])
        node.run(f"cp /inner.tar {mounts['/workspace']}")
        self.sh(
            "until docker info >/dev/null 2>&1; do sleep 1; done; docker load -i /workspace/inner.tar"
        )
        self.sh(f"docker run --detach --name=sleeper --network=none {INNER} sleep 5000")

    def exec(self, *command: str) -> str:
        """Run a command in the daemon's container."""
        try:
            return self.node.run(shlex.join(["crictl", "-t", "100s", "exec", self.id, *command]))
        except AssertionError as error:
            raise AssertionError(f"{error}\nThe daemon's log:\n{self.log()}") from None

    def sh(self, script: str) -> str:
        """Run shell commands in the daemon's container, which has the Docker client."""
        return self.exec("sh", "-euc", script)

    def log(self) -> str:
        return self.node.run(f"tail -n 40 /var/log/pods/{self.name}/log")

    def ended(self) -> tuple[int, str]:
        """The exit status of the daemon's container and the reason, when it has ended."""

        def status() -> Any:
            return json.loads(self.node.run(f"crictl -t 100s inspect {self.id}"))["status"]

        wait_for(
            lambda: status()["state"] == "CONTAINER_EXITED", "the container ends", self.log, 120
        )
        return status()["exitCode"], status()["reason"]

    def stop(self) -> None:
        """End the run as the template has it: by the end of the flow, else by SIGTERM."""
        if self.flow:
            self.node.run(f"kill {self.flow}")
        else:
            self.node.run(f"crictl -t 100s stop --timeout 30 {self.id}")

    def remove(self) -> None:
        """Remove the pod, as kubelet does. Nothing that came with it may be left on the node."""
        self.node.run(f"kill {self.flow} 2>/dev/null || true; crictl -t 100s rm -f {self.id}")
        self.node.run(f"crictl -t 100s rmp -f {self.sandbox}; rmdir /sys/fs/cgroup{self.cgroup}")
        wait_for(
            lambda: self.node.run(LEFT) == self.before,
            "nothing is left",
            lambda: self.node.run(LEFT),
        )
