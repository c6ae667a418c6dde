"""The tasks on a fake of the Docker daemon's HTTP: what a real daemon cannot be brought to do, and what needs none."""

from __future__ import annotations

import base64
import inspect
import json
import logging
import os
import ssl
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
import trustme
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
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # they would take the place of the daemon's certificates
        monkeypatch.delenv(name, raising=False)
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
def test_a_local_daemon_is_never_asked_through_a_proxy(
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
def test_all_kinds_of_local_daemons(monkeypatch: pytest.MonkeyPatch, url: str, host: str) -> None:
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


def test_certificates_that_come_later_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As with DOCKER_TLS_CERTDIR: the daemon makes them while the flow starts."""
    monkeypatch.setattr("flows.daemon.DAEMON_SECONDS", 10)
    authority, server = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    with FakeDocker() as fake:
        fake.socket = server.wrap_socket(fake.socket, server_side=True)
        monkeypatch.setenv("DOCKER_HOST", fake.url)
        monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
        monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path / "client"))

        def write() -> None:
            wait_for(lambda: "Waiting" in caplog.text, "the task waits")
            (tmp_path / "client").mkdir()
            (tmp_path / "client" / "ca.pem").touch()  # one file after another, and not in one piece
            client = authority.issue_cert("client.example")
            client.private_key_pem.write_to_path(str(tmp_path / "client" / "key.pem"))
            client.cert_chain_pems[0].write_to_path(str(tmp_path / "client" / "cert.pem"))
            authority.cert_pem.write_to_path(str(tmp_path / "client" / "ca.pem"))

        thread = threading.Thread(target=write)
        thread.start()
        assert PullImage().run(repository="app:1", docker_server_url=fake.url) == "app:1"
        thread.join()


def test_certificates_that_do_not_come_are_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flows.daemon.DAEMON_SECONDS", 0.3)
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
    with pytest.raises(signals.FAIL, match="certificate and key files"):
        PullImage().run(repository="app:1", docker_server_url="tcp://127.0.0.1:9")


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
        ("{", "is no valid Docker configuration"),
        ("[]", "is no valid Docker configuration"),
        ('{"auths": 5}', "is no valid Docker configuration"),
    ],
)
def test_a_public_image_is_pulled_without_a_login(
    fake: FakeDocker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    config: str,
    names: str,
) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "docker-credential-broken").write_text("#!/bin/sh\nexit 1")
    (tmp_path / "docker-credential-broken").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    task = PullImage(docker_server_url=fake.url)
    assert task.run(repository="registry.example/app:1") == "registry.example/app:1"
    warned = lines(caplog, logging.WARNING)
    assert len(warned) == 1
    assert names in warned[0]
    assert str(tmp_path / "config.json") in warned[0]

    fake.pull = [{"error": "pull access denied for app"}]
    with pytest.raises(signals.FAIL) as failure:
        task.run(repository="registry.example/app:1")
    assert str(failure.value).count(names) == str(failure.value).count("docker login") == 1


def encoded(login: str) -> str:
    return base64.b64encode(login.encode()).decode()


LOGIN = {"username": "u", "password": "p:1"}


@pytest.mark.parametrize(
    "entry",
    [
        LOGIN,
        {**LOGIN, "auth": ""},
        {"auth": encoded("u:p:1")},
        {"auth": encoded("u:p:1").rstrip("=")},
        {"auth": encoded("u:p:1") + "\n"},
        {"username": "other", "password": "other", "auth": encoded("u:p:1")},
    ],
    ids=["name and password", "empty auth", "auth", "unpadded", "end of line", "auth goes before"],
)
def test_a_login_is_sent_as_kubelet_and_docker_do(
    fake: FakeDocker, tmp_path: Path, caplog: pytest.LogCaptureFixture, entry: dict[str, str]
) -> None:
    assert len(encoded("u:p:1")) != len(encoded("u:p:1").rstrip("=")), "it has padding"
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"registry.example": entry}}))
    PullImage(docker_server_url=fake.url).run(repository="registry.example/app:1")
    [pull] = fake.asked("POST /images/create")
    sent = json.loads(pull["login"])
    assert (sent["username"], sent["password"]) == ("u", "p:1")
    assert lines(caplog, logging.WARNING) == []


@pytest.mark.parametrize("entry", [{}, {"identitytoken": "t"}, {"auth": "", "identitytoken": "t"}], ids=str)
def test_an_entry_without_a_password_may_be_right(
    fake: FakeDocker, tmp_path: Path, caplog: pytest.LogCaptureFixture, entry: dict[str, str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"registry.example": entry}}))
    PullImage(docker_server_url=fake.url).run(repository="registry.example/app:1")
    [pull] = fake.asked("POST /images/create")
    assert json.loads(pull["login"]) == ({"IdentityToken": "t"} if entry else {})
    assert lines(caplog, logging.WARNING) == []


@pytest.mark.parametrize(
    "entry", [5, None, [], {"auth": ""}, {"auth": "?"}, {"auth": encoded("u")}, {"auth": 5}], ids=str
)
@pytest.mark.parametrize("repository", ["registry.example/app", "broken.example/app", "app"])
def test_a_broken_login_is_left_out(
    fake: FakeDocker, tmp_path: Path, caplog: pytest.LogCaptureFixture, entry: Any, repository: str
) -> None:
    auths = {"broken.example": entry, "registry.example": LOGIN}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    assert PullImage(docker_server_url=fake.url).run(repository=repository, tag="1") == f"{repository}:1"
    StartContainer(docker_server_url=fake.url).run(container_id=ID)
    [warned] = lines(caplog, logging.WARNING)
    assert "'broken.example'" in warned
    [pull] = fake.asked("POST /images/create")
    assert ("username" in json.loads(pull["login"])) == repository.startswith("registry.")


@pytest.mark.parametrize("fault", ["denied: requested access to the resource is denied", "unexpected EOF"])
def test_an_image_that_only_the_daemon_has(fake: FakeDocker, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    fake.images, fake.pull = {"my-local:1"}, [{"error": fault}]
    task = PullImage(docker_server_url=fake.url)
    assert task.run(repository="my-local:1") == "my-local:1"
    [warned] = lines(caplog, logging.WARNING)
    assert fault in warned
    assert "the image that the daemon has" in warned
    with pytest.raises(signals.PrefectStateSignal, match=fault):
        task.run(repository="my-local:2")
    with pytest.raises(signals.PrefectStateSignal, match=fault):
        task.run(repository="my-local:1", extra_docker_kwargs={"platform": "linux/arm64"})  # perhaps not what it has


def test_a_registry_that_hangs_and_an_image_that_the_daemon_has(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.tasks.PROGRESS_SECONDS", 0.1)
    monkeypatch.setattr("flows.tasks.PULL_SILENCE_SECONDS", 0.2)
    fake.images, fake.pull = {"app:1"}, [fake.closing.wait]
    assert PullImage(docker_server_url=fake.url).run(repository="app:1") == "app:1"
    assert "hangs" in lines(caplog, logging.WARNING)[0]


ECR = "0123.dkr.ecr.eu-west-1.amazonaws.com"
FORBIDDEN = "unexpected status from HEAD request to https://r.example/v2/a/manifests/1: 403 Forbidden"


@pytest.mark.parametrize(
    ("registry", "words", "advice"),
    [
        ("r.example", "Proxy Authentication Required", "the login for the proxy"),
        ("r.example", 'Get "https://r.example/v2/": Proxy Authentication Required', "the login for the proxy"),
        ("r.example", "authorization denied by plugin opa: no", None),
        ("r.example", "open /var/lib/docker/x: permission denied", None),
        ("r.example", "pull access denied for a, repository does not exist", "docker login"),
        ("r.example", "no basic auth credentials", "docker login"),
        ("r.example", FORBIDDEN, None),
        (ECR, FORBIDDEN.replace("r.example", ECR), "fresh token"),
        (ECR, "denied: Your authorization token has expired. Reauthenticate and try again.", "fresh token"),
        ("with-login.example", FORBIDDEN, "fresh token"),
        ("with-login.example", "unauthorized: authentication required", "fresh token"),
        ("r.example", "manifest unknown", None),
        ("r.example", "received unexpected HTTP status: 503 Service Unavailable: denied", None),
    ],
)
def test_advice_only_where_it_is_right(
    fake: FakeDocker, tmp_path: Path, registry: str, words: str, advice: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"with-login.example": LOGIN}}))
    fake.pull = [{"error": words}]
    with pytest.raises(signals.PrefectStateSignal) as failure:
        PullImage(docker_server_url=fake.url).run(repository=f"{registry}/a:1")
    given = {each for each in ("the login for the proxy", "docker login", "fresh token") if each in str(failure.value)}
    assert given == ({advice} if advice else set())


def test_a_pull_that_stands_still(
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
def test_no_event_ends_a_pull_that_goes_on(
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
def test_dockers_words_decide_on_retries(fake: FakeDocker, image: str, words: str, transient: bool) -> None:
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


def test_the_exit_code_of_a_container_that_removes_itself(fake: FakeDocker, caplog: pytest.LogCaptureFixture) -> None:
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
def test_after_a_stream_that_breaks_new_output_is_read(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture, end: Any
) -> None:
    """No clock, this machine's or the daemon's, decides what is read: nothing comes twice."""
    fake.exited.clear()
    fake.handle_error = lambda *_: None  # type: ignore[method-assign]
    fake.streams = [[frame(1, b"one\n"), end], [frame(1, b"two\n"), fake.exited.set]]
    assert wait(fake)["StatusCode"] == 0
    assert [line for line in lines(caplog) if not line.startswith("Container")] == ["one", "two"]
    [warned] = lines(caplog, logging.WARNING)
    assert "lines may be missing" in warned
    first, second = fake.asked("GET /containers/logs")
    assert "tail" not in first
    assert second["tail"] == "0"
    assert not {"since", "until"} & {*first, *second}


def test_a_stream_that_breaks_just_before_the_exit(fake: FakeDocker, caplog: pytest.LogCaptureFixture) -> None:
    fake.exited.clear()
    fake.handle_error = lambda *_: None  # type: ignore[method-assign]
    fake.streams = [[frame(1, b"one\n"), fake.exited.set, break_off]]
    assert wait(fake)["StatusCode"] == 0
    [warned] = lines(caplog, logging.WARNING)
    assert "lines may be missing" in warned


def test_a_log_driver_that_cannot_be_read(fake: FakeDocker, caplog: pytest.LogCaptureFixture) -> None:
    fake.logs = {"message": "configured logging driver does not support reading"}, 501
    assert wait(fake)["StatusCode"] == 0
    with pytest.raises(signals.SKIP, match="does not support reading"):
        GetContainerLogs(docker_server_url=fake.url).run(container_id=ID)
    [warned] = lines(caplog, logging.WARNING)
    assert "does not support reading" in warned


@pytest.mark.parametrize("drips", [False, True], ids=["stalls", "drips"])
def test_getting_the_logs_is_bounded_in_time(fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, drips: bool) -> None:
    monkeypatch.setattr("flows.output.READ_SECONDS", 0.5)
    monkeypatch.setattr("flows.tasks.READ_SECONDS", 0.5)
    pause = fake.closing.wait if not drips else lambda: fake.closing.wait(0.1)
    fake.end = (item for _ in range(100) for item in (frame(1, b"one\n"), pause))
    started = time.monotonic()
    with pytest.raises(signals.SKIP, match=r"No logs: .*(timed out|did not end)"):
        GetContainerLogs(docker_server_url=fake.url).run(container_id=ID)
    assert time.monotonic() - started < 3


def test_the_run_ends_when_the_container_has(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.output.OUTPUT_GRACE_SECONDS", 0.2)
    fake.streams = [[frame(1, b"one\n"), fake.closing.wait]]
    started = time.monotonic()
    assert wait(fake)["StatusCode"] == 0
    assert time.monotonic() - started < 3
    assert "one" in lines(caplog)
    assert any("Docker did not end the output" in line for line in lines(caplog, logging.WARNING))


def test_docker_could_not_read_the_output(fake: FakeDocker, caplog: pytest.LogCaptureFixture) -> None:
    fake.streams = [[frame(1, b"one\n"), frame(3, b"Error grabbing logs: invalid character\n")]]
    wait(fake)
    warned = lines(caplog, logging.WARNING)
    assert len(warned) == 1
    assert warned[0].endswith("output could not be read: Error grabbing logs: invalid character")
    assert "one" in lines(caplog)


def test_what_a_container_writes_after_sigterm(fake: FakeDocker, caplog: pytest.LogCaptureFixture) -> None:
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
def test_the_arguments_are_prefects(name: str) -> None:
    ours, theirs = getattr(tasks, name), getattr(prefect_docker, name)
    expected = list(inspect.signature(theirs.run).parameters)
    assert list(inspect.signature(ours.run).parameters)[: len(expected)] == expected
    constructor = list(inspect.signature(theirs).parameters)[:-1]  # and **kwargs
    values = [f"value {number}" for number in range(len(constructor))]
    by_position, by_name = ours(*values), ours(**dict(zip(constructor, values)))
    for argument, value in zip(constructor, values):
        assert getattr(by_position, argument) == getattr(by_name, argument) == value


def test_a_flow_as_for_prefects_tasks(fake: FakeDocker) -> None:
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


def test_an_environment_as_json_writes_it(fake: FakeDocker) -> None:
    environment = {"A": True, "B": 1, "C": 1.5, "D": "x=y", "E": "", "F": None, "G": False}
    CreateContainer(docker_server_url=fake.url).run(image_name="app:1", environment=environment)
    CreateContainer(docker_server_url=fake.url).run(image_name="app:1", environment=["A=1"])
    first, second = (json.loads(create["body"])["Env"] for create in fake.asked("POST /containers/create"))
    assert first == ["A=true", "B=1", "C=1.5", "D=x=y", "E=", "F", "G=false"]
    assert second == ["A=1"]
    with pytest.raises(signals.FAIL, match=r"environment\['TOKEN'\]") as failure:
        CreateContainer(docker_server_url=fake.url).run(image_name="app:1", environment={"TOKEN": ["hunter2"]})
    assert "hunter2" not in str(failure.value)


@pytest.mark.parametrize("name", ["on-failure", "always", "unless-stopped"])
@pytest.mark.parametrize("argument", ["host_config", "extra_docker_kwargs"])
def test_a_restart_policy_is_refused_before_there_is_a_container(fake: FakeDocker, name: str, argument: str) -> None:
    policy = {"Name": name, "MaximumRetryCount": 3}
    given = {
        "host_config": {"restart_policy": policy},
        "extra_docker_kwargs": {"host_config": {"RestartPolicy": policy}},
    }
    with pytest.raises(signals.FAIL, match=f"restart policy '{name}'.*Prefect's retries"):
        CreateContainer(docker_server_url=fake.url).run(image_name="app:1", **{argument: given[argument]})
    assert not fake.asked("POST /containers/create")


@pytest.mark.parametrize("policy", [None, {}, {"Name": ""}, {"Name": "no"}], ids=str)
def test_no_restart_policy(fake: FakeDocker, policy: dict[str, str] | None) -> None:
    CreateContainer(docker_server_url=fake.url).run(image_name="app:1", host_config={"restart_policy": policy})
    assert fake.asked("POST /containers/create")


def test_no_log_driver_is_set(fake: FakeDocker) -> None:
    """Docker's default, and the log-opts of the daemon, hold."""
    CreateContainer(docker_server_url=fake.url).run(image_name="app:1", host_config={"mem_limit": "1g"})
    [create] = fake.asked("POST /containers/create")
    assert "LogConfig" not in json.loads(create["body"])["HostConfig"]


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        (CreateContainer, {"image_name": "app:1", "host_config": {"mem_limit": "1x"}}),
        (CreateContainer, {"image_name": "app:1", "host_config": {"restart_policy": 5}}),
        (CreateContainer, {"image_name": "app:1", "host_config": {"no_such": 1}}),
        (CreateContainer, {"image_name": "app:1", "extra_docker_kwargs": {"no_such": 1}}),
        (StartContainer, {"container_id": ID, "extra_docker_kwargs": {"no_such": 1}}),
        (PullImage, {"repository": "app:1", "extra_docker_kwargs": {"no_such": 1}}),
        (WaitOnContainer, {"container_id": ID, "extra_docker_kwargs": {"no_such": 1}}),
    ],
)
def test_what_the_sdk_finds_wrong_with_arguments_is_a_failure(
    fake: FakeDocker, task: Any, arguments: dict[str, Any]
) -> None:
    with pytest.raises(signals.FAIL, match=r"no_such|1x|restart|no longer supported"):
        task(docker_server_url=fake.url).run(**arguments)


@pytest.mark.parametrize(
    "error", [TypeError("'NoneType' object is not subscriptable"), ValueError("a bug"), KeyError("x")]
)
@pytest.mark.parametrize(
    ("call", "task", "argument"),
    [
        ("create_container", CreateContainer, "image_name"),
        ("start", StartContainer, "container_id"),
        ("wait", WaitOnContainer, "container_id"),
        ("pull", PullImage, "repository"),
    ],
)
def test_a_bug_stays_a_bug(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, call: str, task: Any, argument: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(docker.APIClient, call, fail)
    with pytest.raises(type(error)) as raised:
        task(docker_server_url=fake.url).run(**{argument: ID})
    assert raised.value is error
    assert raised.traceback[-1].name == "fail"


def test_dockers_errors_are_short(fake: FakeDocker) -> None:
    fake.pull = [{"error": "x" * 100_000 + " not found"}]
    with pytest.raises(signals.FAIL) as failure:
        PullImage(docker_server_url=fake.url).run(repository="app:1")
    assert len(str(failure.value)) < 700


def test_no_value_of_an_environment_in_a_message(fake: FakeDocker) -> None:
    with pytest.raises(signals.FAIL) as failure:
        CreateContainer(docker_server_url=fake.url).run(image_name="app:1", environment=["A=1", "=hunter2"])
    assert "hunter2" not in str(failure.value)
    assert not fake.asked("POST /containers/create")


@pytest.mark.parametrize("given", [[], [None], [""]])
@pytest.mark.parametrize(
    ("task", "argument"), [*zip(NAMES, ("repository", "image_name", "container_id", "container_id", "container_id"))]
)
def test_a_missing_argument_is_a_value_error(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture, task: str, argument: str, given: list[Any]
) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(ValueError, match=argument):
        getattr(tasks, task)(docker_server_url=fake.url).run(**dict(zip([argument], given)))
    assert fake.requests == []
    assert [record for record in caplog.records if record.name.startswith("prefect")] == []
