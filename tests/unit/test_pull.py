"""PullImage on a fake daemon: what an error means, which logins are sent, and what is logged."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pendulum
import prefect
import pytest
from docker.errors import APIError
from prefect import Flow
from prefect.engine import signals
from prefect.engine.state import Failed, Retrying

from flows.pull import CAUSES, EXPIRED, LOGIN, PROXY, cause_of, was_pulled
from flows.states import fail_with_cause
from flows.tasks import PullImage
from tests.support.fake_docker import FakeDocker
from tests.support.log_lines import lines, warning
from tests.support.waiting import wait_for

ECR = "0123.dkr.ecr.eu-west-1.amazonaws.com"
GET = 'Get "https://registry.example/v2/": '
HEAD = "unexpected status from HEAD request to https://r.example/v2/denied/manifests/not-found: "
RESOLVE = 'failed to resolve reference "registry.example/app:1": '

# Messages of real registries and daemons, under the cause that is the right one.
MESSAGES = {
    "no space on the daemon": [
        "failed to register layer: write /usr/lib/libLLVM.so: no space left on device",
        "failed to extract layer sha256:0f: mkdir /var/lib/x: disk quota exceeded: unknown",
    ],
    "too many requests": [
        # Docker Hub
        "toomanyrequests: You have reached your pull rate limit. You may increase the limit by "
        "authenticating and upgrading: https://www.docker.com/increase-rate-limit",
        "toomanyrequests: You have reached your unauthenticated pull rate limit.",
        "error from registry: You have reached your unauthenticated pull rate limit. "
        "https://www.docker.com/increase-rate-limit",
        f"{HEAD}429 Too Many Requests: denied: slow down",
        # ECR, GAR, Harbor's proxy cache, Artifactory
        "toomanyrequests: Rate exceeded",
        "toomanyrequests: Data limit exceeded",
        "toomanyrequests: Quota exceeded for quota metric 'Requests per project per region'",
        'unknown: http status code: 429, body: {"errors":[{"code":"DENIED"}]}',
        "error parsing HTTP 429 response body: invalid character 'T' looking for a value",
    ],
    "registry in trouble": [
        "received unexpected HTTP status: 500 Internal Server Error",
        "received unexpected HTTP status: 503 Service Unavailable: denied",
        f"{GET}received unexpected HTTP status: 502 Bad Gateway",
        "error parsing HTTP 504 response body: invalid character '<' looking for a value",
        f"{RESOLVE}unexpected status from HEAD request to https://r.example/v2/a: 500 Internal",
        "httpReadSeeker: failed open: unexpected status code https://r.example/v2/a: 503 Service",
        "received unexpected HTTP status: 520",  # Cloudflare
        "unknown: Remote Auto Blocked until 2024-08-13T07:45:05.681Z",  # Nexus
    ],
    "proxy": [
        f"{GET}Proxy Authentication Required",
        f"{GET}proxyconnect tcp: Proxy Authentication Required",
    ],
    "refused by the proxy": [f"{GET}Forbidden", f"{GET}proxyconnect tcp: Forbidden"],
    "no trust": [
        f"{GET}x509: certificate signed by unknown authority",
        f"{GET}tls: failed to verify certificate: x509: certificate is valid for a, not b",
        "failed to fetch anonymous token: tls: failed to verify certificate: x509: certificate "
        "has expired or is not yet valid",
        f"{GET}http: server gave HTTP response to HTTPS client",
        f"{GET}remote error: tls: handshake failure",
        f"{GET}remote error: tls: bad certificate",
        f"{GET}remote error: tls: certificate required",
        f"{GET}tls: first record does not look like a TLS handshake",
    ],
    "refused by a policy": [
        # Harbor, with 412
        "unknown: current image with 86 vulnerabilities cannot be pulled due to configured policy "
        "in 'Prevent images with vulnerability severity of \"Medium\" or higher from running.' To "
        "continue with pull, please contact your project administrator to exempt them",
        "unknown: current image without vulnerability scanning cannot be pulled due to configured "
        "policy in 'Prevent images with vulnerability severity'",
        *(
            f"unknown: current image with {number} vulnerabilities cannot be pulled due to "
            "configured policy in 'Prevent images'"
            for number in (429, 502, 521)
        ),
        f"{HEAD}412 Precondition Failed",
        "denied: The image is not signed by cosign",
        # Artifactory with Xray
        "unknown: Artifact download request rejected: app/manifest.json was not downloaded due to "
        "the download blocking policy configured in Xray for docker-local",
        "denied: manifest.json has been blocked by Xray",
        # ACR's firewall
        "denied: client with IP '20.1.2.3' is not allowed access, refer https://aka.ms/acr/"
        "firewall to grant access",
        # ECR and GAR: rights of the cloud
        "denied: User: arn:aws:sts::0123:assumed-role/node is not authorized to perform: "
        "ecr:BatchGetImage on resource: arn:aws:ecr:eu-west-1:0123:repository/app",
        "denied: Request is prohibited by organization's policy. vpcServiceControlsUniqueId: a",
        "denied: This API method requires billing to be enabled. Please enable billing on project",
        "denied: Artifact Registry API has not been used in project 123 before or it is disabled.",
        # Nexus's firewall, Docker's own
        "denied: REQUESTED ITEM IS QUARANTINED -- repository firewall",
        "authorization denied by plugin opa: no",
        f"{HEAD}451 Unavailable For Legal Reasons",
    ],
    "an image for others": [
        "no matching manifest for linux/arm64/v8 in the manifest list entries",
        "no matching manifest for windows/amd64 10.0.17763 in the manifest list entries",
        "operating system is not supported",
        'cannot download image with operating system "windows" when requesting "linux"',
        "image with reference app:1 was found but does not match the specified platform",
        "Docker Image Format v1 and Docker Image manifest version 2, schema 1 support is disabled",
        'not implemented: media type "application/vnd.docker.distribution.manifest.v1+prettyjws" '
        "is no longer supported since containerd v2.1, please rebuild the image",
        "invalid reference format: repository name (library/App) must be lowercase",
        "layers from manifest don't match image configuration",
    ],
    "login has expired": [
        "denied: Your authorization token has expired. Reauthenticate and try again.",
        f"{GET}denied: token for registry.example is expired",
        "error from registry: Token failed verification: expired",  # Artifactory
    ],
    "no such image, or no login": [
        "pull access denied for app, repository does not exist or may require 'docker login': "
        "denied: requested access to the resource is denied",
        f"{RESOLVE}pull access denied, repository does not exist or may require authorization: "
        "server message: insufficient_scope: authorization failed",
    ],
    "no login": [
        # Docker Hub
        f"{GET}unauthorized: incorrect username or password",
        "error from registry: incorrect username or password",
        "unauthorized: your account must log in with a Personal Access Token (PAT)",
        # ECR
        f"{GET}no basic auth credentials",
        # GAR and GCR
        'denied: Permission "artifactregistry.repositories.downloadArtifacts" denied on resource '
        '"projects/p/locations/us/repositories/r" (or it may not exist)',
        'denied: Unauthenticated request. Unauthenticated requests do not have permission "a.b"',
        "unauthorized: You don't have the needed permissions to perform this operation, and you "
        "may have invalid credentials.",
        # ACR
        "unauthorized: authentication required, visit https://aka.ms/acr/authorization for more",
        "unauthorized: Application not registered with AAD.",
        "unauthorized: Invalid clientid or client secret.",
        # GHCR
        'Head "https://ghcr.io/v2/o/app/manifests/1": denied',
        'Head "https://ghcr.io/v2/o/app/manifests/1": unauthorized',
        "denied: permission_denied: The token provided does not match expected scopes.",
        # Quay, Harbor, Artifactory, Nexus
        "unauthorized: access to the requested resource is not authorized",
        "unauthorized: Invalid Username or Password",
        "unauthorized: unauthorized to access repository: library/app, action: pull",
        "unknown: Authentication is required",
        "unknown: Props Authentication Token not found",
        "unknown: Bad props auth token: basictoken",
        f"{RESOLVE}failed to authorize: failed to fetch oauth token: unexpected status from POST "
        "request to https://auth.example/token: 401 Unauthorized",
    ],
    "forbidden": [
        f"{HEAD}403 Forbidden",
        "unknown: Forbidden",
        'error parsing HTTP 403 response body: unexpected end of JSON input: ""',
        f"{RESOLVE}failed to authorize: failed to fetch anonymous token: unexpected status: 403 "
        "Forbidden",
    ],
    "no such image": [
        "manifest for alpine:9 not found: manifest unknown: manifest unknown",
        f"{RESOLVE}registry.example/app:1: not found",
        "name unknown: The repository with name 'denied' does not exist in the registry with id "
        "'0123'",
        "name unknown: Repository 'app' not found",
        "manifest unknown: Failed to fetch 'unauthorized' from request",
        "manifest unknown: manifest tagged by '503' is not found",
        "unknown: artifact library/app:1 not found",
        "unknown: Tag 1 was deleted or has expired. To pull, revive via time machine",  # Quay
        "manifest unknown: The named manifest is not known to the registry.",
        "error parsing HTTP 404 response body: invalid character '<' looking for a value",
        "x" * 100_000 + " not found",
    ],
    "a broken image": [
        "error pulling image configuration: unknown blob",
        "blob unknown: blob unknown to registry",
    ],
    "the daemon may not": [
        "open /var/lib/docker/tmp/GetImageBlob1: permission denied",
        "failed to register layer: lchown /usr: invalid argument",
        "failed to register layer: operation not permitted",
    ],
    "refused": [
        f"{HEAD}400 Bad Request",
        "received unexpected HTTP status: 405 Method Not Allowed",
    ],
    "not reached": [
        f"{GET}dial tcp: lookup denied.example on 127.0.0.53:53: no such host",
        f"{GET}dial tcp: lookup r.example on 10.96.0.10:53: server misbehaving",
        f"{GET}dial tcp 34.194.164.123:443: i/o timeout",
        f"{GET}dial tcp 10.0.0.1:443: connect: connection refused",
        f"{GET}dial tcp 10.0.0.1:443: connect: no route to host",
        f"{GET}net/http: TLS handshake timeout",
        f"{GET}net/http: request canceled (Client.Timeout exceeded while awaiting headers)",
        f"{GET}context deadline exceeded",
        f"{GET}proxyconnect tcp: dial tcp 10.0.0.1:3128: connect: connection refused",
        f"{GET}EOF",
        "unexpected EOF",
        "short read: expected 412 bytes but got 0: unexpected EOF",
        "read tcp 10.1.1.1:5->1.2.3.4:443: read: connection reset by peer",
        "http2: server sent GOAWAY and closed the connection",
        "stream error: stream ID 1; INTERNAL_ERROR",
        "error pulling image configuration: download failed after attempts=6: dial tcp: lookup "
        "x.blob.core.windows.net: no such host",
    ],
    "unknown": [
        "filesystem layer verification failed for digest sha256:0f",
        "something that nobody has seen before",
    ],
}
RETRIED = {"too many requests", "registry in trouble", "not reached", "unknown"}
NOT_REACHED = {
    "registry in trouble",
    "proxy",
    "refused by the proxy",
    "no trust",
    "the pull hangs",
    "not reached",
}
ADVICE = {
    "proxy": (PROXY, PROXY),
    "login has expired": (EXPIRED, EXPIRED),
    "no such image, or no login": (LOGIN, EXPIRED),
    "no login": (LOGIN, EXPIRED),
    "forbidden": ("", EXPIRED),
}


@pytest.mark.parametrize(
    ("cause", "message"),
    [(cause, message) for cause, messages in MESSAGES.items() for message in messages],
    ids=lambda text: text[:60],
)
def test_dockers_words_name_the_cause(cause: str, message: str) -> None:
    assert cause_of(APIError(message, explanation=message), message).name == cause


def test_what_follows_from_each_cause() -> None:
    for cause in CAUSES:
        assert cause.transient == (cause.name in RETRIED), cause.name
        assert cause.reached == (cause.name not in NOT_REACHED), cause.name
        advice = cause.advice, cause.advice_with_login or cause.advice
        assert advice == ADVICE.get(cause.name, ("", "")), cause.name


def pull_failure(
    fake: FakeDocker, image: str, error: str, **options: Any
) -> signals.PrefectStateSignal:
    fake.pull = [{"errorDetail": {"message": error}, "error": error}]
    with pytest.raises(signals.PrefectStateSignal) as failure:
        PullImage(docker_server_url=fake.url).run(repository=image, **options)
    return failure.value


LOGIN_ENTRY = {"username": "u", "password": "p:1"}
AUTH = "dTpwOjE="  # the same


@pytest.mark.parametrize(
    ("image", "words", "state", "advice"),
    [
        ("r.example/denied:1", "received unexpected HTTP status: 503 Service", Retrying, ""),
        ("r.example/app:1", f"{HEAD}403 Forbidden", Failed, ""),
        (f"{ECR}/app:1", f"{HEAD}403 Forbidden", Failed, EXPIRED),
        ("with-login.example/app:1", f"{HEAD}403 Forbidden", Failed, EXPIRED),
        ("app:1", "unauthorized: authentication required", Failed, LOGIN),
        ("with-login.example/app:1", "unauthorized: no", Failed, EXPIRED),
        ("app:1", f"{GET}Proxy Authentication Required", Failed, PROXY),
        ("app:1", "denied: client with IP '1.2.3.4' is not allowed access", Failed, ""),
        ("app:1", "x" * 100_000 + " not found", Failed, ""),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_a_failed_pull_says_dockers_words_and_what_to_do(
    fake: FakeDocker, tmp_path: Path, image: str, words: str, state: type, advice: str
) -> None:
    auths = {"with-login.example": LOGIN_ENTRY}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    failure = pull_failure(fake, image, words)
    message = str(failure)
    assert type(failure.state) is state
    assert message.startswith(f"Pulling {image}: ")
    assert words[-100:] in message
    assert len(message) < 700
    assert [each for each in (LOGIN, EXPIRED, PROXY) if each in message] == [advice] * bool(advice)


def test_an_image_of_the_daemon_replaces_one_whose_registry_is_not_reached(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture
) -> None:
    fake.images = {"app:1"}
    fake.digests = ["app@sha256:0"]
    words = "dial tcp 10.0.0.1:443: connect: connection refused"
    fake.pull = [{"error": words}]
    assert PullImage(docker_server_url=fake.url).run(repository="app:1") == "app:1"
    assert "the image on the daemon is used" in warning(caplog)
    assert words in warning(caplog)


@pytest.mark.parametrize(
    "words",
    [
        "unknown: current image cannot be pulled due to configured policy in 'x'",
        "denied: REQUESTED ITEM IS QUARANTINED",
        "unauthorized: incorrect username or password",
        f"{HEAD}403 Forbidden",
        "pull access denied for app, repository does not exist or may require 'docker login'",
        "manifest unknown: manifest unknown",
        "toomanyrequests: Rate exceeded",
    ],
)
def test_what_a_registry_refuses_fails_though_the_daemon_has_the_image(
    fake: FakeDocker, words: str
) -> None:
    fake.images = {"app:1"}
    fake.digests = ["app@sha256:0"]
    assert words in str(pull_failure(fake, "app:1", words))


def test_what_a_policy_refuses_fails_though_an_image_of_its_name_was_made_on_the_daemon(
    fake: FakeDocker,
) -> None:
    fake.images = {"app:1"}
    words = "denied: REQUESTED ITEM IS QUARANTINED"
    assert words in str(pull_failure(fake, "app:1", words))


@pytest.mark.parametrize(
    "words",
    [
        "pull access denied for app, repository does not exist or may require 'docker login'",
        "manifest unknown: manifest unknown",
    ],
)
def test_an_image_that_was_made_on_the_daemon_needs_no_registry(
    fake: FakeDocker, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    fake.images = {"app:1"}
    fake.pull = [{"error": words}]
    assert PullImage(docker_server_url=fake.url).run(repository="app:1") == "app:1"
    assert words in warning(caplog)


@pytest.mark.parametrize(
    ("name", "digests", "pulled"),
    [
        ("app:1", ["app@sha256:0"], True),
        ("app", ["app@sha256:0"], True),
        ("index.docker.io/team/app:1", ["team/app@sha256:0"], True),
        ("r.example:5000/app", ["r.example:5000/app@sha256:0"], True),
        ("r.example:5000/app:1@sha256:0", ["r.example:5000/app@sha256:0"], True),
        ("app:1", ["r.example/app@sha256:0"], False),
        ("app:1", [], False),
        ("app:1", None, False),
    ],
)
def test_whether_an_image_was_pulled(name: str, digests: Any, pulled: bool) -> None:
    assert was_pulled({"RepoDigests": digests}, name) == pulled


@pytest.mark.parametrize(
    ("identity", "pulled"),
    [
        ({"Pull": [{"Repository": "docker.io/library/app"}]}, True),
        ({"Pull": [{"Repository": "registry.example/app"}]}, False),
        ({"Build": [{"Ref": "a"}]}, False),
        (None, False),
    ],
)
def test_whether_an_image_in_containerds_store_was_pulled(identity: Any, pulled: bool) -> None:
    """There, an image that was only tagged has a digest as well."""
    image = {"Descriptor": {"size": 1}, "RepoDigests": ["app@sha256:0"], "Identity": identity}
    assert was_pulled(image, "app:1") == pulled


def test_a_pull_for_another_platform_is_not_replaced(fake: FakeDocker) -> None:
    fake.images = {"app:1"}
    options = {"extra_docker_kwargs": {"platform": "linux/arm64"}}
    assert "unexpected EOF" in str(pull_failure(fake, "app:1", "unexpected EOF", **options))
    fake.pull = [{"error": "unexpected EOF"}]
    options = {"extra_docker_kwargs": {"platform": None}}
    assert PullImage(docker_server_url=fake.url).run(repository="app:1", **options) == "app:1"


def test_a_pull_that_hangs_is_given_up(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake.images = {"app:1"}
    monkeypatch.setattr("flows.tasks.PROGRESS_SECONDS", 0.1)
    monkeypatch.setattr("flows.tasks.PULL_SILENCE_SECONDS", 0.2)
    fake.pull = [fake.closing.wait]
    assert PullImage(docker_server_url=fake.url).run(repository="app:1") == "app:1"
    assert "the registry or the daemon hangs" in warning(caplog)
    assert "the image on the daemon is used" in warning(caplog)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ('{"credHelpers": {"registry.example": "not-there"}}', "docker-credential-not-there"),
        ('{"credsStore": "broken"}', "docker-credential-broken"),
        ("[]", "is no valid Docker configuration"),
        ('{"auths": 5}', "auths is a number"),
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


@pytest.mark.parametrize(
    ("entry", "sent"),
    [
        ({**LOGIN_ENTRY, "auth": ""}, LOGIN_ENTRY),
        ({"auth": f"{AUTH}\n"}, LOGIN_ENTRY),
        ({"auth": AUTH, "username": "other", "password": "other"}, LOGIN_ENTRY),
        ({"auth": AUTH, "identitytoken": ""}, LOGIN_ENTRY),
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
    auths = {"broken.example": entry, "registry.example": LOGIN_ENTRY}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    for registry in auths:
        caplog.clear()
        PullImage(docker_server_url=fake.url).run(repository=f"{registry}/app:1")
        assert "'broken.example'" in warning(caplog)
    logins = [json.loads(pull["login"]) for pull in fake.asked("POST /images/create")]
    assert ["username" in login for login in logins] == [False, True]


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
    options = {"auth_config": LOGIN_ENTRY}
    PullImage(docker_server_url=fake.url).run(
        repository="registry.example/app:1", extra_docker_kwargs=options
    )
    [pull] = fake.asked("POST /images/create")
    assert json.loads(pull["login"]) == LOGIN_ENTRY


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
