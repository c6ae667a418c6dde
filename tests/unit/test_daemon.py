"""The connection to the Docker daemon: proxies, a daemon that is late, and what its errors say."""

import logging
import os
import ssl
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import docker
import pytest
import requests
import trustme
from prefect.engine import signals

from flows.daemon import connect
from flows.tasks import PullImage, StartContainer
from tests.support.fake_docker import ID, FakeDocker
from tests.support.log_lines import lines


@pytest.mark.parametrize(
    ("proxy", "no_proxy", "url", "host"),
    [
        ("http_proxy", {}, "tcp://localhost:9", "localhost:9"),
        ("HTTP_PROXY", {"NO_PROXY": ".svc"}, "tcp://127.0.0.2:9", "127.0.0.2:9"),
        ("all_proxy", {"no_proxy": ".corp", "NO_PROXY": "127.0.0.1"}, "tcp://[::1]:9", "[::1]:9"),
        ("http_proxy", {}, "unix:///no/socket", "localhost"),
    ],
)
def test_a_local_daemon_is_never_asked_through_a_proxy(
    fake: FakeDocker,
    monkeypatch: pytest.MonkeyPatch,
    proxy: str,
    no_proxy: dict[str, str],
    url: str,
    host: str,
) -> None:
    monkeypatch.delenv("HTTPS_PROXY")
    for name, value in {proxy: "http://127.0.0.1:9", **no_proxy}.items():
        monkeypatch.setenv(name, value)
    assert connect(fake.url).version()
    with pytest.raises(docker.errors.DockerException):
        connect(url)
    assert requests.utils.get_environ_proxies(f"http://{host}/version") == {}
    assert all(os.environ[name].startswith(value) for name, value in no_proxy.items())
    assert requests.utils.get_environ_proxies("http://api.prefect.example"), (
        "others are asked through the proxy"
    )


@pytest.mark.parametrize(
    "url",
    ["tcp://localhost:abc", "tcp://[::1:2375", "tcp://localhost:99999", "tcp://u:hunter2/x@h:1"],
)
def test_an_address_that_is_none_is_a_failure_without_its_password(url: str) -> None:
    for run in (
        lambda: PullImage(docker_server_url=url).run(repository="app"),
        lambda: StartContainer(docker_server_url=url).run(container_id=ID),
    ):
        with pytest.raises(
            signals.FAIL, match="is no address such as tcp://localhost:2375"
        ) as seen:
            run()
        assert "hunter2" not in str(seen.value)


def test_a_remote_daemon_is_asked_through_the_proxy(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", fake.url.replace("tcp", "http"))
    StartContainer().run(container_id=ID, docker_server_url="tcp://docker.example:2375")
    assert fake.asked("POST /containers/start"), "the fake daemon is the proxy"


def pull_late(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str, act: Any
) -> None:
    """Pull from a daemon that answers after `act`, which comes when the log says so."""

    def see(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("Waiting up to 60 s for the Docker daemon"):
            act()
        return True

    monkeypatch.setattr(caplog.handler, "filters", [see])
    assert PullImage().run(repository="app:1", docker_server_url=url) == "app:1"
    assert [line[:7] for line in lines(caplog)].count("Waiting") == 1


def test_a_daemon_that_is_starting_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeDocker() as earlier:
        pass  # its port is free now
    with ExitStack() as stack:
        pull_late(
            monkeypatch,
            caplog,
            earlier.url,
            lambda: stack.enter_context(FakeDocker(earlier.server_port)),
        )


def test_certificates_that_come_later_are_waited_for(
    fake: FakeDocker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """As with DOCKER_TLS_CERTDIR: the daemon makes one file after another while the flow starts."""
    authority, server = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    (tmp_path / "ca.pem").touch()
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))

    def write() -> None:
        client = authority.issue_cert("client.example")
        client.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
        client.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    with FakeDocker() as with_tls:
        with_tls.socket = server.wrap_socket(with_tls.socket, server_side=True)
        monkeypatch.setenv("DOCKER_HOST", with_tls.url)
        pull_late(monkeypatch, caplog, with_tls.url, write)
    PullImage().run(repository="app:1", docker_server_url=fake.url)
    assert fake.asked("POST /images/create"), "TLS is for the daemon of DOCKER_HOST"


@pytest.mark.parametrize("tls", [False, True])
def test_a_daemon_that_does_not_come_up_is_one_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, tls: bool
) -> None:
    monkeypatch.setattr("flows.daemon.DAEMON_SECONDS", 0.3)
    if tls:
        monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
        monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(
        signals.FAIL, match="certificate and key files" if tls else "Connection refused"
    ) as failure:
        PullImage().run(repository="app:1", docker_server_url=os.environ["DOCKER_HOST"])
    assert 0.3 < time.monotonic() - started < 2
    assert os.environ["DOCKER_HOST"] in str(failure.value)
    assert "dind-daemon" in str(failure.value)
    assert len(lines(caplog)) == 1


def test_a_daemon_that_refuses_is_not_waited_for(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture
) -> None:
    fake.version = {"message": "denied by a plugin"}, 403
    with pytest.raises(signals.FAIL, match="denied by a plugin"):
        PullImage().run(repository="app:1", docker_server_url=fake.url)
    assert lines(caplog) == []
