"""The real flow on a real daemon: its state is the container's, and its logs are the container's output."""

import json
import os
import re
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from flows.tasks import LABEL, LOG_BYTES
from scripts.registry import push as push_to_mirror
from tests.support.containers import (
    PREFECT_IMAGE,
    import_busybox,
    run_shell,
    running_container,
)
from tests.support.daemons import Daemon, daemon_with_mirror
from tests.support.local_runs import RunFlow, WhenLogged
from tests.support.registries import (
    INNER_REGISTRY,
    INNER_STORE,
    login,
    private_registry,
    push_to_inner_registry,
)

SAVE = ["sh", "-c", "trap 'echo saving; exit' TERM; echo up; while :; do sleep 0.1; done"]


def touch_seen(daemon: docker.DockerClient) -> None:
    """Touch a file in the run's container, which waits for it."""
    [running] = daemon.containers.list(filters={"label": LABEL})
    running.exec_run(["touch", "/seen"])


def test_output_goes_to_the_logs_by_stream(flow_run: RunFlow, image: str) -> None:
    """Values of the environment are as JSON writes them."""
    environment = {"A": True, "B": 1.5, "C": "x=y", "D": "", "PATH": "/bin"}
    script = "echo one; echo two >&2; echo $A $B $C ${D-unset}."
    run = flow_run(command=["sh", "-c", script], environment=environment)
    assert run.state.is_successful()
    assert (run.output("INFO"), run.output("WARNING")) == ("one\ntrue 1.5 x=y .", "two")
    assert sorted(run.tasks["GetContainerLogs"].result.splitlines()) == [
        "one",
        "true 1.5 x=y .",
        "two",
    ]
    assert run.tasks["WaitOnContainer"].result["StatusCode"] == 0
    [pulled] = run.naming("Downloaded newer image") + run.naming("Image is up to date")
    assert image in pulled


def test_output_reaches_the_logs_while_the_container_runs(
    flow_run: RunFlow, daemon: docker.DockerClient, when_logged: WhenLogged
) -> None:
    when_logged("^first$", lambda: touch_seen(daemon))
    run = flow_run(
        command=["sh", "-c", "echo first; until [ -e /seen ]; do sleep 0.1; done; echo last"]
    )
    assert run.state.is_successful()
    assert run.output("INFO") == "first\nlast"


def test_dockers_other_options(flow_run: RunFlow) -> None:
    """The command is the entrypoint's arguments."""
    extra = {
        "entrypoint": ["sh", "-c", 'echo "$0 $1 $(id -u) $(hostname) $(pwd)"'],
        "labels": ["ours"],
    }
    extra |= {"user": "1234", "hostname": "somewhere", "working_dir": "/tmp"}
    run = flow_run(command=["one", "two"], extra_docker_kwargs=extra)
    assert run.state.is_successful(), run.state.message
    assert run.output("INFO") == "one two 1234 somewhere /tmp"


@pytest.mark.parametrize(
    ("command", "host_config", "cause"),
    [
        (
            "sh -c 'echo boom >&2; exit 3'",
            None,
            r"^Container \w+ \(image \S+\) exited with code 3$",
        ),
        (
            "sh -c 'x=eight888; while :; do x=$x$x; done'",
            {"mem_limit": "16m"},
            r"exited with code 137,.*\(OOMKilled\)",
        ),
        (
            "sh -c 'exit 3'",
            {"restart_policy": {"Name": "on-failure"}},
            "restart policy 'on-failure'",
        ),
        ("no-such-command --option", None, "^Starting the container: .*no-such-command.*not found"),
    ],
    ids=["exit code", "out of memory", "restart policy", "no such command"],
)
def test_the_cause_of_a_failure(
    flow_run: RunFlow, command: str, host_config: Any, cause: str
) -> None:
    run = flow_run(command=command, host_config=host_config)
    assert run.state.is_failed()
    assert re.search(cause, run.state.message)
    assert len(run.naming("exited with code")) == cause.count("exited with code"), (
        "the cause is named once"
    )
    logs = run.tasks["GetContainerLogs"]
    assert logs.is_skipped() or logs.result == ("boom\n" if "boom" in command else "")


@pytest.mark.parametrize(
    "name", ["docker-sidecar-tests/only-here:1", "localhost:5099/only-here:1"], ids=["Hub", "down"]
)
def test_an_image_that_only_the_daemon_has(
    flow_run: RunFlow, daemon: docker.DockerClient, image: str, name: str
) -> None:
    daemon.images.pull(image)
    daemon.images.get(image).tag(name)
    try:
        run = flow_run(image=name, command="echo here")
    finally:
        daemon.images.remove(name)
    assert run.state.is_successful(), run.state
    assert run.output("INFO") == "here"
    [warned] = run.warnings()
    assert warned.startswith(f"Pulling {name}: ")
    assert "the image on the daemon is used" in warned
    assert not run.naming("; retry ")


@pytest.mark.parametrize(
    "name", ["nothing-of-this-name:1", "tests/busybox:none", f"tests/busybox@sha256:{'0' * 64}"]
)
def test_image_not_found(flow_run: RunFlow, name: str) -> None:
    run = flow_run(image=f"{INNER_REGISTRY}/{name}", command="true")
    assert run.state.is_failed()
    assert f"Pulling {INNER_REGISTRY}/{name}: " in run.state.message
    assert "not found" in run.state.message
    assert len(run.naming("not found")) == 1, "one error, and no retry"
    assert run.tasks["GetContainerLogs"].message == "No container was created, so there are no logs"


def test_registry_down_then_up_again(
    flow_run: RunFlow,
    registry: Container,
    daemon: docker.DockerClient,
    image: str,
    when_logged: WhenLogged,
) -> None:
    with suppress(docker.errors.ImageNotFound):
        daemon.images.remove(image)
    registry.stop(timeout=0)
    when_logged("connection refused.*; retry 1 of 3 in 1 s", registry.start)
    run = flow_run(command="echo pulled")
    assert run.state.is_successful(), run.state
    assert run.output("INFO") == "pulled"


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


def odd_registry(
    daemon: docker.DockerClient, status: int, seconds: float = 0
) -> AbstractContextManager[Container]:
    """A registry at localhost:5057 that answers any request with a status, after some seconds."""
    command = ["python", "-uc", ANSWER, str(status), str(seconds)]
    return running_container(
        daemon, PREFECT_IMAGE, command, ports={"5000/tcp": ("127.0.0.1", 5057)}
    )


@pytest.mark.parametrize(
    ("status", "name"), [(429, "access-denied-report:1"), (503, "not-found:unauthorized")]
)
def test_registry_overloaded(
    flow_run: RunFlow, daemon: docker.DockerClient, status: int, name: str
) -> None:
    with odd_registry(daemon, status) as server:
        run = flow_run(image=f"localhost:5057/{name}", command="true")
        assert f'" {status} -' in server.logs().decode(), "the registry was asked"
    assert run.state.is_failed()
    assert len(run.naming(f"Pulling localhost:5057/{name}: ")) == 4, "the first try and three more"
    assert "docker login" not in run.state.message


def test_registry_that_does_not_answer(
    flow_run: RunFlow, daemon: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.tasks.PROGRESS_SECONDS", 0.5)
    monkeypatch.setattr("flows.tasks.PULL_SILENCE_SECONDS", 3)
    with odd_registry(daemon, 200, seconds=300):
        run = flow_run(image="localhost:5057/busybox:1", command="true", time_limit=1)
    assert run.state.is_failed()
    assert "nothing came for 3 s" in run.state.message
    assert len(run.naming("nothing came for")) >= 4
    assert run.tasks["PullImage"].is_failed()


def test_blob_missing_in_the_registry(
    flow_run: RunFlow, registry: Container, daemon: docker.DockerClient
) -> None:
    saved = b"".join(daemon.images.get(import_busybox(daemon)).save())
    daemon.api.import_image_from_data(saved, "docker-sidecar-tests", "broken")
    reference = push_to_inner_registry(daemon, "docker-sidecar-tests:broken", "tests/broken:1")
    daemon.images.remove("docker-sidecar-tests:broken")
    layers = "for each in repositories/tests/broken/_layers/sha256/*; do find blobs/sha256/*/${each##*/} -size +99k"
    run_shell(registry, f"cd /var/lib/registry/docker/registry/v2; {layers} -exec rm {{}} +; done")
    registry.restart(timeout=0)  # it remembers which blobs there are
    run = flow_run(image=reference, command="true")
    assert run.state.is_failed(), "HTTP 200, and the error in the stream"
    assert f"Pulling {reference}: " in run.state.message
    assert not run.naming("; retry "), "a permanent error"


@pytest.mark.usefixtures("current_docker")
def test_no_disk_space_for_the_image(flow_run: RunFlow, engine: docker.DockerClient) -> None:
    with daemon_with_mirror(engine, tmpfs={"/var/lib/docker": "size=48m"}) as small:
        run = flow_run(on=small.url, image=PREFECT_IMAGE, command="true")
    assert run.state.is_failed()
    assert "no space left on device" in run.state.message
    assert not run.naming("retry")


def test_much_output(flow_run: RunFlow) -> None:
    tracemalloc.start()
    try:
        run = flow_run(
            command=["sh", "-c", "yes $(printf %01023d 7) | head -n 262144; echo the end"]
        )
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert run.state.is_successful()
    output = run.output("INFO")
    assert most - len(output) < 64 << 20, "but for what this test keeps itself"
    assert "lines dropped here" in output
    assert output.endswith("the end")
    assert len(output) < 32 << 20
    logs = run.tasks["GetContainerLogs"].result
    assert logs.startswith("[cut: ")
    assert logs.endswith("the end\n")
    assert LOG_BYTES - 2048 < len(logs) < LOG_BYTES + 100


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("seq 10000", [str(number) for number in range(1, 10_001)]),
        ("seq 10001", [str(number) for number in range(1, 10_002)]),
        ("seq 50000", [str(number) for number in range(1, 50_001)]),
        (
            "i=0; while [ $i -lt 2000 ]; do printf %080d\\\\n $i; i=$((i+1)); done",
            [f"{i:080}" for i in range(2000)],
        ),
    ],
    ids=["10,000 lines", "a line more", "50,000 lines", "long lines"],
)
def test_logged_output_is_whole_and_its_end_is_returned(
    flow_run: RunFlow, command: str, lines: list[str]
) -> None:
    run = flow_run(command=["sh", "-c", command])
    assert run.output("INFO").split("\n") == lines
    returned = run.tasks["GetContainerLogs"].result.splitlines()
    cut = len(lines) > 10_000
    assert returned[0].startswith("[cut: ") == cut
    assert returned[cut:] == lines[-10_000:]


def test_a_line_that_docker_breaks_counts_as_many(
    flow_run: RunFlow, daemon: docker.DockerClient
) -> None:
    run = flow_run(command=["sh", "-c", "head -c 600000 /dev/zero | tr '\\0' x; echo; seq 9990"])
    note, *lines = run.tasks["GetContainerLogs"].result.splitlines()
    assert note.startswith("[cut: ")
    # Docker 20.10 joins a line that it breaks and the next one
    joined = docker.utils.version_lt(daemon.version()["ApiVersion"], "1.42")
    assert (len(lines), lines[-1]) == (9990 - joined, "9990")


LONG_LINE = "(i=0; while [ $i -lt 3000 ]; do printf 日本語の行; i=$((i+1)); done) >/line; cat /line"


@pytest.mark.parametrize(
    ("command", "tty", "logged", "returned"),
    [
        ("printf 'caf\\351 \\377'", False, "caf\ufffd \ufffd", "caf\ufffd \ufffd"),
        ("printf 'no newline'", False, "no newline", "no newline"),
        ("printf 'a\\0b\\n'", False, "a\ufffdb", "a\0b\n"),
        ("true", False, "", ""),
        (
            "test -t 1 && echo a terminal; echo error >&2",
            True,
            "a terminal\nerror",
            "a terminal\r\nerror\r\n",
        ),
        (LONG_LINE, False, "日本語の行" * 3000, "日本語の行" * 3000),
        (LONG_LINE, True, "日本語の行" * 3000, "日本語の行" * 3000),
    ],
    ids=[
        "not UTF-8",
        "no newline",
        "NUL",
        "never writes",
        "TTY",
        "long line",
        "long line on a TTY",
    ],
)
def test_unusual_output(
    flow_run: RunFlow, command: str, tty: bool, logged: str, returned: str
) -> None:
    run = flow_run(command=["sh", "-c", command], extra_docker_kwargs={"tty": tty})
    assert run.state.is_successful()
    assert run.output("INFO") == logged
    assert run.tasks["GetContainerLogs"].result == returned


UNREADABLE = {"log_config": {"type": "none"}}


def test_log_driver_that_cannot_be_read(flow_run: RunFlow) -> None:
    run = flow_run(command="echo unheard", host_config=UNREADABLE)
    assert run.state.is_successful(), run.state
    assert run.tasks["GetContainerLogs"].is_skipped()
    assert "does not support reading" in run.tasks["GetContainerLogs"].message
    assert len(run.warnings()) == 1


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    """The flow's own handler counts, and not the one of scripts.engine, which ignores all after the first."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(
    flow_run: RunFlow, caplog: pytest.LogCaptureFixture, when_logged: WhenLogged, signum: int
) -> None:
    """By Prefect's cancellation or Ctrl-C, or by SIGTERM, which in a pod fails the run: tests/unit/test_states.py."""
    when_logged("^up$", lambda: os.kill(os.getpid(), signum))
    with pytest.raises(KeyboardInterrupt):
        flow_run(command=SAVE)
    assert "saving" in caplog.messages, "the container got SIGTERM, and time to act on it"


def test_output_after_the_time_limit(flow_run: RunFlow) -> None:
    run = flow_run(command=SAVE, time_limit=3)
    assert run.state.is_failed()
    assert "was stopped at its time limit of 3 s" in run.state.message
    assert run.output("INFO") == "up\nsaving"


@pytest.mark.parametrize("host_config", [None, UNREADABLE], ids=["output", "no output"])
def test_time_limit_of_a_container_that_ignores_sigterm(
    flow_run: RunFlow, monkeypatch: pytest.MonkeyPatch, host_config: Any
) -> None:
    """As process 1 does, if it has no handler."""
    monkeypatch.setattr("flows.tasks.STOP_GRACE_SECONDS", 1)
    run = flow_run(command="sleep 300", time_limit=1, host_config=host_config)
    assert run.state.is_failed()
    assert "was stopped at its time limit of 1 s" in run.state.message
    assert run.naming("after 1 s SIGKILL")


@pytest.mark.parametrize(
    ("beside", "sign", "shown_as"),
    [("", "%%", "%"), ("echo $i;", "%%", "%"), ("", "%%\\0", "%\ufffd")],
    ids=["alone", "beside lines on stdout", "NUL"],
)
def test_the_newest_state_of_a_progress_bar(
    flow_run: RunFlow,
    daemon: docker.DockerClient,
    when_logged: WhenLogged,
    beside: str,
    sign: str,
    shown_as: str,
) -> None:
    """The bar goes on until one of its states is in the logs."""
    when_logged(f"{shown_as}$", lambda: touch_seen(daemon))
    step = f"{beside} printf '\\r%s{sign}' $i >&2; sleep 0.1; i=$((i+1))"
    bar = f"i=0; until [ -e /seen ]; do {step}; done; printf '\\r100{sign}\\n' >&2"
    run = flow_run(command=["sh", "-c", bar], time_limit=60)
    assert run.state.is_successful(), "long before the time limit"
    shown = run.output("WARNING").split("\n")
    assert shown[-1] == f"100{shown_as}"
    assert 2 <= len(shown) <= 5, "old states are left out"
    assert not run.naming("\0")


def test_a_line_beside_a_progress_bar_comes_once(
    flow_run: RunFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.output.FLUSH_SECONDS", 0.2)
    script = "printf '\\r1%%' >&2; sleep 2; echo one; sleep 1; printf 'no bar'; sleep 2; echo; printf '\\r2%%\\n' >&2"
    run = flow_run(command=["sh", "-c", script])
    assert run.output("INFO") == "one\nno bar"
    assert run.output("WARNING").split("\n")[-1] == "2%"


def test_a_container_that_would_remove_itself(flow_run: RunFlow) -> None:
    run = flow_run(command=["sh", "-c", "echo out; exit 3"], host_config={"auto_remove": True})
    assert "exited with code 3" in run.state.message
    assert run.tasks["GetContainerLogs"].result == "out\n"
    assert run.naming("auto_remove is left out")


def test_a_container_that_goes_while_make_run_looks(
    flow_run: RunFlow, sidecar: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = sidecar.client.api.containers
    with monkeypatch.context() as patched:
        patched.setattr(
            sidecar.client.api,
            "containers",
            lambda **options: [*listed(**options), {"Id": "0" * 64}],
        )
        assert flow_run(command="true").state.is_successful()


def test_daemon_dies_during_the_wait(
    flow_run: RunFlow, engine: docker.DockerClient, when_logged: WhenLogged
) -> None:
    with daemon_with_mirror(engine) as mortal:
        image = push_to_mirror(engine, import_busybox(engine), "tests/mortal:1")
        when_logged("^up$", mortal.container.kill)
        run = flow_run(on=mortal.url, image=image, command=["sh", "-c", "echo up; sleep 300"])
    assert run.state.is_failed()
    assert f"the Docker daemon at {mortal.url} does not answer" in run.state.message
    assert run.tasks["GetContainerLogs"].is_skipped()


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ('{"credsStore": "no-such-helper"}', "docker-credential-no-such-helper"),
        ("not JSON", "no valid Docker configuration"),
        ('{"auths": {"other.example": {"auth": "?"}}}', "'other.example'"),
    ],
)
def test_a_public_image_needs_no_login(
    flow_run: RunFlow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str, fault: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    run = flow_run(command="true")
    assert run.state.is_successful(), run.state
    [warned] = run.warnings()
    assert fault in warned
    assert str(tmp_path) in warned


def test_image_by_digest(flow_run: RunFlow, daemon: docker.DockerClient, image: str) -> None:
    digest = daemon.images.get_registry_data(image).id
    run = flow_run(image=f"{INNER_REGISTRY}/tests/busybox@{digest}", command="echo by digest")
    assert run.state.is_successful(), run.state
    assert run.output("INFO") == "by digest"


def test_private_registry(
    flow_run: RunFlow, daemon: docker.DockerClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    name, plain = "localhost:5056/tests/busybox:1", {"username": "user", "password": "password"}
    with private_registry(daemon, ports={"5000/tcp": ("127.0.0.1", 5056)}, volumes=INNER_STORE):
        for entry, advice in (
            (None, "`docker login`"),
            (login("wrong"), "fresh token"),
            (login(), None),
            (plain, None),
            ({"auth": login()["auth"].rstrip("=")}, None),
        ):
            (tmp_path / "config.json").write_text(
                json.dumps({"auths": {"localhost:5056": entry} if entry else {}})
            )
            with suppress(docker.errors.ImageNotFound):
                daemon.images.remove(name)
            run = flow_run(image=name, command="true")
            assert run.state.is_failed() == bool(advice), run.state
            assert (advice or "") in run.state.message
            assert not run.naming("; retry ")
