"""A virtual machine with cgroup v2: the cluster tests' node, Debian's kernel, and no kubelet."""

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
from scripts.registry import provide
from tests.support.containers import import_busybox

INIT = PROJECT / "tests" / "cgroup2" / "node"
# The image of the pods' sandboxes, and of the containers in their daemons.
INNER = "docker-sidecar-tests:cgroup2"
IMPORT_IMAGES = """
containerd >/dev/null & until ctr version >/dev/null 2>&1; do kill -0 $!; sleep 0.1; done
for image in /images/*; do ctr -n k8s.io images import $image; done
kill $!; wait $! || true
"""
QEMU = """
qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 3G -no-reboot -display none
-monitor none -serial stdio -device nvme,drive=disk,serial=1
"""
KERNEL_OPTIONS = "console=ttyS1 root=/dev/nvme0n1 rw init=/node quiet panic=1 cgroup_no_v1=all"
LIFETIME = "1800"  # seconds, whatever becomes of the tests


def built(client: docker.DockerClient) -> Path:
    """The folder with the machine's kernel and disk, kept until the images or files change."""
    node_image = provide_node(client)
    provide(client, DAEMON)
    inputs = f"{node_image} {client.images.get(DAEMON).id}".encode()
    inputs += INIT.read_bytes() + Path(__file__).read_bytes()
    key = hashlib.sha256(inputs).hexdigest()[:12]
    ready = CACHE / "cgroup2" / key
    if not ready.exists():
        shutil.rmtree(ready.parent, ignore_errors=True)
        ready.parent.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=ready.parent) as work:
            finished = Disk(client, node_image, Path(work)).build()
            finished.rename(ready)
    return ready


def provide_node(client: docker.DockerClient) -> str:
    """The id of the node's image: the one of `make airgap`, else kind's own from Docker Hub."""
    try:
        node = client.images.get(images.node_image())
    except ImageNotFound:
        provide(client, DEFAULT_NODE)
        node = client.images.get(DEFAULT_NODE)
    return str(node.id)


class Disk:
    """Builds the machine's kernel and disk in a folder."""

    def __init__(self, client: docker.DockerClient, node_image: str, work: Path) -> None:
        self.client = client
        self.node_image = node_image
        self.work = work
        self.tree = work / "tree"
        self.tars = work / "images"
        self.kernel = work / "kernel"
        self.ready = work / "ready"

    def build(self) -> Path:
        """The folder with the kernel and the disk."""
        for folder in (self.tree, self.tars, self.ready):
            folder.mkdir()
        self._save_images()
        self._extract_node()
        self._import_images()
        modules = self._install_kernel()
        shutil.copy(INIT, self.tree)
        disk = self.ready / "disk"
        run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", self.tree, disk, "6G")
        shutil.move(self.kernel / "boot" / f"vmlinuz-{modules}", self.ready / "kernel")
        return self.ready

    def _save_images(self) -> None:
        inner = import_busybox(self.client, INNER, "CMD sleep infinity")
        for name in (DAEMON, inner):
            with self._tar_of(name).open("wb") as file:
                for chunk in self.client.images.get(name).save(named=name):
                    file.write(chunk)

    def _tar_of(self, image: str) -> Path:
        return self.tars / image.replace(":", "-")

    def _extract_node(self) -> None:
        """Unpack the file system of the node's image."""
        path = self.work / "node.tar"
        node: Any = self.client.containers.create(self.node_image)
        try:
            with path.open("wb") as file:
                file.writelines(node.export())
        finally:
            node.remove(v=True)
        run("tar", "-C", self.tree, "-xf", path)

    def _import_images(self) -> None:
        """Have the images in the containerd of the node, and the inner one beside it."""
        volumes = [f"{self.tree}/var/lib/containerd:/var/lib/containerd", f"{self.tars}:/images"]
        self.client.containers.run(
            self.node_image,
            ["-euc", IMPORT_IMAGES],
            entrypoint="sh",
            privileged=True,
            remove=True,
            labels=LABELS,
            volumes=volumes,
        )
        shutil.move(self._tar_of(INNER), self.tree / "inner.tar")

    def _install_kernel(self) -> str:
        """Install the modules of Debian's kernel, and return its version."""
        depends = run("apt-cache", "depends", "linux-image-cloud-amd64")
        package = depends.split("Depends: ")[1].split()[0]
        run("apt-get", "download", package, cwd=self.work)
        run("dpkg-deb", "-x", *self.work.glob("*.deb"), self.kernel)
        [modules] = (self.kernel / "lib" / "modules").iterdir()
        target = self.tree / "usr" / "lib" / "modules" / modules.name
        shutil.copytree(modules, target, symlinks=True)
        run("chroot", self.tree, "depmod", modules.name)
        return modules.name


def run(*command: str | Path, **options: Any) -> str:
    """Run a program, successfully, and return what it writes."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options)
    return str(done.stdout)


class Node:
    """The machine, while it runs.

    Its process 1 is the file ``node``, which runs what comes through a serial port.
    """

    def __init__(self, folder: Path, console: Path) -> None:
        """Boot. The machine ends with this process, or after half an hour."""
        self.console = console
        disk = f"file={folder}/disk,format=raw,snapshot=on,if=none,id=disk"
        command = ["setpriv", "--pdeathsig=TERM", "nice", "timeout", LIFETIME, *QEMU.split()]
        command += ["-serial", f"file:{console}", "-drive", disk]
        command += ["-kernel", f"{folder}/kernel", "-append", KERNEL_OPTIONS]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"the machine has ended:\n{self._end_of_console()}"
        return line.rstrip("\n")

    def _end_of_console(self) -> str:
        return self.console.read_text(errors="replace")[-5000:]

    def run(self, script: str) -> str:
        """Run shell commands on the node, successfully, within five minutes.

        Returns what they write, without the space around it.
        """
        assert self.process.stdin
        request = base64.b64encode(f"set -eu\n{script}".encode()).decode()
        self.process.stdin.write(f"{request}\n")
        self.process.stdin.flush()
        status, _, output = self._answer().partition(" ")
        text = base64.b64decode(output).decode(errors="replace").strip()
        assert status == "0", f"exit status {status} of {script}\n{text}"
        return text

    def end(self) -> None:
        self.process.terminate()
        self.process.communicate()
