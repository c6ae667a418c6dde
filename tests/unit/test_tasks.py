"""The tasks on a fake of the Docker daemon's HTTP: what a real daemon cannot be brought to do, and what needs none."""

import inspect
import json
import logging
import os
import ssl
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
from flows.states import fail_with_cause
from flows.tasks import (
    CreateContainer,
    GetContainerLogs,
    PullImage,
    StartContainer,
    WaitOnContainer,
)
from tests.support.fake_docker import ID, FakeDocker
from tests.support.waiting import wait_for

NAMES = ("PullImage", "CreateContainer", "StartContainer", "WaitOnContainer", "GetContainerLogs")
REQUIRED = dict(
    zip(NAMES, ("repository", "image_name", "container_id", "container_id", "container_id"))
)


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def warning(caplog: pytest.LogCaptureFixture) -> str:
    [warned] = lines(caplog, logging.WARNING)
    return warned


def pull_failure(
    fake: FakeDocker, image: str, error: str, **options: Any
) -> signals.PrefectStateSignal:
    fake.pull = [{"errorDetail": {"message": error}, "error": error}]
    with pytest.raises(signals.PrefectStateSignal) as failure:
        PullImage(docker_server_url=fake.url).run(repository=image, **options)
    return failure.value


# ------------------------------------------------------------------------------------------- connection


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


def test_a_remote_daemon_is_asked_through_the_proxy(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", fake.url.replace("tcp", "http"))
    StartContainer().run(container_id=ID, docker_server_url="tcp://docker.example:2375")
    assert fake.asked("POST /containers/start"), "the fake daemon is the proxy"


def pull_late(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str, act: Any
) -> None:
    """Pull from a daemon that answers after `act`, which comes when the log says that the daemon is waited for."""

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


# ------------------------------------------------------------------------------------------------- pull


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ('{"credHelpers": {"registry.example": "not-there"}}', "docker-credential-not-there"),
        ('{"credsStore": "broken"}', "docker-credential-broken"),
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
    image = "registry.example/app:1"
    assert PullImage(docker_server_url=fake.url).run(repository=image) == image
    assert names in warning(caplog)
    assert str(tmp_path / "config.json") in warning(caplog)
    failure = str(pull_failure(fake, image, "pull access denied for app"))
    assert failure.count(names) == failure.count("docker login") == 1


LOGIN = {"username": "u", "password": "p:1"}
AUTH = "dTpwOjE="  # the same


@pytest.mark.parametrize(
    ("entry", "sent"),
    [
        ({**LOGIN, "auth": ""}, LOGIN),
        ({"auth": f"{AUTH}\n"}, LOGIN),
        ({"auth": AUTH, "username": "other", "password": "other"}, LOGIN),
        ({"identitytoken": "t"}, {"IdentityToken": "t"}),
        ({"identitytoken": "t", "auth": ""}, {"IdentityToken": "t"}),
        ({}, {}),
    ],
    ids=str,
)
def test_a_login_is_sent_as_kubelet_and_docker_do(
    fake: FakeDocker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    entry: dict[str, str],
    sent: dict[str, str],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"registry.example": entry}}))
    PullImage(docker_server_url=fake.url).run(repository="registry.example/app:1")
    [pull] = fake.asked("POST /images/create")
    login = json.loads(pull["login"])
    assert login.items() >= sent.items()
    assert bool(login) == bool(sent)
    assert lines(caplog, logging.WARNING) == []


@pytest.mark.parametrize(
    "entry", [5, None, [], {"auth": ""}, {"auth": "?"}, {"auth": "dQ=="}, {"auth": 5}], ids=str
)
def test_a_broken_login_is_left_out(
    fake: FakeDocker, tmp_path: Path, caplog: pytest.LogCaptureFixture, entry: Any
) -> None:
    auths = {"broken.example": entry, "registry.example": LOGIN}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    for registry in auths:
        caplog.clear()
        PullImage(docker_server_url=fake.url).run(repository=f"{registry}/app:1")
        assert "'broken.example'" in warning(caplog)
    logins = [json.loads(pull["login"]) for pull in fake.asked("POST /images/create")]
    assert ["username" in login for login in logins] == [False, True]


def test_an_image_that_the_daemon_has(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake.images = {"app:1"}
    options = {"extra_docker_kwargs": {"platform": "linux/arm64"}}  # perhaps not what it has
    assert "unexpected EOF" in str(pull_failure(fake, "app:1", "unexpected EOF", **options))
    monkeypatch.setattr("flows.tasks.PROGRESS_SECONDS", 0.1)
    monkeypatch.setattr("flows.tasks.PULL_SILENCE_SECONDS", 0.2)
    fake.pull = [fake.closing.wait]
    assert PullImage(docker_server_url=fake.url).run(repository="app:1") == "app:1"
    assert "the registry or the daemon hangs" in warning(caplog)
    assert "the image on the daemon is used" in warning(caplog)


def test_progress_whatever_shape_events_have(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.tasks.PROGRESS_SECONDS", 0.05)
    details: list[Any] = [{"total": 5}, {"current": "1", "total": "2"}, None, [1]]
    fake.pull = [
        *({"status": "Downloading", "id": "1", "progressDetail": detail} for detail in details),
        *({"status": 5, "id": ["1"]}, [], None, 5),
        {"status": "Pulling fs layer", "id": "1"},
        {
            "status": "Downloading",
            "id": "2",
            "progressDetail": {"current": 1_000_000, "total": 2_000_000},
        },
        lambda: wait_for(
            lambda: "1 pulling fs layer, 1 downloading, 1.0 MB received" in caplog.text,
            "it is logged",
        ),
        {"status": "Status: Downloaded newer image for app:1"},
    ]
    assert (
        PullImage(docker_server_url=fake.url).run(repository="app:1", stream_logs=True) == "app:1"
    )
    assert "Downloaded newer image for app:1 (" in caplog.text


ECR = "0123.dkr.ecr.eu-west-1.amazonaws.com"
HEAD = (
    "unexpected status from HEAD request to https://r.example/v2/not-found/manifests/unauthorized: "
)
RETRIED = [
    (
        "r.example/access-denied-report:1",
        "received unexpected HTTP status: 503 Service Unavailable: denied",
    ),
    ("r.example/not-found:unauthorized", HEAD + "429 Too Many Requests: denied: slow down"),
    ("a:1", "toomanyrequests: You have reached your unauthenticated pull rate limit."),
    ("denied.example/a:1", "dial tcp: lookup denied.example on 127.0.0.53:53: no such host"),
    ("a:1", "net/http: TLS handshake timeout"),
    (
        "a:1",
        'Get "https://registry-1.docker.io/v2/": net/http: request canceled (Client.Timeout exceeded)',
    ),
    ("a:1", "unexpected EOF"),
]
FAILED = [
    ("timeout:503", "manifest for timeout:503 not found: manifest unknown: manifest unknown", ""),
    ("r.example/connection-refused:1", "unknown blob", ""),
    ("a:1", "no matching manifest for linux/arm64/v8 in the manifest list entries", ""),
    ("a:1", 'Get "https://r.example/v2/": http: server gave HTTP response to HTTPS client', ""),
    ("a:1", "tls: failed to verify certificate: x509: certificate signed by unknown authority", ""),
    (
        "a:1",
        "failed to fetch anonymous token: tls: failed to verify certificate: x509: certificate has expired",
        "",
    ),
    ("a:1", "x" * 100_000 + " not found", ""),
    ("a:1", "authorization denied by plugin opa: no", ""),
    ("a:1", "open /var/lib/docker/x: permission denied", ""),
    ("r.example/a:1", HEAD + "403 Forbidden", ""),
    (
        "a:1",
        "pull access denied for a, repository does not exist or may require 'docker login'",
        "docker login",
    ),
    ("a:1", "repository does not exist: server message: insufficient_scope", "docker login"),
    (
        "r.example/a:1",
        'Get "https://r.example/v2/a/manifests/1": no basic auth credentials',
        "docker login",
    ),
    (
        "a:1",
        'Head "https://r.example/v2/a/manifests/1": unauthorized: authentication required',
        "docker login",
    ),
    (
        "r.example/a:1",
        'Get "https://r.example/v2/": Proxy Authentication Required',
        "the login for the proxy",
    ),
    (f"{ECR}/a:1", HEAD.replace("r.example", ECR) + "403 Forbidden", "fresh token"),
    (
        f"{ECR}/a:1",
        "denied: Your authorization token has expired. Reauthenticate and try again.",
        "fresh token",
    ),
    ("with-login.example/a:1", HEAD + "403 Forbidden", "fresh token"),
]


@pytest.mark.parametrize(
    ("image", "words", "state", "advice"),
    [
        *((*each, Retrying, "") for each in RETRIED),
        *((*each, Failed, advice) for *each, advice in FAILED),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_dockers_words_decide_on_retries_and_advice(
    fake: FakeDocker, tmp_path: Path, image: str, words: str, state: type, advice: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"with-login.example": LOGIN}}))
    failure = pull_failure(fake, image, words)
    assert type(failure.state) is state
    assert words[-100:] in str(failure)
    assert len(str(failure)) < 700
    message = str(failure).replace(words, "")
    given = [
        it for it in ("the login for the proxy", "docker login", "fresh token") if it in message
    ]
    assert given == [advice] * bool(advice)


def break_off() -> None:
    raise ConnectionResetError


@pytest.mark.parametrize(
    ("refusal", "state"),
    [
        (("odd", 400), Failed),
        (("toomanyrequests: odd", 429), Retrying),
        (("odd", 500), Retrying),
        (None, Retrying),
    ],
    ids=str,
)
def test_a_status_decides_on_retries(
    fake: FakeDocker, refusal: tuple[str, int] | None, state: type
) -> None:
    """Without one, as when the connection breaks, the pull is tried again."""
    fake.refusal, fake.pull = refusal, [break_off]
    with pytest.raises(signals.PrefectStateSignal) as failure:
        PullImage(docker_server_url=fake.url).run(repository="app:1")
    assert type(failure.value.state) is state
    message = str(failure.value)
    assert ("does not answer" in message) == (refusal is None)
    assert message.count("(") == message.count(")")


def test_no_message_holds_nul(fake: FakeDocker) -> None:
    """PostgreSQL, as Prefect's store, refuses it."""
    message = str(pull_failure(fake, "app:1", "a\0b not found"))
    assert message.endswith("a\ufffdb not found")
    assert fail_with_cause(Flow("a"), Failed(), {Failed("a\0b")}).message == "a\ufffdb"  # type: ignore[union-attr]


def test_a_login_of_the_callers_own(fake: FakeDocker, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"auths": {"registry.example": {"identitytoken": "t"}}})
    )
    options = {"auth_config": LOGIN}
    PullImage(docker_server_url=fake.url).run(
        repository="registry.example/app:1", extra_docker_kwargs=options
    )
    [pull] = fake.asked("POST /images/create")
    assert json.loads(pull["login"]) == LOGIN


def test_lines_of_a_pull_are_the_runs(fake: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> None:
    task, runs = PullImage(docker_server_url=fake.url, stream_logs=True), []
    monkeypatch.setattr(
        task.logger, "debug", lambda _: runs.append(prefect.context.get("flow_run_id"))
    )
    with prefect.context(flow_run_id="run-1"):
        assert task.run(repository="app", tag=1) == "app:1"
    assert runs == ["run-1"]


def test_retries_end(fake: FakeDocker) -> None:
    with prefect.context(task_run_count=2):
        retry = pull_failure(fake, "app:1", "unexpected EOF")
    assert "retry 2 of 3 in 10 s" in str(retry)
    assert 8 < (retry.state.start_time - pendulum.now("utc")).total_seconds() <= 10
    with prefect.context(task_run_count=4):
        assert type(pull_failure(fake, "app:1", "unexpected EOF").state) is Failed


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
        container = CreateContainer(
            docker_server_url=fake.url, extra_docker_kwargs={"labels": ["a"]}
        )(image)
        started = StartContainer(docker_server_url=fake.url)(container)
        WaitOnContainer(docker_server_url=fake.url, time_limit=60)(
            container, upstream_tasks=[started]
        )
        get_logs = GetContainerLogs(docker_server_url=fake.url, extra_docker_kwargs={"tail": 5})
        get_logs(container, upstream_tasks=[started])
    state = flow.run()
    assert state.is_successful(), state.result
    [create] = fake.asked("POST /containers/create")
    body = json.loads(create["body"])
    assert body["Image"] == "app:1"
    assert set(body["Labels"]) == {"a", tasks.LABEL}
    assert "5" in [query.get("tail") for query in fake.asked("GET /containers/logs")]


@pytest.mark.parametrize("policy", [None, {}, {"Name": ""}, {"Name": "no"}], ids=str)
def test_no_restart_policy_and_no_log_driver(
    fake: FakeDocker, policy: dict[str, str] | None
) -> None:
    """The log driver is Docker's default, and the log-opts of the daemon hold."""
    CreateContainer(docker_server_url=fake.url).run(
        image_name="app:1", host_config={"restart_policy": policy}
    )
    [create] = fake.asked("POST /containers/create")
    assert "LogConfig" not in json.loads(create["body"])["HostConfig"]


APP, CONTAINER = {"image_name": "app:1"}, {"container_id": ID}
NO_SUCH = {"extra_docker_kwargs": {"no_such": 1}}
ALWAYS = {"Name": "always", "MaximumRetryCount": 3}


@pytest.mark.parametrize(
    ("task", "arguments", "says"),
    [
        (
            CreateContainer,
            {**APP, "host_config": {"restart_policy": ALWAYS}},
            "restart_policy is not allowed.*Prefect's retries",
        ),
        (
            CreateContainer,
            {**APP, "extra_docker_kwargs": {"host_config": {"RestartPolicy": ALWAYS}}},
            "host_config is a parameter of its own",
        ),
        (
            CreateContainer,
            {**APP, "environment": {"TOKEN": ["hunter2"]}},
            r"environment\['TOKEN'\]",
        ),
        (CreateContainer, {**APP, "environment": ["A=1", "=hunter2"]}, "the name ''"),
        # what the SDK finds wrong
        (CreateContainer, {**APP, "host_config": {"mem_limit": "1x"}}, "mem_limit is text"),
        (CreateContainer, {**APP, "host_config": {"restart_policy": 5}}, "restart"),
        (CreateContainer, {**APP, "host_config": {"no_such": 1}}, "no_such"),
        (CreateContainer, {**APP, **NO_SUCH}, "no_such"),
        (StartContainer, {**CONTAINER, **NO_SUCH}, "no longer supported"),
        (PullImage, {"repository": "app:1", **NO_SUCH}, "no_such"),
        (WaitOnContainer, {**CONTAINER, **NO_SUCH}, "no_such"),
    ],
)
def test_wrong_arguments_are_a_failure(
    fake: FakeDocker, task: Any, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(signals.FAIL, match=says) as failure:
        task(docker_server_url=fake.url).run(**arguments)
    assert "hunter2" not in str(failure.value)
    assert not fake.asked("POST /containers/create")


@pytest.mark.parametrize(
    ("ours", "task"),
    [
        ("flows.tasks.environment_strings", CreateContainer),
        ("flows.tasks.connect", StartContainer),
        ("flows.tasks.Watch", WaitOnContainer),
        ("flows.tasks.Pull", PullImage),
    ],
)
def test_a_bug_stays_a_bug(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, ours: str, task: Any
) -> None:
    error = TypeError("'NoneType' object is not subscriptable")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ours, fail)
    with pytest.raises(TypeError) as raised:
        task(docker_server_url=fake.url).run(**{REQUIRED[task.__name__]: ID})
    assert raised.value is error
    assert raised.traceback[-1].name == "fail"


@pytest.mark.parametrize(("name", "argument"), REQUIRED.items())
def test_a_missing_argument_is_a_value_error(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture, name: str, argument: str
) -> None:
    with caplog.at_level(logging.DEBUG):
        for given in ({}, {argument: None}, {argument: ""}):
            with pytest.raises(ValueError, match=argument):
                getattr(tasks, name)(docker_server_url=fake.url).run(**given)
    assert fake.requests == []
    assert [record for record in caplog.records if record.name.startswith("prefect")] == []
