"""Stand-ins for images that a registry would have served, from Debian, PyPI and Go packages.

Needs root on Debian, for mmdebstrap. README.md beside this file says what they are, and what
they are not.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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

GO_MOD = HERE / "kubernetes" / "go.mod"
ENGINE_PROGRAMS = (  # dockerd is its own containerd
    "containerd-shim-runc-v2",
    "dockerd",
    "docker-proxy",
    "runc",
)
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


class NoProgramsError(SetupError):
    """A module's programs are not there, and there is nothing to build them with."""


def kubernetes_version() -> str:
    """The version of Kubernetes that the stand-in for kind's node has, as in "v1.37.2"."""
    match = re.search(r"k8s.io/kubernetes (v\S+)", GO_MOD.read_text())
    assert match
    return match[1]


def node_image() -> str:
    """The name of the stand-in for kind's node."""
    return f"kindest/node:{kubernetes_version()}-airgap"


def programs(module: str, *options: str) -> Path:
    """The folder with a module's programs, built by programs.sh.

    Raises:
        NoProgramsError: if there is nothing to build them with; or, with ``--if-built``, if
            they are not there.
        SetupError: if they cannot be built.
    """
    command = [f"{HERE}/programs.sh", module, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == NOT_THERE:
        raise NoProgramsError(f"the programs of scripts/airgap/{module} are not there, see above")
    if done.returncode != 0:
        raise SetupError(f"the programs of scripts/airgap/{module} cannot be built, see above")
    return Path(done.stdout.strip())


def control_plane_images() -> list[str]:
    """The images that kubeadm starts a cluster with."""
    kubeadm = str(programs("kubernetes") / "kubeadm")
    command = [kubeadm, "config", "images", "list", "--kubernetes-version", kubernetes_version()]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.split()


def build(client: docker.DockerClient, name: str) -> None:
    """Build the stand-in for an image, unless it exists and its inputs have not changed.

    Raises:
        SetupError: if there is no stand-in for it, or it cannot be built.
    """
    _build_base(client)
    if name in PREFECT:
        requirements = {"requirements.txt": PROJECT / "requirements.txt"}
        _build(client, PREFECT, "prefect.Dockerfile", requirements)
    elif name in (DAEMON, OLD_DAEMON):
        _build(client, [name], "dind.Dockerfile", _daemon_files(name))
    elif name == REGISTRY_IMAGE:
        _build(client, [name], "registry.Dockerfile", _registry_files())
    elif name == node_image():
        _build(client, control_plane_images(), "control-plane.Dockerfile", _control_plane_files())
        _build(client, [name], "node.Dockerfile", _node_files())
    else:
        raise SetupError(
            f"{name} can neither be pulled nor built here. `make airgap` builds what can be"
        )


Files = dict[str, Path]  # of a build, by the path that they have in its context


def _programs(folder: Path, names: Iterable[str]) -> Files:
    return {f"bin/{name}": folder / name for name in names}


def _daemon_files(name: str) -> Files:
    files = {file: HERE / file for file in ("dockerd-entrypoint.sh", "runc-drop-missing-caps")}
    if name == DAEMON:
        with suppress(NoProgramsError):
            files |= _programs(programs("docker"), ENGINE_PROGRAMS)
    return files


def _registry_files() -> Files:
    with suppress(NoProgramsError):  # `make run` need not wait for it
        return _programs(programs("docker", "--if-built"), ["registry"])
    return {}


def _control_plane_files() -> Files:
    return _programs(programs("kubernetes"), CONTROL_PLANE_PROGRAMS)


def _node_files() -> Files:
    files = _programs(programs("kubernetes"), NODE_PROGRAMS)
    files |= _programs(programs("docker"), CONTAINERD_PROGRAMS)
    for module in ("network-policy", "gvisor"):
        folder = programs(module)
        files |= _programs(folder, [path.name for path in folder.iterdir()])
    files |= {f"node/{path.name}": path for path in (HERE / "node").iterdir()}
    return files


def _build(
    client: docker.DockerClient, names: Sequence[str], dockerfile: str, files: Mapping[str, Path]
) -> None:
    """Build one image from files, and give it these names, unless one of them has these inputs."""
    files = {"Dockerfile": HERE / dockerfile, **files}
    inputs = _hash([inputs_of(client, BASE), *_contents(files)])
    source = _built_from(client, names, inputs)
    if source is None:
        source = names[0]
        say(f"{source}: building a stand-in (about a minute)")
        _build_image(client, source, inputs, files)
    for name in names:
        client.images.get(source).tag(*name.rsplit(":", 1))


def _built_from(client: docker.DockerClient, names: Sequence[str], inputs: str) -> str | None:
    for name in names:
        if inputs_of(client, name) == inputs:
            return name
    return None


def _build_image(
    client: docker.DockerClient, name: str, inputs: str, files: Mapping[str, Path]
) -> None:
    labels = {
        "org.opencontainers.image.description": (
            "A stand-in, not the published image: see scripts/airgap/README.md"
        ),
        LABEL: inputs,
    }
    with tempfile.TemporaryDirectory() as context:
        Path(context, "bin").mkdir()
        for place, path in files.items():
            Path(context, place).parent.mkdir(exist_ok=True)
            shutil.copy(path, Path(context, place))
        try:
            client.images.build(
                path=context,
                tag=name,
                labels=labels,
                buildargs={"BASE": BASE},
                # the builder's own network may not exist, or not reach what the machine reaches
                network_mode="host",
                rm=True,
                forcerm=True,
            )
        except BuildError as error:
            log = "".join(part.get("stream", "") for part in error.build_log)
            raise SetupError(
                f"{name}: {error}; the end of the build's log:\n{log[-3000:]}"
            ) from None


def _contents(files: Mapping[str, Path]) -> Iterable[str]:
    """A line on each file, which changes with its content."""
    for name, path in sorted(files.items()):
        if name.startswith("bin/"):  # a program, whose folder has a hash of its sources in its name
            yield f"{name} {path.parent.name}"
        else:
            yield f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _bootstrap() -> list[str]:
    """The command that makes a Debian system, without the file that it writes."""
    command = [
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=minbase",
        "--include=ca-certificates",
    ]
    for folder in ("doc", "man", "locale", "info"):
        command.append(f"--dpkgopt=path-exclude=/usr/share/{folder}/*")
    if CA_FOLDER.is_dir():  # else no build gets past a proxy that only this machine trusts
        command.append(f"--customize-hook=copy-in {CA_FOLDER} {CA_FOLDER.parent}")
    command.append('--customize-hook=chroot "$1" update-ca-certificates >/dev/null 2>&1')
    command.append('--customize-hook=rm -f "$1/etc/resolv.conf" "$1/etc/hostname"')
    return command


def _build_base(client: docker.DockerClient) -> None:
    """Import the Debian system on which every image here is built."""
    certificates = {str(path): path for path in CA_FOLDER.rglob("*.crt")}
    inputs = _hash([*_bootstrap(), *_contents(certificates)])
    if inputs_of(client, BASE) == inputs:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SetupError(
            "Docker Hub is out of reach, and stand-ins for its images are built on Debian, "
            "as root. Run this there, or give your Docker engine a mirror "
            '("registry-mirrors" in its daemon.json)'
        )
    _install_mmdebstrap()
    say(f"{BASE}: bootstrapping Debian (about 30 s)")
    with tempfile.TemporaryDirectory() as folder:
        tar = str(Path(folder, "base.tar"))
        done = subprocess.run([*_bootstrap(), "bookworm", tar], stdout=sys.stderr)
        if done.returncode != 0:
            raise SetupError("Debian cannot be bootstrapped for the stand-ins of images, see above")
        changes = [f"LABEL {LABEL}={inputs}"]
        repository, tag = BASE.split(":")
        client.api.import_image_from_file(tar, repository, tag, changes=changes)
    client.images.get(BASE)  # a failed import is reported in the body of a 200, so look


def _install_mmdebstrap() -> None:
    if shutil.which("mmdebstrap"):
        return
    install = [f"{PROJECT}/scripts/apt-install.sh", "mmdebstrap"]
    if subprocess.run(install).returncode != 0:
        raise SetupError("stand-ins for images need mmdebstrap, which cannot be installed")


def inputs_of(client: docker.DockerClient, name: str) -> str | None:
    """The hash of what a stand-in was made from; None if the image is not there, or none."""
    try:
        return client.images.get(name).labels.get(LABEL)
    except ImageNotFound:
        return None


def _hash(lines: Iterable[object]) -> str:
    return hashlib.sha256("\n".join(map(str, lines)).encode()).hexdigest()
