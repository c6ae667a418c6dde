"""Docker's config.json: one broken entry costs that entry only, and the file is named at once."""

import json
import os
import time
from pathlib import Path
from typing import Any

import docker
import pytest

from flows.daemon import connect
from flows.docker_config import read_config, usable_login
from flows.tasks import PullImage, StartContainer
from tests.support.fake_docker import ID, FakeDocker
from tests.support.log_lines import lines, warning

SECRET = "hunter2"
AUTH = "dTpwOjE="  # u and p:1
ODD = [
    ("[]", "is no valid Docker configuration, and is not used (it is a list)"),
    ("5", "(it is a number)"),
    ("null", "(it is null)"),
    ("", "is no valid Docker configuration, and is not used (Expecting value"),
    ("{", "is no valid Docker configuration"),
    ('{"auths": 5}', "auths is a number, not a mapping, and is left out"),
    ('{"auths": {"r.example": 5}}', "auths['r.example'] is a number, not a login"),
    (f'{{"auths": {{"r.example": {{"auth": "{SECRET}"}}}}}}', "auths['r.example'] is a broken"),
    ('{"proxies": 5}', "proxies is a number, not a mapping"),
    (f'{{"proxies": {{"default": "{SECRET}"}}}}', "proxies['default'] is text, not a mapping"),
    ('{"proxies": {"default": {"httpProxy": 5}}}', "proxies['default'] is a number, not text"),
    ('{"proxies": {"default": {"http": "a"}}}', "proxies['default'] has a name that is none of"),
    ('{"HttpHeaders": {"X": 1}}', "HttpHeaders['X'] is a number, not text"),
    (f'{{"HttpHeaders": {{"X": "{SECRET}\\n"}}}}', "HttpHeaders['X'] is no valid header"),
    ('{"HttpHeaders": {"X": "\\u0444"}}', "HttpHeaders['X'] is no valid header"),
    ('{"HttpHeaders": {"X y:": "a"}}', "HttpHeaders['X y:'] is no valid header"),
    ('{"HttpHeaders": {"Content-Length": "9"}}', "['Content-Length'] is set by the Docker SDK"),
    ('{"HttpHeaders": {"host": "a"}}', "HttpHeaders['host'] is set by the Docker SDK itself"),
    ('{"HttpHeaders": []}', "HttpHeaders is a list, not a mapping"),
    ('{"credsStore": 5}', "credsStore is a number, not text"),
    ('{"credHelpers": ["a"]}', "credHelpers is a list, not a mapping"),
    ('{"credHelpers": {"r.example": {}}}', "credHelpers['r.example'] is a mapping, not text"),
]


def write(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)


@pytest.mark.parametrize(("content", "says"), ODD, ids=lambda text: text[:60])
def test_an_odd_file_is_named_and_keeps_no_flow_from_its_daemon(
    fake: FakeDocker, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, says: str
) -> None:
    write(tmp_path, content)
    started = time.monotonic()
    assert PullImage(docker_server_url=fake.url).run(repository="app:1") == "app:1"
    assert time.monotonic() - started < 5
    assert str(tmp_path / "config.json") in warning(caplog)
    assert says in warning(caplog)
    assert SECRET not in warning(caplog)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"auths": null, "proxies": null, "HttpHeaders": null, "credHelpers": null}',
        '{"proxies": {"default": null}}',
        '{"proxies": {"default": {"httpProxy": null}}}',
        f'{{"auths": {{"r.example": {{"auth": "{AUTH}"}}}}, "detachKeys": "ctrl-e,e"}}',
        '{"auths": {"r.example": {}}, "currentContext": "colima", "plugins": {"a": {"b": "c"}}}',
    ],
)
def test_a_usual_file_is_no_word_worth(
    fake: FakeDocker, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    write(tmp_path, content)
    assert PullImage(docker_server_url=fake.url).run(repository="app:1") == "app:1"
    StartContainer(docker_server_url=fake.url).run(container_id=ID)
    assert [line for line in lines(caplog) if "config.json" in line] == []


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    [fault] = read_config().faults
    assert fault.startswith(str(tmp_path / "config.json"))
    assert "Is a directory" in fault


def test_the_good_headers_and_proxies_of_an_odd_file_are_used(
    fake: FakeDocker, tmp_path: Path
) -> None:
    content = {
        "HttpHeaders": {"X-Good": "a", "X-Bad": 5},
        "proxies": {"default": {"httpProxy": "http://proxy.example:3128"}},
    }
    write(tmp_path, json.dumps(content))
    client: Any = connect(fake.url)
    assert client._general_configs["HttpHeaders"] == {"X-Good": "a"}
    assert client._proxy_configs.http == "http://proxy.example:3128"


def test_the_sdk_of_everybody_else_is_left_alone(fake: FakeDocker, tmp_path: Path) -> None:
    write(tmp_path, '{"auths": {"r.example": {"auth": "?"}}}')
    with pytest.raises(ValueError, match="unpack"):
        docker.APIClient(fake.url, version="1.44")


@pytest.mark.parametrize(
    "entry", [5, None, [], {"auth": ""}, {"auth": "?"}, {"auth": "dQ=="}, {"auth": 5}], ids=str
)
def test_a_login_that_is_none(entry: Any) -> None:
    with pytest.raises(ValueError, match="login"):
        usable_login("r.example", entry)


@pytest.mark.parametrize(
    "entry", [{"auth": AUTH}, {"auth": AUTH.rstrip("=")}, {"username": "u", "password": "p:1"}]
)
def test_a_login_as_docker_takes_it(entry: Any) -> None:
    login = usable_login("r.example", entry)
    username, password = docker.auth.decode_auth(login["auth"])
    assert (username, password) == ("u", "p:1")


HELPERS = [
    ("sleep 60 & sleep 60", {}, "docker-credential-ours did not answer within 0.5 s"),
    ("exit 3", {}, "docker-credential-ours failed with exit code 3"),
    (f"echo {SECRET}; exit 3", {}, "docker-credential-ours failed with exit code 3"),
    (f"echo {SECRET}", {}, "docker-credential-ours did not answer with a login"),
    ("echo []", {}, "docker-credential-ours did not answer with a login"),
    ("echo 'credentials not found in native keychain'; exit 1", {}, ""),
    ("""echo '{"Username":"","Secret":""}'""", {}, ""),
    ("""echo '{"Username":"u","Secret":"p"}'""", {"Username": "u", "Password": "p"}, ""),
    ("""echo '{"Username":"<token>","Secret":"t"}'""", {"IdentityToken": "t"}, ""),
    (
        """read it; echo "{\\"Username\\":\\"$it\\",\\"Secret\\":\\"p\\"}" """,
        {"Username": "r.example"},
        "",
    ),
]


@pytest.mark.parametrize(("script", "sent", "says"), HELPERS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("key", ["credsStore", "credHelpers"])
def test_a_credential_helper(
    fake: FakeDocker,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    key: str,
    script: str,
    sent: dict[str, str],
    says: str,
) -> None:
    """One that hangs is given up in time, and each that fails is named."""
    monkeypatch.setattr("flows.docker_config.HELPER_SECONDS", 0.5)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = tmp_path / "docker-credential-ours"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    helper = "ours" if key == "credsStore" else {"r.example": "ours"}
    write(tmp_path, json.dumps({key: helper}))
    started = time.monotonic()
    PullImage(docker_server_url=fake.url).run(repository="r.example/app:1")
    assert time.monotonic() - started < 10
    [pull] = fake.asked("POST /images/create")
    login = json.loads(pull["login"])
    assert login.items() >= sent.items()
    assert bool(login) == bool(sent)
    warned = "\n".join(line for line in lines(caplog) if "config.json" in line)
    assert says in warned
    assert bool(warned) == bool(says)
    assert SECRET not in caplog.text


def test_a_credential_helper_knows_docker_hub_by_an_old_address(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`docker login` without a registry stores the login under it."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = tmp_path / "docker-credential-ours"
    answer = '{\\"Username\\":\\"$it\\",\\"Secret\\":\\"p\\"}'
    program.write_text(f'#!/bin/sh\nread it; echo "{answer}"\n')
    program.chmod(0o755)
    write(tmp_path, json.dumps({"credsStore": "ours"}))
    PullImage(docker_server_url=fake.url).run(repository="app:1")
    [pull] = fake.asked("POST /images/create")
    assert json.loads(pull["login"])["Username"] == "https://index.docker.io/v1/"
