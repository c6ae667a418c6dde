"""Stand-ins for images that a registry would have served, from Debian and PyPI packages.

A registry filled with them serves as a mirror of Docker Hub: official images lie under library/.
Needs root on Debian, for mmdebstrap.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import docker
from docker.errors import BuildError, ImageNotFound

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

BASE = "docker-sidecar-airgap-base:bookworm"
# as the flow, the flow image and the Agent's manifest name it
PREFECT = tuple(f"prefecthq/prefect:1.4.1{python}" for python in ("", "-python3.10", "-python3.7"))
RECIPE_DIND = "docker:stable-dind"  # the published recipe's
REGISTRY = ("registry:2",)
CONTROL_PLANE = "docker-sidecar-airgap-control-plane:v1.20.2"
NODE = "kindest/node:v1.20.2-debian"

INPUTS_LABEL = "docker-sidecar-airgap.inputs"  # hash of what an image was made from
BUILD_MB = 3000  # the images, and what building them leaves behind until it is done

_CA_FOLDER = Path("/usr/local/share/ca-certificates")
_started = time.monotonic()


def say(message: str) -> None:
    print(f"images.py: [{time.monotonic() - _started:.0f}s] {message}", file=sys.stderr, flush=True)


def dind_names() -> tuple[str, ...]:
    """The tags that the job templates ask for, and the one that the published recipe asks for."""
    templates = "".join(p.read_text() for p in sorted(ROOT.glob("job_templates/*.yaml")))
    found = re.findall(r"""image:\s*["']?(docker:[\w.-]+)""", templates)
    return tuple(dict.fromkeys([*found, RECIPE_DIND]))


def build(client: docker.DockerClient) -> list[str]:
    """Build the stand-ins whose inputs changed and return the names of all of them."""
    build_base(client)
    prefect = {"prefect-entrypoint.sh": HERE / "prefect-entrypoint.sh", "requirements.txt": ROOT / "requirements.txt"}
    dind = {name: HERE / name for name in ("dockerd-entrypoint.sh", "runc-drop-missing-caps")}
    registry = {"registry.yml": HERE / "registry.yml"}
    build_image(client, PREFECT, {"Dockerfile": HERE / "prefect.Dockerfile", **prefect})
    build_image(client, dind_names(), {"Dockerfile": HERE / "dind.Dockerfile", **dind})
    build_image(client, REGISTRY, {"Dockerfile": HERE / "registry.Dockerfile", **registry})
    return [*PREFECT, *dind_names(), *REGISTRY]


def build_node(client: docker.DockerClient, programs: Path) -> None:
    """Build the image of a kind node around Kubernetes' programs, which lie in a folder."""
    build_base(client)
    node = HERE / "node"
    control_plane = {"Dockerfile": node / "control-plane.Dockerfile", "bin": programs}
    build_image(client, [CONTROL_PLANE], control_plane)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "control-plane.tar")
        with archive.open("wb") as file:
            file.writelines(client.images.get(CONTROL_PLANE).save(named=CONTROL_PLANE))
        files = {path.name: path for path in node.iterdir()}
        build_image(client, [NODE], {**files, "bin": programs, archive.name: archive})


def build_base(client: docker.DockerClient) -> None:
    """Import the Debian system on which every image here is built."""
    bootstrap = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--include=ca-certificates"]
    bootstrap += [f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in ("doc", "man", "locale", "info")]
    if _CA_FOLDER.is_dir():  # else no build gets past a proxy that only this machine trusts
        bootstrap += [f"--customize-hook=copy-in {_CA_FOLDER} {_CA_FOLDER.parent}"]
    bootstrap += ['--customize-hook=chroot "$1" update-ca-certificates >/dev/null 2>&1']
    bootstrap += ['--customize-hook=rm -f "$1/etc/resolv.conf" "$1/etc/hostname"']

    inputs = hashlib.sha256(repr(bootstrap).encode()).hexdigest()
    if _inputs_of(client, BASE) == inputs:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(
            "images.py: Docker Hub cannot be reached, and what stands in for its images is built on Debian, as root. "
            "Run this there, or give Docker a mirror (registry-mirrors in daemon.json) and start a daemon yourself"
        )
    _check_space(client)
    if shutil.which("mmdebstrap") is None:
        say("installing mmdebstrap with apt-get")
        if subprocess.run([ROOT / "scripts" / "apt-install.sh", "mmdebstrap"]).returncode != 0:
            raise SystemExit("images.py: without mmdebstrap no stand-in can be built")
    say(f"{BASE}: bootstrapping Debian (about 30 s)")
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder, "base.tar")
        repository, tag = BASE.split(":")
        subprocess.run([*bootstrap, "bookworm", str(tar)], check=True, stdout=sys.stderr)
        client.api.import_image_from_file(str(tar), repository, tag, changes=[f"LABEL {INPUTS_LABEL}={inputs}"])
    client.images.get(BASE)  # a failed import is reported in the body of a 200, so look


def build_image(client: docker.DockerClient, names: Sequence[str], files: Mapping[str, Path]) -> None:
    """Build one image from a context of these files (one is the Dockerfile) unless it is there."""
    with tempfile.TemporaryFile() as context:
        with tarfile.open(fileobj=context, mode="w") as tar:
            for name in sorted(files):
                tar.add(files[name], arcname=name, filter=_without_metadata)
        context.seek(0)
        digest = hashlib.sha256(str(_inputs_of(client, BASE)).encode())
        while chunk := context.read(1 << 20):
            digest.update(chunk)
        inputs = digest.hexdigest()

        source = next((name for name in names if _inputs_of(client, name) == inputs), None)
        if source is None:
            _check_space(client)
            say(f"{names[0]}: building (about a minute)")
            title = names[0].rpartition(":")[0]
            labels = {
                "org.opencontainers.image.title": title,
                "org.opencontainers.image.description": f"Stand-in for {title}, built from Debian and PyPI"
                " packages; not the published image",
                INPUTS_LABEL: inputs,
            }
            context.seek(0)
            try:
                # the builder's own network may not exist, or not reach what the machine reaches
                client.images.build(
                    fileobj=context, custom_context=True, tag=names[0], labels=labels,
                    buildargs={"BASE": BASE}, network_mode="host", rm=True, forcerm=True,
                )  # fmt: skip
            except BuildError as error:
                log = "".join(part.get("stream", "") for part in error.build_log)
                raise SystemExit(f"images.py: {names[0]}: {error}; the build's last words:\n{log[-3000:]}") from None
            source = names[0]
        for name in names:
            client.images.get(source).tag(*name.split(":"))


def fill(client: docker.DockerClient, registry: str) -> None:
    """Push them into a plain-http registry, under the names that they have on Docker Hub."""
    for name in build(client):
        repository, tag = name.split(":")
        path = repository if "/" in repository else f"library/{repository}"
        image = client.images.get(name)
        if image.id == _config_digest(registry, path, tag):
            continue
        say(f"{name}: pushing to {registry}")
        image.tag(f"{registry}/{path}", tag)
        try:
            for line in client.api.push(f"{registry}/{path}", tag, stream=True, decode=True):
                if "error" in line:  # in the body of a 200
                    raise SystemExit(f"images.py: pushing {name} to {registry}: {line['error']}")
        finally:
            client.images.remove(f"{registry}/{path}:{tag}")


def _config_digest(registry: str, path: str, tag: str) -> str | None:
    """The image id behind a tag in a registry, None where the registry does not have it."""
    request = urllib.request.Request(
        f"http://{registry}/v2/{path}/manifests/{tag}",
        headers={"Accept": "application/vnd.docker.distribution.manifest.v2+json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(json.load(response)["config"]["digest"])
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    except OSError as error:
        raise SystemExit(f"images.py: no registry answers at {registry} ({error}); start it first") from None


def _inputs_of(client: docker.DockerClient, name: str) -> str | None:
    try:
        return str(client.images.get(name).labels.get(INPUTS_LABEL))
    except ImageNotFound:
        return None


def _check_space(client: docker.DockerClient) -> None:
    root = Path(client.info()["DockerRootDir"])
    free = shutil.disk_usage(root).free // 2**20 if root.is_dir() else BUILD_MB
    if free < BUILD_MB:
        raise SystemExit(f"images.py: building needs {BUILD_MB} MB in {root}, which has {free} MB; free some")


def _without_metadata(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
    return entry
