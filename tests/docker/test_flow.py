"""The real flow on a real daemon: its state is the container's, and its logs are the output."""

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

from flows.output import as_sent
from flows.tasks import LABEL, LOG_BYTES
from scripts.registry import push as push_to_mirror
from tests.support.containers import (
    PREFECT_IMAGE,
    import_busybox,
    run_shell,
    running_container,
)
from tests.support.daemons import Daemon, daemon_with_mirror
from tests.support.local_runs import Outcome, RunFlow, WhenLogged
from tests.support.registries import (
    INNER_REGISTRY,
    INNER_STORE,
    login,
    private_registry,
    push_to_inner_registry,
)

SAVE = ["sh", "-c", "trap 'echo saving; exit' TERM; echo up; while :; do sleep 0.1; done"]
UNREADABLE = {"log_config": {"type": "none"}}


def touch_seen(daemon: docker.DockerClient) -> None:
    """Touch a file in the run's container, which waits for it."""
    [running] = daemon.containers.list(filters={"label": LABEL})
    running.exec_run(["touch", "/seen"])


def remove_image(daemon: docker.DockerClient, name: str) -> None:
    with suppress(docker.errors.ImageNotFound):
        daemon.images.remove(name)


# A run that succeeds


def test_output_goes_to_the_logs_by_stream(flow_run: RunFlow) -> None:
    run = flow_run(command=["sh", "-c", "echo one; echo two >&2"])
    assert run.state.is_successful()
    assert run.output("INFO") == "one"
    assert run.output("WARNING") == "two"
    assert run.tasks["WaitOnContainer"].result["StatusCode"] == 0
    assert sorted(run.tasks["GetContainerLogs"].result.splitlines()) == ["one", "two"]


def test_the_pulled_image_is_named(flow_run: RunFlow, image: str) -> None:
    run = flow_run(command="true")
    [pulled] = run.naming("Downloaded newer image") + run.naming("Image is up to date")
    assert image in pulled


def test_values_of_the_environment_are_as_json_writes_them(flow_run: RunFlow) -> None:
    environment = {"A": True, "B": 1.5, "C": "x=y", "D": "", "PATH": "/bin"}
    run = flow_run(command=["sh", "-c", "echo $A $B $C ${D-unset}."], environment=environment)
    assert run.output("INFO") == "true 1.5 x=y ."


def test_output_reaches_the_logs_while_the_container_runs(
    flow_run: RunFlow, daemon: docker.DockerClient, when_logged: WhenLogged
) -> None:
    when_logged("^first$", lambda: touch_seen(daemon))
    script = "echo first; until [ -e /seen ]; do sleep 0.1; done; echo last"
    run = flow_run(command=["sh", "-c", script])
    assert run.state.is_successful()
    assert run.output("INFO") == "first\nlast"


def test_dockers_other_options_take_effect(flow_run: RunFlow) -> None:
    options = {
        "entrypoint": ["sh", "-c", 'echo "$0 $1 $(id -u) $(hostname) $(pwd)"'],
        "labels": ["ours"],
        "user": "1234",
        "hostname": "somewhere",
        "working_dir": "/tmp",
    }
    run = flow_run(command=["one", "two"], extra_docker_kwargs=options)
    assert run.state.is_successful(), run.state.message
    assert run.output("INFO") == "one two 1234 somewhere /tmp"


@pytest.mark.parametrize("read_only", ["read_only", "ReadOnly"])
def test_a_folder_that_is_asked_for_read_only_is_read_only(
    flow_run: RunFlow, read_only: str
) -> None:
    """Docker ignores read_only, which its API calls ReadOnly."""
    mount = {"type": "bind", "source": "/tmp", "target": "/shared", read_only: True}
    run = flow_run(command="touch /shared/file", host_config={"mounts": [mount]})
    assert run.state.is_failed()
    assert "Read-only file system" in run.output("WARNING")


def test_image_by_digest(flow_run: RunFlow, daemon: docker.DockerClient, image: str) -> None:
    digest = daemon.images.get_registry_data(image).id
    run = flow_run(image=f"{INNER_REGISTRY}/tests/busybox@{digest}", command="echo by digest")
    assert run.state.is_successful(), run.state
    assert run.output("INFO") == "by digest"


def test_a_container_that_goes_while_make_run_looks(
    flow_run: RunFlow, sidecar: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_containers = sidecar.client.api.containers

    def list_one_that_is_gone(**options: Any) -> list[dict[str, Any]]:
        return [*list_containers(**options), {"Id": "0" * 64}]

    with monkeypatch.context() as patched:
        patched.setattr(sidecar.client.api, "containers", list_one_that_is_gone)
        run = flow_run(command="true")
    assert run.state.is_successful()


# A run that fails


def assert_failed_once(run: Outcome, cause: str) -> None:
    """The run has failed, and its logs name the cause once."""
    assert run.state.is_failed()
    assert re.search(cause, run.state.message), run.state.message
    assert len(run.naming("Exited with code")) == 1


def test_the_exit_code_is_the_cause(flow_run: RunFlow) -> None:
    run = flow_run(command="sh -c 'echo boom >&2; exit 3'")
    assert_failed_once(run, "Exited with code 3")
    assert run.tasks["GetContainerLogs"].result == "boom\n"


def test_the_memory_limit_is_the_cause(flow_run: RunFlow) -> None:
    eat = "sh -c 'x=eight888; while :; do x=$x$x; done'"
    run = flow_run(command=eat, host_config={"mem_limit": "16m"})
    assert_failed_once(run, r"^Exited with code 137 \(OOMKilled\): .* exceeded its memory limit$")


def test_a_restart_policy_is_refused(flow_run: RunFlow) -> None:
    policy = {"restart_policy": {"Name": "on-failure"}}
    run = flow_run(command="sh -c 'exit 3'", host_config=policy)
    assert run.state.is_failed()
    assert "restart_policy" in run.state.message
    assert not run.naming("Exited with code")


def test_a_command_that_is_not_in_the_image_is_the_cause(flow_run: RunFlow) -> None:
    run = flow_run(command="no-such-command --option")
    assert run.state.is_failed()
    assert re.search("^Starting the container: .*no-such-command.*not found", run.state.message)
    assert not run.naming("Exited with code")


def test_a_container_that_would_remove_itself_stays_until_its_logs_are_read(
    flow_run: RunFlow,
) -> None:
    run = flow_run(command=["sh", "-c", "echo out; exit 3"], host_config={"auto_remove": True})
    assert "Exited with code 3" in run.state.message
    assert run.tasks["GetContainerLogs"].result == "out\n"
    assert run.naming("auto_remove is left out")


def test_a_daemon_that_dies_during_the_wait_is_named(
    flow_run: RunFlow, engine: docker.DockerClient, when_logged: WhenLogged
) -> None:
    with daemon_with_mirror(engine) as mortal:
        image = push_to_mirror(engine, import_busybox(engine), "tests/mortal:1")
        when_logged("^up$", mortal.container.kill)
        run = flow_run(on=mortal.url, image=image, command=["sh", "-c", "echo up; sleep 300"])
    assert run.state.is_failed()
    assert f"the Docker daemon at {mortal.url} does not answer" in run.state.message
    assert run.tasks["GetContainerLogs"].is_skipped()


# Pulls


@pytest.mark.parametrize(
    "name", ["docker-sidecar-tests/only-here:1", "localhost:5099/only-here:1"], ids=["Hub", "down"]
)
def test_an_image_that_only_the_daemon_has_is_used_with_a_warning(
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
    [warning] = run.warnings()
    assert warning.startswith(f"Pulling {name}: ")
    assert "the image on the daemon is used" in warning
    assert not run.naming("; retry ")


@pytest.mark.parametrize(
    "name", ["nothing-of-this-name:1", "tests/busybox:none", f"tests/busybox@sha256:{'0' * 64}"]
)
def test_an_image_that_is_not_found_fails_without_a_retry(flow_run: RunFlow, name: str) -> None:
    run = flow_run(image=f"{INNER_REGISTRY}/{name}", command="true")
    assert run.state.is_failed()
    assert f"Pulling {INNER_REGISTRY}/{name}: " in run.state.message
    assert "not found" in run.state.message
    assert len(run.naming("not found")) == 1
    assert run.tasks["GetContainerLogs"].message == "No container was created, so there are no logs"


def test_a_registry_that_is_down_for_a_moment_is_asked_again(
    flow_run: RunFlow,
    registry: Container,
    daemon: docker.DockerClient,
    image: str,
    when_logged: WhenLogged,
) -> None:
    remove_image(daemon, image)
    registry.stop(timeout=0)
    when_logged("connection refused.*; retry 1 of 3 in 1 s", registry.start)
    run = flow_run(command="echo pulled")
    assert run.state.is_successful(), run.state
    assert run.output("INFO") == "pulled"


# Docker asks by TLS first, and goes on without if the answer is HTTP.
ANSWER_ANYTHING = r"""
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def handle(self):
        if self.rfile.peek(1)[:1] == b"\x16":
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
    command = ["python", "-uc", ANSWER_ANYTHING, str(status), str(seconds)]
    ports = {"5000/tcp": ("127.0.0.1", 5057)}
    return running_container(daemon, PREFECT_IMAGE, command, ports=ports)


@pytest.mark.parametrize(
    ("status", "name"), [(429, "access-denied-report:1"), (503, "not-found:unauthorized")]
)
def test_an_overloaded_registry_is_asked_three_more_times(
    flow_run: RunFlow, daemon: docker.DockerClient, status: int, name: str
) -> None:
    with odd_registry(daemon, status) as server:
        run = flow_run(image=f"localhost:5057/{name}", command="true")
        requests = server.logs().decode()
    assert f'" {status} -' in requests
    assert run.state.is_failed()
    assert len(run.naming(f"Pulling localhost:5057/{name}: ")) == 4
    assert "docker login" not in run.state.message


def test_a_registry_that_does_not_answer_is_given_up(
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


def remove_layers(registry: Container, repository: str) -> None:
    """Let a registry lose the layers of a repository, but not its manifests."""
    run_shell(
        registry,
        f"""
        cd /var/lib/registry/docker/registry/v2
        for layer in repositories/{repository}/_layers/sha256/*; do
            find blobs/sha256/*/${{layer##*/}} -size +99k -exec rm {{}} +
        done
        """,
    )
    registry.restart(timeout=0)  # it remembers which blobs there are


def test_an_error_in_the_stream_of_a_pull_fails_without_a_retry(
    flow_run: RunFlow, registry: Container, daemon: docker.DockerClient
) -> None:
    """Docker answers 200, and then finds a layer missing in the registry."""
    saved = b"".join(daemon.images.get(import_busybox(daemon)).save())
    daemon.api.import_image_from_data(saved, "docker-sidecar-tests", "broken")
    reference = push_to_inner_registry(daemon, "docker-sidecar-tests:broken", "tests/broken:1")
    daemon.images.remove("docker-sidecar-tests:broken")
    remove_layers(registry, "tests/broken")
    run = flow_run(image=reference, command="true")
    assert run.state.is_failed()
    assert f"Pulling {reference}: " in run.state.message
    assert not run.naming("; retry ")


@pytest.mark.usefixtures("current_docker")
def test_an_image_that_is_too_big_for_the_disk_fails_without_a_retry(
    flow_run: RunFlow, engine: docker.DockerClient
) -> None:
    with daemon_with_mirror(engine, tmpfs={"/var/lib/docker": "size=48m"}) as small:
        run = flow_run(on=small.url, image=PREFECT_IMAGE, command="true")
    assert run.state.is_failed()
    assert "no space left on device" in run.state.message
    assert not run.naming("retry")


# Logins


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
    [warning] = run.warnings()
    assert fault in warning
    assert str(tmp_path) in warning


@pytest.fixture(scope="module")
def private_name(daemon: docker.DockerClient, image: str) -> Iterator[str]:
    """The name of the small image in a registry that asks for a password."""
    ports = {"5000/tcp": ("127.0.0.1", 5056)}
    with private_registry(daemon, ports=ports, volumes=INNER_STORE):
        yield "localhost:5056/tests/busybox:1"


@pytest.fixture
def pull_with_login(
    flow_run: RunFlow,
    daemon: docker.DockerClient,
    private_name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> RunFlow:
    """Run the image of the private registry with an entry of Docker's config.json."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))

    def pull_with_login(entry: dict[str, str] | None) -> Outcome:
        logins = {"localhost:5056": entry} if entry else {}
        (tmp_path / "config.json").write_text(json.dumps({"auths": logins}))
        remove_image(daemon, private_name)
        return flow_run(image=private_name, command="true")

    return pull_with_login


@pytest.mark.parametrize(
    ("entry", "advice"),
    [(None, "`docker login`"), (login("wrong"), "fresh token")],
    ids=["none", "wrong password"],
)
def test_a_login_that_the_registry_refuses_comes_with_advice(
    pull_with_login: RunFlow, entry: dict[str, str] | None, advice: str
) -> None:
    run = pull_with_login(entry)
    assert run.state.is_failed(), run.state
    assert advice in run.state.message
    assert not run.naming("; retry ")


@pytest.mark.parametrize(
    "entry",
    [
        login(),
        {"username": "user", "password": "password"},
        {"auth": login()["auth"].rstrip("=")},
    ],
    ids=["auth", "plain", "auth without padding"],
)
def test_a_login_that_the_registry_accepts(pull_with_login: RunFlow, entry: dict[str, str]) -> None:
    run = pull_with_login(entry)
    assert run.state.is_successful(), run.state


# Output


def test_much_output_keeps_its_end_and_takes_bounded_memory(flow_run: RunFlow) -> None:
    script = "yes $(printf %01023d 7) | head -n 262144; echo the end"
    tracemalloc.start()
    try:
        run = flow_run(command=["sh", "-c", script])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert run.state.is_successful()
    output = run.output("INFO")
    kept_by_this_test = len(output)
    assert most - kept_by_this_test < 64 << 20
    assert "lines dropped here" in output
    assert output.endswith("the end")
    assert len(output) < 32 << 20
    logs = run.tasks["GetContainerLogs"].result
    assert logs.startswith("[cut: ")
    assert logs.endswith("the end\n")
    assert LOG_BYTES - 5_000 < as_sent(logs) < LOG_BYTES + 100


@pytest.mark.parametrize("count", [10_000, 10_001, 50_000])
def test_logged_output_is_whole_and_its_last_10000_lines_are_returned(
    flow_run: RunFlow, count: int
) -> None:
    lines = [str(number) for number in range(1, count + 1)]
    run = flow_run(command=f"seq {count}")
    assert run.output("INFO").split("\n") == lines
    returned = run.tasks["GetContainerLogs"].result.splitlines()
    if count > 10_000:
        assert returned.pop(0).startswith("[cut: ")
    assert returned == lines[-10_000:]


def test_a_line_that_docker_breaks_counts_as_many(
    flow_run: RunFlow, daemon: docker.DockerClient
) -> None:
    run = flow_run(command=["sh", "-c", "head -c 600000 /dev/zero | tr '\\0' x; echo; seq 9990"])
    note, *lines = run.tasks["GetContainerLogs"].result.splitlines()
    assert note.startswith("[cut: ")
    assert lines[-1] == "9990"
    joins_the_next_line = docker.utils.version_lt(daemon.version()["ApiVersion"], "1.42")
    assert len(lines) == (9989 if joins_the_next_line else 9990)


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
def test_unusual_output(flow_run: RunFlow, command: str, logged: str, returned: str) -> None:
    run = flow_run(command=["sh", "-c", command])
    assert run.state.is_successful()
    assert run.output("INFO") == logged
    assert run.tasks["GetContainerLogs"].result == returned


def test_a_terminal_has_one_stream(flow_run: RunFlow) -> None:
    script = "test -t 1 && echo a terminal; echo error >&2"
    run = flow_run(command=["sh", "-c", script], extra_docker_kwargs={"tty": True})
    assert run.state.is_successful()
    assert run.output("INFO") == "a terminal\nerror"
    assert run.tasks["GetContainerLogs"].result == "a terminal\r\nerror\r\n"


@pytest.mark.parametrize("tty", [False, True], ids=["pipe", "TTY"])
def test_a_long_line_is_whole(flow_run: RunFlow, tty: bool) -> None:
    write = "i=0; while [ $i -lt 3000 ]; do printf 日本語の行; i=$((i+1)); done"
    script = f"({write}) >/line; cat /line"
    run = flow_run(command=["sh", "-c", script], extra_docker_kwargs={"tty": tty})
    assert run.state.is_successful()
    assert run.output("INFO") == "日本語の行" * 3000
    assert run.tasks["GetContainerLogs"].result == "日本語の行" * 3000


def test_a_log_driver_that_cannot_be_read_is_said_once(flow_run: RunFlow) -> None:
    run = flow_run(command="echo unheard", host_config=UNREADABLE)
    assert run.state.is_successful(), run.state
    assert run.tasks["GetContainerLogs"].is_skipped()
    assert "does not support reading" in run.tasks["GetContainerLogs"].message
    assert len(run.warnings()) == 1


# Progress bars


@pytest.mark.parametrize(
    ("beside", "sign", "shown_as"),
    [("", "%%", "%"), ("echo $i;", "%%", "%"), ("", "%%\\0", "%\ufffd")],
    ids=["alone", "beside lines on stdout", "NUL"],
)
def test_the_newest_state_of_a_progress_bar_is_logged(
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
    monkeypatch.setattr("flows.watch.FLUSH_SECONDS", 0.2)
    script = """
        printf '\\r1%%' >&2; sleep 2
        echo one; sleep 1
        printf 'no bar'; sleep 2
        echo
        printf '\\r2%%\\n' >&2
    """
    run = flow_run(command=["sh", "-c", script])
    assert run.output("INFO") == "one\nno bar"
    assert run.output("WARNING").split("\n")[-1] == "2%"


# Runs that are ended


@pytest.fixture
def sigterm_handler_of_the_flow() -> Iterator[None]:
    """Without the handler of scripts.engine, which ignores all signals after the first."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm_handler_of_the_flow")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_lets_its_container_save(
    flow_run: RunFlow, caplog: pytest.LogCaptureFixture, when_logged: WhenLogged, signum: int
) -> None:
    when_logged("^up$", lambda: os.kill(os.getpid(), signum))
    with pytest.raises(KeyboardInterrupt):
        flow_run(command=SAVE)
    assert "saving" in caplog.messages


def test_output_after_the_time_limit_is_logged(flow_run: RunFlow) -> None:
    run = flow_run(command=SAVE, time_limit=3)
    assert run.state.is_failed()
    assert "Stopped at its time limit of 3 s" in run.state.message
    assert run.output("INFO") == "up\nsaving"


@pytest.mark.parametrize("host_config", [None, UNREADABLE], ids=["output", "no output"])
def test_a_container_that_ignores_sigterm_is_killed_after_the_time_limit(
    flow_run: RunFlow, monkeypatch: pytest.MonkeyPatch, host_config: Any
) -> None:
    """As process 1 does, if it has no handler."""
    monkeypatch.setattr("flows.tasks.STOP_GRACE_SECONDS", 1)
    run = flow_run(command="sleep 300", time_limit=1, host_config=host_config)
    assert run.state.is_failed()
    assert "Stopped at its time limit of 1 s" in run.state.message
    assert run.naming("after 1 s SIGKILL")
