"""The tasks on a fake of the Docker daemon's HTTP: what a real daemon cannot be brought to do, and what needs none."""

from __future__ import annotations

import inspect
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import docker
import pendulum
import prefect
import pytest
import requests
from prefect import Flow
from prefect.engine import signals
from prefect.engine.state import Failed, Retrying
from prefect.tasks import docker as prefect_docker

from flows import tasks
from flows.daemon import connect
from flows.tasks import CreateContainer, GetContainerLogs, PullImage, StartContainer, WaitOnContainer
from tests.support.fake_docker import ID, FakeDocker, frame
from tests.support.waiting import wait_for

NAMES = ("PullImage", "CreateContainer", "StartContainer", "WaitOnContainer", "GetContainerLogs")


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setattr("flows.output.FLUSH_SECONDS", 0.05)
    for name in ("no_proxy", "NO_PROXY"):  # set first, so that monkeypatch restores what connect() sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def fake() -> Iterator[FakeDocker]:
    with FakeDocker() as fake:
        yield fake


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def wait(fake: FakeDocker, **options: Any) -> Any:
    return WaitOnContainer(container_id=ID, docker_server_url=fake.url).run(**options)


# ------------------------------------------------------------------------------------------- connection


@pytest.mark.parametrize("proxy", ["http_proxy", "HTTP_PROXY", "all_proxy"])
@pytest.mark.parametrize("no_proxy", [{}, {"NO_PROXY": ".svc"}, {"no_proxy": ".corp", "NO_PROXY": "127.0.0.1"}])
def test_row_01_a_local_daemon_is_never_asked_through_a_proxy(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, nowhere: int, proxy: str, no_proxy: dict[str, str]
) -> None:
    monkeypatch.delenv("HTTPS_PROXY")
    for name, value in {proxy: f"http://127.0.0.1:{nowhere}", **no_proxy}.items():
        monkeypatch.setenv(name, value)
    connect(fake.url)
    assert fake.asked("GET /version")
    assert all(os.environ[name].startswith(value) for name, value in no_proxy.items())
    assert requests.utils.get_environ_proxies("http://api.prefect.example"), "others are asked through the proxy"


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("tcp://localhost:9", "localhost:9"),
        ("tcp://127.0.0.2:9", "127.0.0.2:9"),
        ("tcp://[::1]:9", "[::1]:9"),
        ("unix:///no/socket", "localhost"),
    ],
)
def test_row_01_all_kinds_of_local_daemons(monkeypatch: pytest.MonkeyPatch, url: str, host: str) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(docker.errors.DockerException):
        connect(url)
    assert requests.utils.get_environ_proxies(f"http://{host}/version") == {}


def test_a_remote_daemon_is_asked_through_the_proxy(fake: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", fake.url.replace("tcp", "http"))
    StartContainer().run(container_id=ID, docker_server_url="tcp://docker.example:2375")
    assert fake.asked("POST /containers/start"), "the fake daemon is the proxy"


def test_tls_of_the_environment_is_for_the_daemon_of_docker_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).touch()
    monkeypatch.setenv("DOCKER_HOST", "tcp://docker.example:2376")
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
    monkeypatch.setattr("docker.APIClient", MagicMock())
    connect("tcp://docker.example:2376")
    connect("tcp://localhost:2375")
    with_tls, without = (call[1] for call in docker.APIClient.call_args_list)  # type: ignore[attr-defined]
    assert with_tls.pop("tls").ca_cert == str(tmp_path / "ca.pem")
    assert with_tls == {"base_url": "tcp://docker.example:2376", "version": "auto"}
    assert without == {"base_url": "tcp://localhost:2375", "version": "auto"}


def test_a_daemon_that_is_starting_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """The daemon listens only after the log line that says that it is waited for."""
    with FakeDocker() as earlier:
        port, url = earlier.server_port, earlier.url

    def start() -> None:
        wait_for(lambda: "Waiting" in caplog.text, "the task waits")
        with FakeDocker(port) as late:
            wait_for(lambda: late.asked("POST /images/create"), "the daemon is asked")
            pulled.wait()

    pulled = threading.Event()
    thread = threading.Thread(target=start)
    thread.start()
    try:
        assert PullImage().run(repository="app:1", docker_server_url=url) == "app:1"
    finally:
        pulled.set()
        thread.join()
    assert len([line for line in lines(caplog) if line.startswith("Waiting up to 60 s for the Docker daemon")]) == 1


def test_a_daemon_that_does_not_come_up_is_one_error(
    monkeypatch: pytest.MonkeyPatch, nowhere: int, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.daemon.DAEMON_SECONDS", 0.5)
    url = f"tcp://127.0.0.1:{nowhere}"
    started = time.monotonic()
    with pytest.raises(signals.FAIL) as failure:
        PullImage().run(repository="app:1", docker_server_url=url)
    assert 0.5 < time.monotonic() - started < 2
    assert "Connection refused" in str(failure.value)
    assert url in str(failure.value)
    assert "dind-daemon" in str(failure.value)
    assert len(lines(caplog)) == 1


def test_a_daemon_that_refuses_is_not_waited_for(fake: FakeDocker, caplog: pytest.LogCaptureFixture) -> None:
    fake.version = {"message": "denied by a plugin"}, 403
    with pytest.raises(signals.FAIL, match="denied by a plugin"):
        PullImage().run(repository="app:1", docker_server_url=fake.url)
    assert lines(caplog) == []


# ------------------------------------------------------------------------------------------------- pull


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ('{"credsStore": "desktop"}', "docker-credential-desktop"),
        ('{"credHelpers": {"registry.example": "gcloud"}}', "docker-credential-gcloud"),
        ('{"credsStore": "broken"}', "docker-credential-broken"),
        ("{", None),
    ],
)
def test_row_03_a_public_image_is_pulled_without_a_login(
    fake: FakeDocker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    config: str,
    names: str | None,
) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "docker-credential-broken").write_text("#!/bin/sh\nexit 1")
    (tmp_path / "docker-credential-broken").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    task = PullImage(docker_server_url=fake.url)
    assert task.run(repository="registry.example/app:1") == "registry.example/app:1"
    warned = lines(caplog, logging.WARNING)
    assert len(warned) == (1 if names else 0)
    assert all(str(names) in line and str(tmp_path / "config.json") in line for line in warned)

    fake.pull = [{"error": "pull access denied for app"}]
    with pytest.raises(signals.FAIL) as failure:
        task.run(repository="registry.example/app:1")
    assert str(failure.value).count(names or "docker login") == 1


@pytest.mark.parametrize("config", ["[]", '{"auths": {"registry.example": {"auth": "?"}}}', '{"auths": {"a": 5}}'])
def test_row_03_a_configuration_that_docker_cannot_read_is_one_error(
    fake: FakeDocker, tmp_path: Path, config: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(signals.FAIL, match=str(tmp_path / "config.json")):
        PullImage(docker_server_url=fake.url).run(repository="app:1")


def test_row_06_a_pull_that_stands_still(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.tasks.PROGRESS_SECONDS", 0.1)
    monkeypatch.setattr("flows.tasks.PULL_SILENCE_SECONDS", 0.35)
    fake.pull = [{"status": "Pulling fs layer", "id": "1"}, fake.closing.wait]
    with pytest.raises(signals.FAIL, match="nothing came for 0 s"):
        PullImage(docker_server_url=fake.url).run(repository="app:1")
    assert len([line for line in lines(caplog) if "nothing came for" in line]) >= 2


def test_progress(fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("flows.tasks.PROGRESS_SECONDS", 0.05)
    fake.pull = [
        {"status": "Pulling fs layer", "id": "1"},
        {"status": "Downloading", "id": "2", "progressDetail": {"current": 1_000_000, "total": 2_000_000}},
        lambda: wait_for(lambda: "1 pulling fs layer, 1 downloading, 1.0 MB received" in caplog.text, "it is logged"),
        {"status": "Status: Downloaded newer image for app:1"},
    ]
    PullImage(docker_server_url=fake.url).run(repository="app:1")
    assert "Downloaded newer image for app:1 (" in caplog.text


@pytest.mark.parametrize(
    "event",
    [
        {"status": "Downloading", "id": "1", "progressDetail": {"total": 5}},
        {"status": "Downloading", "id": "1", "progressDetail": {"current": "1", "total": "2"}},
        {"status": "Downloading", "id": "1", "progressDetail": None},
        {"status": "Downloading", "id": "1", "progressDetail": [1]},
        {"status": 5, "id": ["1"]},
        [],
        None,
        5,
    ],
    ids=str,
)
def test_row_07_no_event_ends_a_pull_that_goes_on(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, event: Any
) -> None:
    monkeypatch.setattr("flows.tasks.PROGRESS_SECONDS", 0.01)
    fake.pull = [event, event, {"status": "Pull complete", "id": "1"}, {"status": "Status: Downloaded app:1"}]
    assert PullImage(docker_server_url=fake.url).run(repository="app:1", stream_logs=True) == "app:1"
    assert "Downloaded app:1" in caplog.text


@pytest.mark.parametrize(
    ("image", "words", "transient"),
    [
        ("r.example/access-denied-report:1", "received unexpected HTTP status: 503 Service Unavailable", True),
        (
            "r.example/not-found:unauthorized",
            'failed to resolve reference "r.example/not-found:unauthorized": unexpected status from HEAD request to '
            "https://r.example/v2/not-found/manifests/unauthorized: 503 Service Unavailable",
            True,
        ),
        (
            "r.example/a:1",
            'Head "http://r.example/v2/a/manifests/1": dial tcp 10.0.0.1:80: connect: connection refused',
            True,
        ),
        ("denied.example/a:1", "dial tcp: lookup denied.example on 127.0.0.53:53: no such host", True),
        ("denied.example/a:1", "dial tcp: lookup denied.example on 127.0.0.53:53: server misbehaving", True),
        ("a:1", "net/http: TLS handshake timeout", True),
        ("a:1", 'Get "https://registry-1.docker.io/v2/": net/http: request canceled (Client.Timeout exceeded)', True),
        ("a:1", "read tcp 10.0.0.1:1->10.0.0.2:443: i/o timeout", True),
        ("a:1", "toomanyrequests: You have reached your unauthenticated pull rate limit.", True),
        ("a:1", "unexpected status from GET request to https://r/v2/: 429 Too Many Requests: denied: slow down", True),
        ("a:1", "unexpected EOF", True),
        ("timeout:503", "manifest for timeout:503 not found: manifest unknown: manifest unknown", False),
        ("r.example/connection-refused:1", "unknown blob", False),
        ("a:1", "manifest unknown: manifest unknown", False),
        ("a:1", 'failed to resolve reference "docker.io/library/a:1": docker.io/library/a:1: not found', False),
        (
            "a:1",
            "failed to copy: httpReadSeeker: failed open: could not fetch content descriptor "
            "sha256:0123 (application/vnd.docker.image.rootfs.diff.tar.gzip) from remote: not found",
            False,
        ),
        ("a:1", "pull access denied for a, repository does not exist or may require 'docker login'", False),
        ("a:1", "pull access denied, repository does not exist: server message: insufficient_scope", False),
        ("a:1", 'Get "https://r.example/v2/a/manifests/1": no basic auth credentials', False),
        ("a:1", 'Head "https://r.example/v2/a/manifests/1": unauthorized: authentication required', False),
        ("a:1", "unexpected status from HEAD request to https://r.example/v2/a: 403 Forbidden", False),
        ("a:1", "no matching manifest for linux/arm64/v8 in the manifest list entries", False),
        ("a:1", 'Get "https://r.example/v2/": http: server gave HTTP response to HTTPS client', False),
        ("a:1", "tls: failed to verify certificate: x509: certificate signed by unknown authority", False),
        ("a:1", "write /var/lib/docker/tmp/x: no space left on device", False),
    ],
)
def test_row_11_dockers_words_alone_decide(fake: FakeDocker, image: str, words: str, transient: bool) -> None:
    fake.pull = [{"errorDetail": {"message": words}, "error": words}]
    with pytest.raises(signals.PrefectStateSignal) as failure:
        PullImage(docker_server_url=fake.url).run(repository=image)
    assert words in str(failure.value)
    assert type(failure.value.state) is (Retrying if transient else Failed)
    assert ("docker login" in str(failure.value)) == (
        not transient and any(w in words for w in ("denied", "auth", "scope")) and "authority" not in words
    )


def test_retries_end(fake: FakeDocker) -> None:
    fake.pull = [{"error": "unexpected EOF"}]
    with prefect.context(task_run_count=2), pytest.raises(signals.RETRY) as retry:
        PullImage(docker_server_url=fake.url).run(repository="app:1")
    assert "retry 2 of 3 in 10 s" in str(retry.value)
    assert 8 < (retry.value.state.start_time - pendulum.now("utc")).total_seconds() <= 10
    with prefect.context(task_run_count=4), pytest.raises(signals.FAIL):
        PullImage(docker_server_url=fake.url).run(repository="app:1")


# ------------------------------------------------------------------------------------- wait and its logs


def test_row_05_the_exit_code_of_a_container_that_removes_itself(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture
) -> None:
    fake.gone = True
    fake.die_events = [{"Action": "die", "Actor": {"Attributes": {"exitCode": "3"}}}]
    with pytest.raises(signals.FAIL, match="exited with code 3"):
        wait(fake)
    fake.die_events = [{"Action": "die", "Actor": {"Attributes": {"exitCode": "0"}}}]
    assert wait(fake)["StatusCode"] == 0
    with pytest.raises(signals.SKIP, match="No such container"):
        GetContainerLogs(docker_server_url=fake.url).run(container_id=ID)
    fake.die_events = []
    with pytest.raises(signals.FAIL, match="No such container"):
        wait(fake)


def break_off() -> None:
    raise ConnectionResetError


@pytest.mark.parametrize("end", [b"", break_off], ids=["ends", "breaks"])
def test_row_08_a_stream_that_ends_while_the_container_runs_is_opened_again(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture, end: Any
) -> None:
    fake.exited.clear()
    fake.handle_error = lambda *_: None  # type: ignore[method-assign]
    fake.streams = [[frame(1, b"one\n"), frame(1, b"tw"), end], [frame(1, b"o\n"), fake.exited.set]]
    assert wait(fake)["StatusCode"] == 0
    assert [line for line in lines(caplog) if not line.startswith("Container")] == ["one", "two"]
    assert len([line for line in lines(caplog, logging.WARNING) if "Docker ended the output" in line]) == 1
    first, second, _ = fake.asked("GET /containers/logs")
    assert "since" not in first
    assert time.time() - 5 < float(second["since"]) < time.time()


@pytest.mark.parametrize(("first", "rest"), [(b"one\n", b"two\n"), (b"tick\n", b"tick\n"), (b"", b"one\n")])
def test_row_08_a_stream_that_ends_just_before_the_exit(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture, first: bytes, rest: bytes
) -> None:
    """As Docker 20.10 does when the driver `local` starts a new file."""
    fake.exited.clear()
    fake.end = frame(1, first) + frame(1, rest)
    fake.streams = [[frame(1, first), fake.exited.set], [frame(1, rest)]]
    assert wait(fake)["StatusCode"] == 0
    logged = [line for line in lines(caplog) if not line.startswith("Container")]
    assert logged == (first + rest).decode().split()
    assert len([line for line in lines(caplog, logging.WARNING) if "lines may be missing" in line]) == 1


def test_row_08_a_stream_that_ends_before_any_output(fake: FakeDocker, caplog: pytest.LogCaptureFixture) -> None:
    fake.exited.clear()
    fake.streams = [[], [frame(1, b"one\n"), fake.exited.set]]
    wait(fake)
    assert "one" in lines(caplog)
    assert float(fake.asked("GET /containers/logs")[1]["since"]) == 0, "from the beginning"


def test_row_08_the_run_ends_when_the_container_has(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.output.OUTPUT_GRACE_SECONDS", 0.2)
    fake.streams = [[frame(1, b"one\n"), fake.closing.wait]]
    started = time.monotonic()
    assert wait(fake)["StatusCode"] == 0
    assert time.monotonic() - started < 3
    assert "one" in lines(caplog)
    assert any("Docker did not end the output" in line for line in lines(caplog, logging.WARNING))


def test_row_09_docker_could_not_read_the_output(fake: FakeDocker, caplog: pytest.LogCaptureFixture) -> None:
    fake.streams = [[frame(1, b"one\n"), frame(3, b"Error grabbing logs: invalid character\n")]]
    wait(fake)
    warned = lines(caplog, logging.WARNING)
    assert len(warned) == 1
    assert warned[0].endswith("output could not be read: Error grabbing logs: invalid character")
    assert "one" in lines(caplog)


def test_row_10_what_a_container_writes_after_sigterm(fake: FakeDocker, caplog: pytest.LogCaptureFixture) -> None:
    fake.exited.clear()
    fake.streams = [[frame(1, b"up\n"), fake.exited.wait, frame(1, b"saving\n"), frame(2, b"no newline")]]
    with pytest.raises(signals.FAIL, match="was stopped at its time limit"):
        wait(fake, time_limit=0.3)
    assert fake.asked("POST /containers/stop")
    assert {"up", "saving", "no newline"} <= set(lines(caplog))


def test_a_daemon_that_dies_during_the_wait(fake: FakeDocker) -> None:
    fake.handle_error = lambda *_: None  # type: ignore[method-assign]
    fake.result = None
    with pytest.raises(
        signals.FAIL, match=r"^Container c0ffeec0ffee \(image app:1\): the Docker daemon at .* does not"
    ):
        wait(fake)


def test_a_wait_that_fails_stops_the_container(fake: FakeDocker) -> None:
    """Else the container would run on, whatever its time limit."""
    fake.handle_error = lambda *_: None  # type: ignore[method-assign]
    fake.exited.clear()
    fake.streams = [[frame(1, b"up\n"), fake.closing.wait]]
    with pytest.raises(signals.FAIL, match="timed out"):
        wait(fake, extra_docker_kwargs={"timeout": 0.3}, time_limit=60)
    assert fake.asked("POST /containers/stop")


def test_a_daemon_that_is_gone(nowhere: int) -> None:
    url = f"tcp://127.0.0.1:{nowhere}"
    with pytest.raises(
        signals.FAIL, match=r"^Waiting on the container: the Docker daemon at .* \(Connection refused\)$"
    ):
        WaitOnContainer(docker_server_url=url).run(container_id=ID)
    with pytest.raises(signals.SKIP, match="Connection refused"):
        GetContainerLogs(docker_server_url=url).run(container_id=ID)


# -------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("name", NAMES)
def test_row_12_the_arguments_are_prefects(name: str) -> None:
    ours, theirs = getattr(tasks, name), getattr(prefect_docker, name)
    expected = list(inspect.signature(theirs.run).parameters)
    assert list(inspect.signature(ours.run).parameters)[: len(expected)] == expected
    constructor = list(inspect.signature(theirs).parameters)[:-1]  # and **kwargs
    values = [f"value {number}" for number in range(len(constructor))]
    by_position, by_name = ours(*values), ours(**dict(zip(constructor, values)))
    for argument, value in zip(constructor, values):
        assert getattr(by_position, argument) == getattr(by_name, argument) == value


def test_row_12_a_flow_as_for_prefects_tasks(fake: FakeDocker) -> None:
    with Flow("like Prefect's") as flow:
        image = PullImage("app", "1", fake.url, stream_logs=True)()
        container = CreateContainer(docker_server_url=fake.url, extra_docker_kwargs={"labels": ["a"]})(image)
        started = StartContainer(docker_server_url=fake.url)(container)
        WaitOnContainer(docker_server_url=fake.url, time_limit=60)(container, upstream_tasks=[started])
        GetContainerLogs(docker_server_url=fake.url, extra_docker_kwargs={"tail": 5})(
            container, upstream_tasks=[started]
        )
    state = flow.run()
    assert state.is_successful(), state.result
    [create] = fake.asked("POST /containers/create")
    body = json.loads(create["body"])
    assert body["Image"] == "app:1"
    assert set(body["Labels"]) == {"a", tasks.LABEL}
    assert "5" in [query.get("tail") for query in fake.asked("GET /containers/logs")]


def test_row_14_an_environment_as_json_writes_it(fake: FakeDocker) -> None:
    environment = {"A": True, "B": 1, "C": 1.5, "D": "x=y", "E": "", "F": None, "G": False}
    CreateContainer(docker_server_url=fake.url).run(image_name="app:1", environment=environment)
    CreateContainer(docker_server_url=fake.url).run(image_name="app:1", environment=["A=1"])
    first, second = (json.loads(create["body"])["Env"] for create in fake.asked("POST /containers/create"))
    assert first == ["A=true", "B=1", "C=1.5", "D=x=y", "E=", "F", "G=false"]
    assert second == ["A=1"]
    with pytest.raises(signals.FAIL, match=r"environment\['TOKEN'\]") as failure:
        CreateContainer(docker_server_url=fake.url).run(image_name="app:1", environment={"TOKEN": ["hunter2"]})
    assert "hunter2" not in str(failure.value)


def test_row_15_dockers_errors_are_short(fake: FakeDocker) -> None:
    fake.pull = [{"error": "x" * 100_000 + " not found"}]
    with pytest.raises(signals.FAIL) as failure:
        PullImage(docker_server_url=fake.url).run(repository="app:1")
    assert len(str(failure.value)) < 700


def test_row_15_no_value_of_an_environment_in_a_message(fake: FakeDocker) -> None:
    with pytest.raises(signals.FAIL) as failure:
        CreateContainer(docker_server_url=fake.url).run(image_name="app:1", environment=["A=1", "=hunter2"])
    assert "hunter2" not in str(failure.value)
    assert not fake.asked("POST /containers/create")


@pytest.mark.parametrize("given", [[], [None], [""]])
@pytest.mark.parametrize(
    ("task", "argument"), [*zip(NAMES, ("repository", "image_name", "container_id", "container_id", "container_id"))]
)
def test_row_36_a_missing_argument_is_a_value_error(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture, task: str, argument: str, given: list[Any]
) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(ValueError, match=argument):
        getattr(tasks, task)(docker_server_url=fake.url).run(**dict(zip([argument], given)))
    assert fake.requests == []
    assert [record for record in caplog.records if record.name.startswith("prefect")] == []
