"""Pods with a job template's daemon, started through containerd's CRI as kubelet would."""

import itertools
import json
import shlex
from typing import Any

from flows.settings import load_job_template
from scripts.base import DAEMON
from tests.support.cgroup2_node import INNER, Node
from tests.support.templates import daemon_of
from tests.support.waiting import wait_for

CRICTL = "crictl -t 100s"
# Bytes: the memory of a daemon's container, in place of the templates' 4 GiB.
MEMORY_LIMIT = 300 << 20
# The node's network, and process ids of the container's own.
PRIVILEGED = {"privileged": True, "namespace_options": {"network": 2, "pid": 1}}
# What kubelet sets for a burstable pod; memory.oom.group since Kubernetes 1.28, on cgroup v2.
RESOURCES = {
    "memory_limit_in_bytes": MEMORY_LIMIT,
    "oom_score_adj": 875,
    "unified": {"memory.oom.group": "1"},
}
# All control groups and all processes, but for the kernel's.
EVERYTHING = "find /sys/fs/cgroup -type d; ps -o args= --ppid=2 --pid=2 --deselect"
# docker_sidecar's flow takes the lock before the daemon starts.
TAKE_THE_LOCK = "exec 9>taking; flock 9; mv taking lock; exec sleep 6000"
LOAD_THE_IMAGE = """
until docker info >/dev/null 2>&1; do sleep 1; done
docker load -i /workspace/inner.tar
"""
_names = (f"run-{number}" for number in itertools.count())


class DaemonPod:
    """A pod with the daemon of a template, and with a process on the node in place of the flow."""

    def __init__(self, node: Node, template: str) -> None:
        self.node = node
        self.name = next(_names)
        self.before = node.run(EVERYTHING)
        self.cgroup = f"/kubepods/burstable/pod{self.name}"
        self.daemon = daemon_of(load_job_template(template))
        self.mounts = self._mounts()
        self.flow = self._start_flow() if "/alive" in self.mounts else ""
        self.sandbox = self._create_sandbox()
        self.id = self._create_container()
        self._start_container()
        node.run(f"cp /inner.tar {self.mounts['/workspace']}")
        self.sh(LOAD_THE_IMAGE)
        self.sh(f"docker run --detach --name=sleeper --network=none {INNER} sleep 5000")

    def _mounts(self) -> dict[str, str]:
        """The folders on the node, by their paths in the daemon's container."""
        mounts = {}
        for mount in self.daemon["volumeMounts"]:
            folder = f"/pods/{self.name}/{mount['name']}"
            self.node.run(f"mkdir -p {folder}")
            mounts[mount["mountPath"]] = folder
        return mounts

    def _start_flow(self) -> str:
        """Start the process that stands for the flow, and return its process id."""
        background = f"sh -c '{TAKE_THE_LOCK}' >/dev/null 2>&1 &"
        return self.node.run(f"cd {self.mounts['/alive']}; {background} echo $!")

    def _create_sandbox(self) -> str:
        logs = f"/var/log/pods/{self.name}"
        self.node.run(f"mkdir -p {logs}")
        pod = {
            "metadata": {"name": self.name, "namespace": "default", "uid": self.name},
            "log_directory": logs,
            "linux": {"cgroup_parent": self.cgroup, "security_context": PRIVILEGED},
        }
        self._write("/tmp/pod.json", pod)
        return self.node.run(f"{CRICTL} runp /tmp/pod.json")

    def _create_container(self) -> str:
        mounts = [
            {"container_path": inside, "host_path": folder}
            for inside, folder in self.mounts.items()
        ]
        variables = [
            {"key": variable["name"], "value": variable["value"]} for variable in self.daemon["env"]
        ]
        container = {
            "metadata": {"name": "dind-daemon"},
            "image": {"image": f"docker.io/library/{DAEMON}"},
            "command": self.daemon.get("command", []),
            "args": self.daemon.get("args", []),
            "envs": variables,
            "mounts": mounts,
            "log_path": "log",
            "linux": {"security_context": PRIVILEGED, "resources": RESOURCES},
        }
        self._write("/tmp/container.json", container)
        return self.node.run(f"{CRICTL} create {self.sandbox} /tmp/container.json /tmp/pod.json")

    def _start_container(self) -> None:
        """Start the daemon, with its hook."""
        self.node.run(f"{CRICTL} start {self.id}")
        hook = self.daemon.get("lifecycle", {}).get("postStart")
        if hook:
            self.exec(*hook["exec"]["command"])

    def _write(self, path: str, content: dict[str, Any]) -> None:
        self.node.run(f"printf %s {shlex.quote(json.dumps(content))} >{path}")

    def exec(self, *command: str) -> str:
        """Run a command in the daemon's container."""
        try:
            return self.node.run(f"{CRICTL} exec {self.id} {shlex.join(command)}")
        except AssertionError as error:
            raise AssertionError(f"{error}\nThe daemon's log:\n{self.log()}") from None

    def sh(self, script: str) -> str:
        """Run shell commands in the daemon's container, which has the Docker client."""
        return self.exec("sh", "-euc", script)

    def log(self) -> str:
        return self.node.run(f"tail -n 40 /var/log/pods/{self.name}/log")

    def ended(self) -> tuple[int, str]:
        """Wait until the daemon's container has ended: its exit status, and the reason."""
        wait_for(self._has_ended, "the container ends", self.log, 120)
        status = self._status()
        return status["exitCode"], status["reason"]

    def _status(self) -> dict[str, Any]:
        inspected = json.loads(self.node.run(f"{CRICTL} inspect {self.id}"))
        return dict(inspected["status"])

    def _has_ended(self) -> bool:
        return bool(self._status()["state"] == "CONTAINER_EXITED")

    def stop(self) -> None:
        """End the run as the template has it: by the end of the flow, else by SIGTERM."""
        if self.flow:
            self.node.run(f"kill {self.flow}")
        else:
            self.node.run(f"{CRICTL} stop --timeout 30 {self.id}")

    def remove(self) -> None:
        """Remove the pod, as kubelet does. Nothing that came with it may be left on the node."""
        self.node.run(f"kill {self.flow} 2>/dev/null || true")
        self.node.run(f"{CRICTL} rm -f {self.id}")
        self.node.run(f"{CRICTL} rmp -f {self.sandbox}")
        self.node.run(f"rmdir /sys/fs/cgroup{self.cgroup}")
        wait_for(
            lambda: self.node.run(EVERYTHING) == self.before,
            "nothing is left",
            lambda: self.node.run(EVERYTHING),
        )
