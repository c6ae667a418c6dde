"""kept_layers on a cluster: slots of a node, and what kubelet does when a daemon does not start."""

from collections.abc import Callable
from typing import Any

from tests.support.kubectl import kubectl, on_node
from tests.support.namespaces import RunningPod
from tests.support.submitted_runs import FOREVER, Submit, SubmittedRun
from tests.support.templates import daemon_of, edited
from tests.support.waiting import wait_for

ROOT = ["docker", "info", "--format", "{{.DockerRootDir}}"]
BOOT_ID = "$(cat /proc/sys/kernel/random/boot_id)"


class KeptLayers:
    """Runs on a store of the node that has two slots."""

    def __init__(self, submit: Submit, store: str) -> None:
        self.submit = submit
        self.store = store
        self.template = edited("kept_layers", "/var/lib/docker-sidecar", store)
        command = daemon_of(self.template)["command"]
        command[2] = command[2].replace("0 1 2 3 4 5 6 7", "0 1")

    def run(self, command: Any = FOREVER) -> SubmittedRun:
        return self.submit(self.template, command=command)

    def on_node(self, script: str) -> str:
        """Run a script on the node, in the folder of this start of the node."""
        return on_node("sh", "-euc", f"cd {self.store}/{BOOT_ID}; {script}")


def slot_of(pod: RunningPod) -> str:
    """The slot that a pod's daemon has, or `docker` if it has none."""
    return pod.execute("dind-daemon", *ROOT).strip().rpartition("/")[2]


def lists_nothing(pod: RunningPod, *command: str) -> Callable[[], bool]:
    return lambda: pod.execute("dind-daemon", "docker", *command) == ""


def test_runs_at_once_have_a_slot_each_while_there_are_slots(submit: Submit, store: str) -> None:
    kept = KeptLayers(submit, store)
    runs = [kept.run(), kept.run()]
    assert {slot_of(run.container_writes("up")) for run in runs} == {"0", "1"}
    kept.run("true").succeeds("Downloaded newer image")


def test_a_slot_is_used_again_after_its_pods_sudden_death(submit: Submit, store: str) -> None:
    kept = KeptLayers(submit, store)
    first = kept.run()
    pod = first.container_writes("up")
    pod.execute("dind-daemon", "docker", "volume", "create", "left")
    kubectl(f"delete pod {pod.name} --force --grace-period=0")
    first.job_ends()
    second = kept.run()
    pod = second.container_writes("up")
    second.logged("Image is up to date")
    assert slot_of(pod) == "0"
    wait_for(lists_nothing(pod, "volume", "ls", "--quiet"), "the volume is gone", second.seen)
    containers = pod.execute("dind-daemon", "docker", "ps", "--all", "--quiet")
    assert len(containers.split()) == 1, "its own"


def test_a_run_goes_on_without_a_slot_that_dockerd_cannot_use(submit: Submit, store: str) -> None:
    """kubelet starts the daemon again. The slot goes, and the next run has a new one."""
    kept = KeptLayers(submit, store)
    first = kept.run("true")
    first.succeeds()
    first.job_ends()
    kept.on_node("echo broken >0/network/files/local-kv.db")
    second = kept.run()
    assert slot_of(second.container_writes("up")) == "docker"
    second.wait(lambda: kept.on_node("ls") == "0.lock", "the slot is gone", 30)
    third = kept.run()
    assert slot_of(third.container_writes("up")) == "0"


def test_a_configuration_that_dockerd_refuses_costs_no_layers(submit: Submit, store: str) -> None:
    kept = KeptLayers(submit, store)
    first = kept.run("true")
    first.succeeds()
    first.job_ends()
    good = daemon_of(kept.template)["args"]
    daemon_of(kept.template)["args"] = [*good, "--storage-driver=nonsense"]
    refused = kept.run("true")
    assert "does not answer" in refused.fails() or "did not answer" in str(refused.record.message)
    refused.job_ends()
    daemon_of(kept.template)["args"] = good
    kept.run("true").succeeds("Image is up to date")
