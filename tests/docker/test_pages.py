"""The pages' examples and sessions that need a Docker daemon, and no cluster."""

import io
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import docker
import pytest

from flows.settings import PROJECT
from scripts.base import DAEMON, PREFECT
from scripts.registry import push, registry_address
from tests.support.containers import import_busybox, running_container
from tests.support.daemons import private_network, run_daemon
from tests.support.local_runs import RunFlow
from tests.support.pages import console, example

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


@pytest.mark.usefixtures("engine")
def test_make_run_looks_like_this(capfd: pytest.CaptureFixture[str]) -> None:
    sessions = [
        (command, output)
        for command, output in console().items()
        if output and "make run" in command
    ]
    assert sessions
    for command, output in sessions:
        subprocess.run(["bash", "-c", command], cwd=PROJECT, check=True)
        printed = capfd.readouterr().out
        said = iter(
            re.sub(r"^\[\d.*?\]", "[…]", line) for line in printed.splitlines()
        )  # without the time
        for line in output:
            assert line in said, f"not there, or not in this order: {line}\n{printed}"


def test_parameters(flow_run: RunFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "the flow's own")
    outcomes = []
    for line in example("parameters").splitlines():
        [_, pair] = shlex.split(line, comments=True)
        name, _, value = pair.partition("=")
        run = flow_run(**{"command": "env", name: json.loads(value)})
        outcomes.append((run.state.message, run.output("INFO")))
    assert "exited with code 3" in outcomes[0][0]
    assert outcomes[1][1].endswith("ONE")
    assert "GREETING=hello" in outcomes[2][1]
    assert "API_KEY=the flow's own" in outcomes[4][1]
    assert [message for message, _ in outcomes[1:]] == ["All reference tasks succeeded."] * 5


def test_copied_images_are_those_that_are_needed(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "docker").chmod(0o755)
    script = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-euc", example("copy-images")], env=script, stdout=subprocess.PIPE, text=True
    )
    assert set(re.findall("pull (.*)", done.stdout)) == {DAEMON, *PREFECT}
    assert set(re.findall("push registry.example.com/team/(.*)", done.stdout)) == {DAEMON, *PREFECT}


def test_a_package_index_of_the_base_image(engine: docker.DockerClient) -> None:
    text = example("base-image").replace(
        "registry.example.com/team/prefecthq/prefect:1.4.1-python3.10", PREFECT[0]
    )
    image, _ = engine.images.build(fileobj=io.BytesIO(text.encode()), rm=True)
    try:
        asked = "pip install --retries=0 nothing-of-this-name 2>&1 || true"
        assert b"pypi.example.com" in engine.containers.run(
            image.id, ["sh", "-c", asked], remove=True
        )
    finally:
        engine.images.remove(image.id, force=True)


@pytest.mark.usefixtures("current_docker")
def test_a_proxy_that_is_really_used(
    flow_run: RunFlow, engine: docker.DockerClient, tmp_path: Path
) -> None:
    """With the daemon.json of the page; only the proxy knows where the mirror is."""
    path = push(engine, import_busybox(engine), "tests/busybox:1")
    with private_network(engine) as network:
        mirror = registry_address(engine, network.name)
        with running_container(
            engine, PREFECT[0], ["python", "-uc", PROXY, mirror], network=network.name
        ) as proxy:
            address = proxy.attrs["NetworkSettings"]["Networks"][network.name]["IPAddress"]
            text = example("daemon-json").replace("proxy.example.com", address)
            (tmp_path / "daemon.json").write_text(
                text.replace("https://mirror.example.com", "http://mirror.invalid")
            )
            with run_daemon(
                engine, network, volumes={str(tmp_path): {"bind": "/etc/docker"}}
            ) as daemon:
                show = ["sh", "-c", "cat /sys/class/net/eth0/mtu; ip addr show eth0"]
                run = flow_run(on=daemon.url, image=path, command=show)
            assert run.state.is_successful(), run.state
            assert run.output("INFO").startswith("1400")
            assert "192.168.200." in run.output("INFO")
            assert "mirror.invalid" in proxy.logs().decode()
