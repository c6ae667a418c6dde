"""A virtual machine with cgroup v2: the cluster tests' node with Debian's kernel, containerd and no kubelet."""

import base64
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import docker
from docker.errors import ImageNotFound

from flows.settings import PROJECT
from scripts.airgap import images
from scripts.base import CACHE, DAEMON, LABELS
from scripts.cluster import DEFAULT_NODE
from scripts.images import provide
from tests.support.containers import import_busybox

INIT = PROJECT / "tests" / "cgroup2" / "node"
INNER = "docker-sidecar-tests:cgroup2"  # the image of the pods' sandboxes, and of the containers in their daemons
IMPORT = """
containerd >/dev/null & until ctr version >/dev/null 2>&1; do kill -0 $!; sleep 0.1; done
for image in /images/*; do ctr -n k8s.io images import $image; done
kill $!; wait $! || true
"""
QEMU = (
    "qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 3G -no-reboot -display none "
    "-monitor none -serial stdio -device nvme,drive=disk,serial=1"
)
KERNEL_OPTIONS = "console=ttyS1 root=/dev/nvme0n1 rw init=/node quiet panic=1 cgroup_no_v1=all"


def built(client: docker.DockerClient) -> Path:
    """The folder with the machine's kernel and disk, kept until the images or these files change."""
    try:
        node = client.images.get(images.NODE)
    except ImageNotFound:  # kind's own, from Docker Hub
        provide(client, DEFAULT_NODE)
        node = client.images.get(DEFAULT_NODE)
    provide(client, DAEMON)
    inputs = (
        f"{node.id} {client.images.get(DAEMON).id}".encode()
        + INIT.read_bytes()
        + Path(__file__).read_bytes()
    )
    ready = CACHE / "cgroup2" / hashlib.sha256(inputs).hexdigest()[:12]
    if not ready.exists():
        shutil.rmtree(ready.parent, ignore_errors=True)
        ready.parent.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=ready.parent) as work:
            _build(client, node.id, Path(work))
            Path(work, "ready").rename(ready)
    return ready


def _build(client: docker.DockerClient, node_image: str, work: Path) -> None:
    tree, tars, kernel, ready = (work / name for name in ("tree", "images", "kernel", "ready"))
    for folder in (tree, tars, ready):
        folder.mkdir()
    for name in (DAEMON, import_busybox(client, INNER, "CMD sleep infinity")):
        with (tars / name.replace(":", "-")).open("wb") as file:
            file.writelines(client.images.get(name).save(named=name))
    node = client.containers.create(node_image)
    try:
        with (work / "node.tar").open("wb") as file:
            file.writelines(node.export())
    finally:
        node.remove(v=True)
    _sh("tar", "-C", tree, "-xf", work / "node.tar")
    volumes = [f"{tree}/var/lib/containerd:/var/lib/containerd", f"{tars}:/images"]
    client.containers.run(
        node_image,
        ["-euc", IMPORT],
        entrypoint="sh",
        privileged=True,
        remove=True,
        labels=LABELS,
        volumes=volumes,
    )
    shutil.move(tars / INNER.replace(":", "-"), tree / "inner.tar")
    package = (
        _sh("apt-cache", "depends", "linux-image-cloud-amd64").split("Depends: ")[1].split()[0]
    )
    _sh("apt-get", "download", package, cwd=work)
    _sh("dpkg-deb", "-x", *work.glob("*.deb"), kernel)
    [modules] = (kernel / "lib/modules").iterdir()
    shutil.copytree(modules, tree / "usr/lib/modules" / modules.name, symlinks=True)
    _sh("chroot", tree, "depmod", modules.name)
    shutil.copy(INIT, tree)
    _sh("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, ready / "disk", "6G")
    shutil.move(kernel / "boot" / f"vmlinuz-{modules.name}", ready / "kernel")


def _sh(*command: str | Path, **options: Any) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


class Node:
    """The machine, while it runs. Its process 1 is the file ``node``, which runs what comes through a serial port."""

    def __init__(self, folder: Path, console: Path) -> None:
        """Boot. The machine ends with this process, or after half an hour."""
        self.console = console
        command = [
            "setpriv",
            "--pdeathsig=TERM",
            "nice",
            "timeout",
            "1800",
            *QEMU.split(),
            "-serial",
            f"file:{console}",
        ]
        command += ["-drive", f"file={folder}/disk,format=raw,snapshot=on,if=none,id=disk"]
        command += ["-kernel", f"{folder}/kernel", "-append", KERNEL_OPTIONS]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"the machine has ended:\n{self.console.read_text(errors='replace')[-5000:]}"
        return line.rstrip("\n")

    def run(self, script: str) -> str:
        """What shell commands on the node write, without the space around it. They must succeed within five minutes."""
        assert self.process.stdin
        self.process.stdin.write(base64.b64encode(f"set -eu\n{script}".encode()).decode() + "\n")
        self.process.stdin.flush()
        status, _, output = self._answer().partition(" ")
        text = base64.b64decode(output).decode(errors="replace").strip()
        assert status == "0", f"exit status {status} of {script}\n{text}"
        return text

    def end(self) -> None:
        self.process.terminate()
        self.process.communicate()
