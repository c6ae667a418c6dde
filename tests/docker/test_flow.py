"""The real flow on a real daemon: its state is the container's, and its logs are the container's output."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest
from docker.models.containers import Container

from flows.tasks import LABEL, LOG_BYTES
from tests.conftest import LABELS, PREFECT, busybox, login, private_registry
from tests.docker.conftest import STORE, Outcome, Registry
from tests.support.waiting import wait_for

FlowRun = Callable[..., Outcome]


def test_the_recipes_own_defaults(flow_run: FlowRun) -> None:
    run = flow_run()
    assert run.state.is_successful(), run.state
    assert "Beginning Flow run for 'empty'" in run.output("INFO")
    assert "Flow run SUCCESS" in run.tasks["GetContainerLogs"].result
    assert run.tasks["WaitOnContainer"].result["StatusCode"] == 0


def test_output_goes_to_the_logs_by_stream(flow_run: FlowRun, image: str) -> None:
    run = flow_run(image=image, command=["sh", "-c", "echo one; echo two >&2; echo $WHO"], environment={"WHO": "three"})
    assert run.state.is_successful()
    assert (run.output("INFO"), run.output("WARNING")) == ("one\nthree", "two")
    assert sorted(run.tasks["GetContainerLogs"].result.split()) == ["one", "three", "two"]
    [pulled] = run.naming("Downloaded newer image") + run.naming("Image is up to date")
    assert image in pulled


def test_output_reaches_the_logs_while_the_container_runs(
    flow_run: FlowRun, image: str, daemon: docker.DockerClient, logs: list[tuple[str, str, str]]
) -> None:
    def go_on_when_seen() -> None:
        wait_for(lambda: ("INFO", "prefect.WaitOnContainer", "first") in logs, "the first line is logged", lambda: logs)
        [container] = daemon.containers.list(filters={"label": LABEL})
        container.exec_run(["touch", "/seen"])

    watcher = threading.Thread(target=go_on_when_seen)
    watcher.start()
    run = flow_run(image=image, command=["sh", "-c", "echo first; until [ -e /seen ]; do sleep 0.1; done; echo last"])
    watcher.join()
    assert run.state.is_successful()
    assert run.output("INFO") == "first\nlast"


def test_exit_code(flow_run: FlowRun, image: str) -> None:
    run = flow_run(image=image, command='sh -c "echo boom >&2; exit 3"')
    assert run.state.is_failed()
    assert f"(image {image}) exited with code 3" in run.state.message
    assert "OOM" not in run.state.message
    assert run.output("WARNING") == "boom"
    assert len(run.naming("exited with code")) == 1, "the cause is named once"
    assert run.tasks["GetContainerLogs"].is_successful()


def test_killed_for_memory(flow_run: FlowRun, image: str) -> None:
    grow = ["sh", "-c", "x=eight888; while :; do x=$x$x; done"]
    run = flow_run(image=image, command=grow, host_config={"mem_limit": "16m"})
    assert run.state.is_failed()
    assert "exited with code 137, killed because it exceeded its memory limit (OOMKilled)" in run.state.message


def test_restart_policy(flow_run: FlowRun, image: str) -> None:
    policy = {"restart_policy": {"Name": "on-failure"}}
    run = flow_run(image=image, command="sh -c 'exit 3'", host_config=policy)
    assert run.state.is_failed()
    assert "restart policy 'on-failure'" in run.state.message
    assert not run.naming("exited with code")


@pytest.mark.parametrize(
    "name", ["docker-sidecar-tests/only-here:1", "localhost:5099/only-here:1"], ids=["Hub", "down"]
)
def test_an_image_that_only_the_daemon_has(
    flow_run: FlowRun, daemon: docker.DockerClient, image: str, name: str
) -> None:
    daemon.images.pull(image)
    daemon.images.get(image).tag(name)
    try:
        run = flow_run(image=name, command="echo here")
    finally:
        daemon.images.remove(name)
    assert run.state.is_successful(), run.state
    assert run.output("INFO") == "here"
    [warned] = [text for level, _, text in run.logs if level == "WARNING"]
    assert warned.startswith(f"Pulling {name}: ")
    assert "the image that the daemon has" in warned
    assert not run.naming("; retry ")


@pytest.mark.parametrize("name", ["nothing-of-this-name:1", "busybox:none", f"busybox@sha256:{'0' * 64}"])
def test_image_not_found(flow_run: FlowRun, registry: Registry, name: str) -> None:
    run = flow_run(image=f"{registry.address}/{name}", command="true")
    assert run.state.is_failed()
    assert f"Pulling {registry.address}/{name}: " in run.state.message
    assert "not found" in run.state.message
    assert len(run.naming("not found")) == 1, "one error, and no retry"
    assert run.tasks["GetContainerLogs"].is_skipped()
    assert run.tasks["GetContainerLogs"].message == "No container was created, so there are no logs"


def test_registry_down_then_up_again(
    flow_run: FlowRun, registry: Registry, daemon: docker.DockerClient, image: str
) -> None:
    with suppress(docker.errors.ImageNotFound):
        daemon.images.remove(image)
    registry.container.stop(timeout=0)
    start = threading.Timer(1.5, registry.container.start)
    start.start()
    try:
        run = flow_run(image=image, command="echo pulled")
    finally:
        start.join()
    assert run.state.is_successful(), run.state
    assert run.naming("retry 1 of 3 in 1 s")
    assert run.output("INFO") == "pulled"


def test_registry_down_for_good(flow_run: FlowRun) -> None:
    run = flow_run(image="localhost:5099/busybox:1", command="true")
    assert run.state.is_failed()
    assert "connection refused" in run.state.message
    assert len(run.naming("connection refused")) == 4, "the first try and three more, a line each"
    assert len(run.naming("; retry ")) == 3


ANSWER = r"""
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def handle(self):
        if self.rfile.peek(1)[:1] == b"\x16":  # TLS: Docker goes on without if the answer is HTTP
            self.wfile.write(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        else:
            super().handle()
    def do_GET(self):
        time.sleep(float(sys.argv[2]))
        self.send_response(int(sys.argv[1]))
        self.end_headers()
    do_HEAD = do_GET
http.server.ThreadingHTTPServer(("", 5000), Handler).serve_forever()
"""


@pytest.fixture
def odd_registry(daemon: docker.DockerClient) -> Iterator[Callable[..., Container]]:
    """A registry that answers any request with a status, after some seconds."""
    started: list[Container] = []

    def start(status: int, seconds: float = 0) -> Container:
        command = ["python", "-uc", ANSWER, str(status), str(seconds)]
        ports = {"5000/tcp": ("127.0.0.1", 5057)}
        started.append(daemon.containers.run(PREFECT, command, detach=True, labels=LABELS, ports=ports))
        return started[0]

    yield start
    for server in started:
        server.remove(force=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("name", ["busybox:1", "access-denied-report:1", "not-found:unauthorized"])
def test_registry_overloaded(flow_run: FlowRun, odd_registry: Callable[..., Container], status: int, name: str) -> None:
    server = odd_registry(status)
    run = flow_run(image=f"localhost:5057/{name}", command="true")
    assert run.state.is_failed()
    assert len(run.naming(f"Pulling localhost:5057/{name}: ")) == 4, "the first try and three more"
    assert "docker login" not in run.state.message
    assert f'" {status} -' in server.logs().decode(), "the registry was asked"


def test_registry_that_does_not_answer(
    flow_run: FlowRun, odd_registry: Callable[..., Container], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.tasks.PROGRESS_SECONDS", 0.5)
    monkeypatch.setattr("flows.tasks.PULL_SILENCE_SECONDS", 3)
    odd_registry(200, seconds=300)
    run = flow_run(image="localhost:5057/busybox:1", command="true", time_limit=1)
    assert run.state.is_failed()
    assert "nothing came for 3 s" in run.state.message
    assert len(run.naming("nothing came for")) >= 4
    assert run.tasks["PullImage"].is_failed()


def test_blob_missing_in_the_registry(flow_run: FlowRun, registry: Registry, daemon: docker.DockerClient) -> None:
    saved = b"".join(daemon.images.get(busybox(daemon)).save())
    daemon.api.import_image_from_data(saved, "docker-sidecar-tests", "broken")
    reference = registry.push("docker-sidecar-tests:broken", "broken:1")
    daemon.images.remove("docker-sidecar-tests:broken")
    layer = registry.sh(
        "cd /var/lib/registry/docker/registry/v2; m=$(cat repositories/broken/_manifests/tags/1/current/link);"
        'grep -o \'"digest": *"sha256:[0-9a-f]*"\' blobs/sha256/$(echo ${m#*:} | cut -c1-2)/${m#*:}/data'
    ).split(":")[-1]
    digest = layer.strip().strip('"')
    registry.sh(f"rm -r /var/lib/registry/docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}")
    registry.container.restart(timeout=0)  # it remembers which blobs there are
    run = flow_run(image=reference, command="true")
    assert run.state.is_failed(), "HTTP 200, and the error in the stream"
    assert f"Pulling {reference}: " in run.state.message
    assert not run.naming("; retry "), "a permanent error"


def test_command_not_found_in_the_image(flow_run: FlowRun, image: str) -> None:
    run = flow_run(image=image, command="no-such-command --option")
    assert run.state.is_failed()
    assert "Starting the container: " in run.state.message
    assert "no-such-command" in run.state.message
    assert "not found" in run.state.message
    assert run.tasks["GetContainerLogs"].result == ""


def test_much_output(flow_run: FlowRun, image: str) -> None:
    process = psutil.Process()
    before, most = process.memory_info().rss, 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.05):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        lines = "yes $(printf %01023d 7) | head -n 262144; echo the end"
        run = flow_run(image=image, command=["sh", "-c", lines])
    finally:
        done.set()
        watcher.join()
    assert run.state.is_successful()
    grown = most - before - len(run.output("INFO"))  # which this test keeps itself
    assert grown < 64 << 20, f"grew by {grown >> 20} MiB"
    assert "lines dropped here" in run.output("INFO")
    assert run.output("INFO").endswith("the end")
    assert len(run.output("INFO")) < 32 << 20
    logs = run.tasks["GetContainerLogs"].result
    assert logs.startswith("[cut: ")
    assert logs.endswith("the end\n")
    assert LOG_BYTES - 2048 < len(logs) < LOG_BYTES + 100


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("seq 10000", [str(number) for number in range(1, 10_001)]),
        ("seq 50000", [str(number) for number in range(1, 50_001)]),
        ("i=0; while [ $i -lt 2000 ]; do printf %080d\\\\n $i; i=$((i+1)); done", [f"{i:080}" for i in range(2000)]),
    ],
    ids=["10,000 lines", "50,000 lines", "long lines"],
)
def test_what_the_runs_logs_can_take_is_whole(flow_run: FlowRun, image: str, command: str, lines: list[str]) -> None:
    run = flow_run(image=image, command=["sh", "-c", command])
    assert run.output("INFO").split("\n") == lines


@pytest.mark.parametrize(
    ("command", "kept", "cut"),
    [
        ("seq 2000", 2000, False),
        ("seq 10000", 10_000, False),
        ("seq 10001", 10_000, True),
        ("head -c 600000 /dev/zero | tr '\\0' x; echo; seq 9990", 9990, True),
    ],
    ids=["2000 lines", "10,000 lines", "a line more", "and a line that Docker breaks"],
)
def test_the_end_of_the_output(
    flow_run: FlowRun, image: str, daemon: docker.DockerClient, command: str, kept: int, cut: bool
) -> None:
    run = flow_run(image=image, command=["sh", "-c", command])
    lines = run.tasks["GetContainerLogs"].result.splitlines()
    assert lines[0].startswith("[cut: ") == cut
    # Docker 20.10 joins a line that it breaks and the next one
    joined = "tr" in command and docker.utils.version_lt(daemon.version()["ApiVersion"], "1.42")
    assert (len(lines) - cut, lines[-1]) == (kept - joined, command.split()[-1])


@pytest.mark.parametrize(
    ("command", "logged", "returned"),
    [
        ("printf 'caf\\351 \\377'", "caf\ufffd \ufffd", "caf\ufffd \ufffd"),
        ("printf 'no newline'", "no newline", "no newline"),
        ("printf 'a\\0b\\n'", "a\ufffdb", "a\0b\n"),
        ("true", "", ""),
    ],
    ids=["not UTF-8", "no newline", "NUL", "never writes"],
)
def test_unusual_output(flow_run: FlowRun, image: str, command: str, logged: str, returned: str) -> None:
    run = flow_run(image=image, command=["sh", "-c", command])
    assert run.state.is_successful()
    assert run.output("INFO") == logged
    assert run.tasks["GetContainerLogs"].result == returned


def test_tty(flow_run: FlowRun, image: str) -> None:
    run = flow_run(
        image=image, command="sh -c 'test -t 1 && echo a terminal; echo error >&2'", extra_docker_kwargs={"tty": True}
    )
    assert run.state.is_successful()
    assert run.output("INFO") == "a terminal\nerror"
    assert run.tasks["GetContainerLogs"].result == "a terminal\r\nerror\r\n"


UNREADABLE = {"log_config": {"type": "none"}}


def test_log_driver_that_cannot_be_read(flow_run: FlowRun, image: str) -> None:
    run = flow_run(image=image, command="echo unheard", host_config=UNREADABLE)
    assert run.state.is_successful(), run.state
    assert run.tasks["GetContainerLogs"].is_skipped()
    assert "does not support reading" in run.tasks["GetContainerLogs"].message
    assert len([level for level, _, _ in run.logs if level == "WARNING"]) == 1


def test_time_limit_of_a_container_whose_output_cannot_be_read(
    flow_run: FlowRun, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.tasks.STOP_GRACE_SECONDS", 1)
    run = flow_run(image=image, command="sleep 300", time_limit=1, host_config=UNREADABLE)
    assert "was stopped at its time limit of 1 s" in run.tasks["WaitOnContainer"].message


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    """The flow's own handler counts, and not the one of scripts.engine, which ignores all after the first."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def send_when_running(signum: int, daemon: docker.DockerClient, logs: list[tuple[str, str, str]]) -> threading.Thread:
    def send() -> None:
        wait_for(lambda: any(text == "up" for _, _, text in logs), "the container runs", lambda: logs)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_interrupted(
    flow_run: FlowRun,
    image: str,
    daemon: docker.DockerClient,
    logs: list[tuple[str, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C, and Prefect's own cancellation, which sends the same signal."""
    ended: list[dict[str, Any]] = []
    remove = docker.models.containers.Container.remove

    def look_and_remove(container: docker.models.containers.Container, **options: Any) -> None:
        container.reload()
        ended.append(container.attrs["State"])
        remove(container, **options)

    monkeypatch.setattr(docker.models.containers.Container, "remove", look_and_remove)
    sender = send_when_running(signal.SIGINT, daemon, logs)
    with pytest.raises(KeyboardInterrupt):
        flow_run(image=image, command=["sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.1; done"])
    sender.join()
    assert [state["ExitCode"] for state in ended] == [7], "it got SIGTERM, and time to act on it"


def test_terminated(
    flow_run: FlowRun,
    image: str,
    daemon: docker.DockerClient,
    logs: list[tuple[str, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On this machine SIGTERM is like Ctrl-C; in a pod the run is Failed, see tests/unit/test_states.py."""
    monkeypatch.setattr("flows.tasks.STOP_GRACE_SECONDS", 1)
    sender = send_when_running(signal.SIGTERM, daemon, logs)
    with pytest.raises(KeyboardInterrupt):
        flow_run(image=image, command=["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"])
    sender.join()
    assert any("after 1 s SIGKILL" in text for _, _, text in logs)


def test_time_limit(flow_run: FlowRun, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.tasks.STOP_GRACE_SECONDS", 1)
    run = flow_run(image=image, command="sleep 300", time_limit=1)
    assert run.state.is_failed()
    assert "was stopped at its time limit of 1 s" in run.state.message
    run = flow_run(image=image, command="sleep 0", time_limit=60)
    assert run.state.is_successful()


SAVE = ["sh", "-c", "trap 'echo saving; exit' TERM; echo up; while :; do sleep 0.1; done"]


def test_output_after_the_time_limit(flow_run: FlowRun, image: str) -> None:
    run = flow_run(image=image, command=SAVE, time_limit=3)
    assert run.state.is_failed()
    assert run.output("INFO") == "up\nsaving"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["cancelled", "SIGTERM"])
def test_output_after_an_interruption(
    flow_run: FlowRun, image: str, daemon: docker.DockerClient, logs: list[tuple[str, str, str]], signum: int
) -> None:
    sender = send_when_running(signum, daemon, logs)
    with suppress(KeyboardInterrupt):
        flow_run(image=image, command=SAVE)
    sender.join()
    assert "saving" in [text for _, _, text in logs]


@pytest.mark.parametrize("beside", ["", "echo $i;"], ids=["alone", "beside lines on stdout"])
def test_the_newest_state_of_a_progress_bar(
    flow_run: FlowRun, image: str, daemon: docker.DockerClient, logs: list[tuple[str, str, str]], beside: str
) -> None:
    """The bar goes on until one of its states is in the logs."""

    def go_on_when_seen() -> None:
        wait_for(lambda: any(text.endswith("%") for _, _, text in logs), "a state is logged", lambda: logs, timeout=10)
        [container] = daemon.containers.list(filters={"label": LABEL})
        container.exec_run(["touch", "/seen"])

    watcher = threading.Thread(target=go_on_when_seen)
    watcher.start()
    step = f"{beside} printf '\\r%s%%' $i >&2; sleep 0.1; i=$((i+1))"
    bar = f"i=0; until [ -e /seen ]; do {step}; done; printf '\\r100%%\\n' >&2"
    run = flow_run(image=image, command=["sh", "-c", bar], time_limit=60)
    watcher.join()
    shown = run.output("WARNING").split("\n")
    assert shown[-1] == "100%"
    assert 2 <= len(shown) <= 5, "old states are left out"


def test_a_line_beside_a_progress_bar_comes_once(
    flow_run: FlowRun, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.output.FLUSH_SECONDS", 0.2)
    script = "printf '\\r1%%' >&2; sleep 2; echo one; sleep 1; printf 'no bar'; sleep 2; echo; printf '\\r2%%\\n' >&2"
    run = flow_run(image=image, command=["sh", "-c", script])
    assert run.output("INFO") == "one\nno bar"
    assert run.output("WARNING").split("\n")[-1] == "2%"


def test_a_progress_bar_with_nul(flow_run: FlowRun, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.output.FLUSH_SECONDS", 0.2)
    bar = "for i in 1 2 3 4 5 6 7 8; do printf '\\r%s%%\\0' $i >&2; sleep 0.5; done; printf '\\r\\0end\\n' >&2"
    run = flow_run(image=image, command=["sh", "-c", bar])
    shown = run.output("WARNING").split("\n")
    assert any(text.endswith("%\ufffd") for text in shown[:-1])
    assert shown[-1] == "\ufffdend"
    assert not run.naming("\0")


@pytest.mark.parametrize("script", ["sleep 2; exit 0", "exit 0", "echo out; exit 3", "sleep 2; exit 3"])
def test_a_container_that_removes_itself(
    flow_run: FlowRun, image: str, daemon: docker.DockerClient, script: str
) -> None:
    code = script[-1]
    run = flow_run(image=image, command=["sh", "-c", script], host_config={"auto_remove": True})
    assert run.state.is_successful() == (code == "0"), run.state
    assert run.tasks["GetContainerLogs"].is_skipped()
    assert run.naming(f"exited with code {code}")
    wait_for(lambda: not daemon.containers.list(all=True, filters={"label": LABEL}), "it is gone")


@pytest.mark.parametrize("tty", [False, True])
def test_a_long_line_is_whole(flow_run: FlowRun, image: str, tty: bool) -> None:
    script = "i=0; while [ $i -lt 3000 ]; do printf %s $TEXT; i=$((i+1)); done"
    run = flow_run(
        image=image,
        command=["sh", "-c", f"({script}) >/line; cat /line"],
        environment={"TEXT": "日本語の行"},
        extra_docker_kwargs={"tty": tty},
    )
    assert run.output("INFO") == "日本語の行" * 3000
    assert run.tasks["GetContainerLogs"].result == "日本語の行" * 3000


def test_the_environment_as_json_writes_it(flow_run: FlowRun, image: str) -> None:
    environment = {"A": True, "B": 1.5, "C": "x=y", "D": "", "PATH": "/bin"}
    run = flow_run(image=image, command=["sh", "-c", "echo $A $B $C ${D-unset}."], environment=environment)
    assert run.output("INFO") == "true 1.5 x=y ."


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"credsStore": "no-such-helper"}, "docker-credential-no-such-helper"),
        ("not JSON", "no valid Docker configuration"),
        ({"auths": {"other.example": {"auth": "?"}}}, "'other.example'"),
    ],
)
def test_a_public_image_needs_no_login(
    flow_run: FlowRun, image: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Any, fault: str
) -> None:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    run = flow_run(image=image, command="true")
    assert run.state.is_successful(), run.state
    [warned] = [text for level, _, text in run.logs if level == "WARNING"]
    assert fault in warned
    assert str(tmp_path) in warned


def test_image_by_digest(flow_run: FlowRun, registry: Registry, daemon: docker.DockerClient, image: str) -> None:
    digest = daemon.images.get_registry_data(image).id
    run = flow_run(image=f"{registry.address}/busybox@{digest}", command="echo by digest")
    assert run.state.is_successful(), run.state
    assert run.output("INFO") == "by digest"


def test_private_registry(
    flow_run: FlowRun, daemon: docker.DockerClient, image: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with private_registry(daemon, ports={"5000/tcp": ("127.0.0.1", 5056)}, volumes=STORE):
        run = flow_run(image="localhost:5056/busybox:1", command="true")
        assert run.state.is_failed()
        assert "`docker login`" in run.state.message
        assert not run.naming("; retry ")

        for entry in (login(), {"username": "user", "password": "password"}, {"auth": login()["auth"].rstrip("=")}):
            (tmp_path / "config.json").write_text(json.dumps({"auths": {"localhost:5056": entry}}))
            run = flow_run(image="localhost:5056/busybox:1", command="echo let in")
            assert run.state.is_successful(), run.state
            with suppress(docker.errors.ImageNotFound):
                daemon.images.remove("localhost:5056/busybox:1")

        (tmp_path / "config.json").write_text(json.dumps({"auths": {"localhost:5056": login("wrong")}}))
        run = flow_run(image="localhost:5056/busybox:1", command="true")
        assert run.state.is_failed()
        assert "fresh token" in run.state.message
