"""Stand-ins for images that a registry would have served, from Debian, PyPI and Go packages.

Needs root on Debian, for mmdebstrap. README.md beside this file says what they are, and what they are not.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import docker
from docker.errors import BuildError, ImageNotFound

from flows.settings import PROJECT
from scripts.base import DAEMON, PREFECT, REGISTRY_IMAGE, SetupError, say

HERE = Path(__file__).resolve().parent
BASE = "docker-sidecar-airgap-base:bookworm"
OLD_DAEMON = "docker:stable-dind"  # the published recipe's
LABEL = "docker-sidecar-airgap.inputs"  # a hash of what an image was made from
CA_FOLDER = Path("/usr/local/share/ca-certificates")
NOT_THERE = 3  # exit status of programs.sh


KUBERNETES = re.findall(r"k8s.io/kubernetes (v\S+)", (HERE / "kubernetes" / "go.mod").read_text())[
    0
]
NODE = f"kindest/node:{KUBERNETES}-airgap"
ENGINE_PROGRAMS = (
    "containerd-shim-runc-v2",
    "dockerd",
    "docker-proxy",
    "runc",
)  # dockerd is its own containerd
CONTAINERD_PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr", "runc")
NODE_PROGRAMS = (
    "coredns",
    "crictl",
    "kubeadm",
    "kubectl",
    "kubelet",
    "host-local",
    "loopback",
    "portmap",
    "ptp",
)
CONTROL_PLANE_PROGRAMS = (
    "coredns",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
)


def programs(module: str, *options: str, optional: bool = False) -> Path | None:
    """The folder with a module's programs, built by programs.sh. With ``optional``, None if they cannot be built."""
    done = subprocess.run(
        [HERE / "programs.sh", module, *options], stdout=subprocess.PIPE, text=True
    )
    if optional and done.returncode == NOT_THERE:
        return None
    if done.returncode != 0:
        raise SetupError(f"the programs of scripts/airgap/{module} cannot be built, see above")
    return Path(done.stdout.strip())


def control_plane_images() -> list[str]:
    """The images that kubeadm starts a cluster with."""
    command = [
        f"{programs('kubernetes')}/kubeadm",
        "config",
        "images",
        "list",
        "--kubernetes-version",
        KUBERNETES,
    ]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def build(client: docker.DockerClient, name: str) -> None:
    """Build the stand-in for an image, unless it exists and its inputs have not changed.

    Raises:
        SetupError: if there is no stand-in for it, or it cannot be built.
    """
    _build_base(client)
    if name in PREFECT:
        _build(
            client,
            PREFECT,
            "prefect.Dockerfile",
            {"requirements.txt": PROJECT / "requirements.txt"},
        )
    elif name in (DAEMON, OLD_DAEMON):
        files = {file: HERE / file for file in ("dockerd-entrypoint.sh", "runc-drop-missing-caps")}
        folder = programs("docker", optional=True) if name == DAEMON else None
        if folder:
            files |= {f"bin/{program}": folder / program for program in ENGINE_PROGRAMS}
        _build(client, [name], "dind.Dockerfile", files)
    elif name == REGISTRY_IMAGE:
        folder = programs("docker", "--if-built", optional=True)  # `make run` need not wait for it
        _build(
            client,
            [name],
            "registry.Dockerfile",
            {"bin/registry": folder / "registry"} if folder else {},
        )
    elif name == NODE:
        modules = ("kubernetes", "docker", "network-policy", "gvisor")
        kubernetes, engine, policy, gvisor = (Path(f"{programs(it)}") for it in modules)
        files = {f"bin/{program}": kubernetes / program for program in CONTROL_PLANE_PROGRAMS}
        _build(client, control_plane_images(), "control-plane.Dockerfile", files)
        files = {f"bin/{program}": kubernetes / program for program in NODE_PROGRAMS}
        files |= {f"bin/{program}": engine / program for program in CONTAINERD_PROGRAMS}
        files |= {
            f"bin/{path.name}": path for folder in (policy, gvisor) for path in folder.iterdir()
        }
        files |= {f"node/{path.name}": path for path in (HERE / "node").iterdir()}
        _build(client, [NODE], "node.Dockerfile", files)
    else:
        raise SetupError(
            f"{name} can neither be pulled nor built here. `make airgap` builds what can be"
        )


def _build(
    client: docker.DockerClient, names: Sequence[str], dockerfile: str, files: Mapping[str, Path]
) -> None:
    """Build one image from files, by the path that they have in the context, and give it these names."""
    files = {"Dockerfile": HERE / dockerfile, **files}
    inputs = _hash([inputs_of(client, BASE), *_contents(files)])
    source = next((name for name in names if inputs_of(client, name) == inputs), None)
    if source is None:
        source = names[0]
        say(f"{source}: building a stand-in (about a minute)")
        labels = {
            "org.opencontainers.image.description": "A stand-in, not the published image: see scripts/airgap/README.md",
            LABEL: inputs,
        }
        with tempfile.TemporaryDirectory() as context:
            Path(context, "bin").mkdir()
            for name, path in files.items():
                Path(context, name).parent.mkdir(exist_ok=True)
                shutil.copy(path, Path(context, name))
            try:
                # the builder's own network may not exist, or not reach what the machine reaches
                client.images.build(
                    path=context, tag=source, labels=labels, buildargs={"BASE": BASE}, network_mode="host",
                    rm=True, forcerm=True,
                )  # fmt: skip
            except BuildError as error:
                log = "".join(part.get("stream", "") for part in error.build_log)
                raise SetupError(
                    f"{source}: {error}; the end of the build's log:\n{log[-3000:]}"
                ) from None
    for name in names:
        client.images.get(source).tag(*name.rsplit(":", 1))


def _contents(files: Mapping[str, Path]) -> Iterable[str]:
    for name, path in sorted(files.items()):
        is_program = name.startswith("bin/")  # whose folder has a hash of its sources in its name
        yield f"{name} {path.parent.name if is_program else hashlib.sha256(path.read_bytes()).hexdigest()}"


def _build_base(client: docker.DockerClient) -> None:
    """Import the Debian system on which every image here is built."""
    bootstrap = [
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=minbase",
        "--include=ca-certificates",
    ]
    bootstrap += [
        f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in ("doc", "man", "locale", "info")
    ]
    if CA_FOLDER.is_dir():  # else no build gets past a proxy that only this machine trusts
        bootstrap += [f"--customize-hook=copy-in {CA_FOLDER} {CA_FOLDER.parent}"]
    bootstrap += ['--customize-hook=chroot "$1" update-ca-certificates >/dev/null 2>&1']
    bootstrap += ['--customize-hook=rm -f "$1/etc/resolv.conf" "$1/etc/hostname"']
    certificates = {str(path): path for path in CA_FOLDER.rglob("*.crt")}
    inputs = _hash([*bootstrap, *_contents(certificates)])
    if inputs_of(client, BASE) == inputs:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SetupError(
            "Docker Hub is out of reach, and stand-ins for its images are built on Debian, as root. Run this there, "
            'or give your Docker engine a mirror ("registry-mirrors" in its daemon.json)'
        )
    install = [f"{PROJECT}/scripts/apt-install.sh", "mmdebstrap"]
    if shutil.which("mmdebstrap") is None and subprocess.run(install).returncode != 0:
        raise SetupError("stand-ins for images need mmdebstrap, which cannot be installed")
    say(f"{BASE}: bootstrapping Debian (about 30 s)")
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder, "base.tar")
        if subprocess.run([*bootstrap, "bookworm", str(tar)], stdout=sys.stderr).returncode != 0:
            raise SetupError("Debian cannot be bootstrapped for the stand-ins of images, see above")
        repository, tag = BASE.split(":")
        client.api.import_image_from_file(
            str(tar), repository, tag, changes=[f"LABEL {LABEL}={inputs}"]
        )
    client.images.get(BASE)  # a failed import is reported in the body of a 200, so look


def inputs_of(client: docker.DockerClient, name: str) -> str | None:
    """The hash of what a stand-in was made from; None if the image is not there, or not a stand-in."""
    try:
        return client.images.get(name).labels.get(LABEL)
    except ImageNotFound:
        return None


def _hash(lines: Iterable[object]) -> str:
    return hashlib.sha256("\n".join(map(str, lines)).encode()).hexdigest()
