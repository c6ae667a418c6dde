"""The pages' examples and sessions that need a Docker daemon, and no cluster."""

import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import docker
import pytest
from docker.models.containers import Container
from docker.models.networks import Network

from flows.settings import PROJECT
from scripts import registry
from scripts.base import DAEMON, PREFECT
from scripts.registry import push, registry_address
from tests.support import pages
from tests.support.containers import PREFECT_IMAGE, import_busybox, running_container
from tests.support.daemons import Daemon, private_network, run_daemon
from tests.support.local_runs import RunFlow
from tests.support.make import without_make
from tests.support.pages import console, example, parameters
from tests.support.shell import replaced

PROXY = """
import http.client, http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        upstream = http.client.HTTPConnection(sys.argv[1])
        accept = {"Accept": self.headers["Accept"] or "*/*"}
        upstream.request(self.command, "/" + self.path.split("/", 3)[3], headers=accept)
        answer = upstream.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.read())
    do_HEAD = do_GET
http.server.ThreadingHTTPServer(("", 3128), Handler).serve_forever()
"""


def test_make_run_looks_like_this(engine: docker.DockerClient) -> None:
    """Each session of the pages, in order; `…` stands for what differs."""
    name = import_busybox(engine, "docker-sidecar-tests:pages")
    image = f"{registry.REGISTRY}/{registry.push(engine, name, 'tests/pages:1')}"
    sessions = {
        command: output
        for command, output in console().items()
        if output and command.startswith("make run")
    }
    assert len(sessions) >= 2
    for command, output in sessions.items():
        shown = "\n".join(output).replace("alpine:3", image)
        assert_session(command.replace("alpine:3", image), shown)


def assert_session(command: str, shown: str) -> None:
    """A command prints these lines, in this order, and ends as they say."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=PROJECT,
        env=without_make(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == ("SUCCESS" in shown), done.stdout
    rest = iter(done.stdout.splitlines())
    for line in shown.splitlines():
        pattern = re.escape(line).replace("…", ".*")
        is_there = any(re.fullmatch(pattern, printed) for printed in rest)
        assert is_there, f"not there, or not in this order: {line}\n{done.stdout}"


def test_parameters(flow_run: RunFlow, sidecar: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/parameters.md, on a daemon that cannot pull alpine."""
    monkeypatch.setenv("API_KEY", "the flow's own")
    sidecar.container.exec_run(["mkdir", "-p", "/workspace"])

    def outcome(name: str) -> tuple[str, str]:
        given = {**parameters(example(name))}
        given.pop("image", None)
        run = flow_run(**given)
        return str(run.state.message), run.output("INFO")

    assert outcome("exit-code")[0].startswith("Exited with code 3")
    assert outcome("pipe")[1].endswith("ONE")
    assert "GREETING=hello" in outcome("environment")[1]
    assert "API_KEY=the flow's own" in outcome("secret")[1]
    message, output = outcome("limits")
    assert message == "All reference tasks succeeded."
    assert "/workspace" in output


def test_an_own_flow_on_the_engine(engine: docker.DockerClient, tmp_path: Path) -> None:
    """In a repository of one's own, with the commands of the pages."""
    name = import_busybox(engine, "docker-sidecar-tests:own")
    image = f"{registry.REGISTRY}/{registry.push(engine, name, 'tests/own:1')}"
    copy = example("own-repository").replace("../docker-sidecar-on-kubernetes", str(PROJECT))
    shared = tmp_path / "shared"
    try_it = example("try-own").replace("/tmp/shared", str(shared))
    try_it = try_it.replace("unix:///var/run/docker.sock", os.environ["DOCKER_HOST"])
    script = f"{copy}\ncat >flows/two_containers.py\n{try_it}"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    source = example("two-containers").replace("alpine:3", image)
    done = subprocess.run(
        ["bash", "-euc", script],
        input=source,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert done.returncode == 0, done.stdout
        assert (shared / "sorted").read_text().split() == ["apple", "pear", "plum"], done.stdout
    finally:
        for each in engine.containers.list(all=True, filters={"ancestor": image}):
            each.remove(force=True, v=True)


@pytest.fixture(scope="module")
def zsh() -> str:
    """The Mac's shell; on Debian a package has it."""
    if not shutil.which("zsh"):
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            pytest.fail("the commands of the pages are read by zsh, too: install it")
        subprocess.run([PROJECT / "scripts" / "apt-install.sh", "zsh"], check=True)
    return "zsh"


STUB = """#!/bin/sh
line=${0##*/}
for word; do line="$line <$word>"; done
printf '%s\\n' "$line" >>"$SEEN"
"""
# What the pages call that is no builtin of bash and zsh.
PROGRAMS = re.compile(r"(?:^|[|&;(]|\bdo\b|\$\()\s*(?:\w+=\S+\s+)*([\w./-]+)", re.M)


def test_bash_and_zsh_read_the_commands_alike(zsh: str, tmp_path: Path) -> None:
    """Each is pasted into an interactive shell, where all programs only note their arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for number, (_, script) in enumerate(pages.scripts()):
        for program in PROGRAMS.findall(script):
            install_program(programs / Path(program).name, STUB)
        bash_notes = pasted(script, ["bash", "--norc", "-i"], tmp_path / f"{number}-bash", programs)
        zsh_notes = pasted(script, [zsh, "-f", "-i"], tmp_path / f"{number}-zsh", programs)
        assert bash_notes == zsh_notes, script


def install_program(path: Path, script: str) -> None:
    path.write_text(script)
    path.chmod(0o755)


def pasted(script: str, shell: list[str], folder: Path, programs: Path) -> list[str]:
    """What the programs note when a script is pasted into a shell in a new folder."""
    folder.mkdir()
    notes = folder / "seen"
    notes.touch()
    name, *options = shell
    subprocess.run(
        [str(shutil.which(name)), *options],
        input=f"{script}\n",
        cwd=folder,
        env={"PATH": str(programs), "SEEN": str(notes), "HOME": str(folder), "TERM": "dumb"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return sorted(notes.read_text().splitlines())


def test_copied_images_are_those_that_are_needed(tmp_path: Path) -> None:
    install_program(tmp_path / "docker", '#!/bin/sh\necho "$@"\n')
    done = subprocess.run(
        ["sh", "-euc", example("copy-images")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    needed = {DAEMON, "alpine:3", *PREFECT}
    pulled = re.findall("pull (.*)", done.stdout)
    pushed = re.findall("push registry.example.com/team/(.*)", done.stdout)
    assert set(pulled) == set(pushed) == needed


def test_a_package_index_of_the_base_image(engine: docker.DockerClient) -> None:
    named = "registry.example.com/team/prefecthq/prefect:1.4.1-python3.10"
    text = example("base-image").replace(named, PREFECT_IMAGE)
    image, _ = engine.images.build(fileobj=io.BytesIO(text.encode()), rm=True)
    try:
        install = "pip install --retries=0 nothing-of-this-name 2>&1 || true"
        printed = engine.containers.run(image.id, ["sh", "-c", install], remove=True)
        assert b"pypi.example.com" in printed
    finally:
        engine.images.remove(image.id, force=True)


@pytest.mark.usefixtures("current_docker")
def test_a_proxy_that_is_really_used(
    flow_run: RunFlow, engine: docker.DockerClient, tmp_path: Path
) -> None:
    """With the daemon.json of the page; only the proxy knows where the mirror is."""
    path = push(engine, import_busybox(engine), "tests/busybox:1")
    with private_network(engine) as network, proxy(engine, network) as server:
        address = server.attrs["NetworkSettings"]["Networks"][network.name]["IPAddress"]
        names = {
            "proxy.example.com": address,
            "https://mirror.example.com": "http://mirror.invalid",
        }
        (tmp_path / "daemon.json").write_text(replaced(example("daemon-json"), names))
        volumes = {str(tmp_path): {"bind": "/etc/docker"}}
        with run_daemon(engine, network, volumes=volumes) as daemon:
            show = ["sh", "-c", "cat /sys/class/net/eth0/mtu; ip addr show eth0"]
            run = flow_run(on=daemon.url, image=path, command=show)
        requests = server.logs().decode()
    assert run.state.is_successful(), run.state
    assert run.output("INFO").startswith("1400")
    assert "192.168.200." in run.output("INFO")
    assert "mirror.invalid" in requests


def proxy(engine: docker.DockerClient, network: Network) -> AbstractContextManager[Container]:
    """A proxy in a network, which asks the local registry whatever it is asked for."""
    mirror = registry_address(engine, network.name)
    command = ["python", "-uc", PROXY, mirror]
    return running_container(engine, PREFECT_IMAGE, command, network=network.name)
