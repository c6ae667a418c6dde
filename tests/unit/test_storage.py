"""The flow's image: one that was not built is not pushed."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import prefect.storage
import pytest
from prefect import Flow

from flows.settings import PROJECT
from tests.support.background_server import BackgroundServer, QuietHandler

IMAGE = {"RepoTags": ["registry.example/app:1"]}


class Engine(BackgroundServer):
    """A Docker engine that has an image of the name already, and builds as a test says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"tcp://127.0.0.1:{self.server_port}"
        self.build: list[dict[str, Any]] = [{"stream": "Successfully built"}]
        self.requests: list[str] = []


class _Handler(QuietHandler):
    server: Engine
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.removeprefix("/v1.44")
        self.server.requests.append(f"{self.command} {path}")
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answers: dict[str, Any] = {
            "/version": [{"ApiVersion": "1.44"}],
            "/build": self.server.build,
            "/images/json": [[IMAGE]],
        }
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in answers.get(path, [{}]):
            line = json.dumps(event).encode() + b"\r\n"
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    do_POST = do_GET
    do_DELETE = do_GET


@pytest.fixture
def docker_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Engine]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    with Engine() as engine:
        yield engine


def register(engine: Engine, flow: Flow) -> None:
    """What `prefect register` does with a flow's storage."""
    storage: Any = flow.storage
    storage.base_url = engine.url
    storage.registry_url = "registry.example"
    storage.dockerfile = "Dockerfile"
    storage.add_flow(flow)
    storage.build()


def test_an_image_that_was_built_is_pushed(docker_engine: Engine, flow: Flow) -> None:
    register(docker_engine, flow)
    pushed = [each for each in docker_engine.requests if each.endswith("/push")]
    assert pushed == ["POST /images/registry.example/docker-on-k8s-flow/push"]


@pytest.mark.parametrize(
    "failure",
    [
        {"error": "The command '/bin/sh -c python healthcheck.py' returned a non-zero code: 1"},
        {"errorDetail": {"message": "no such file"}, "error": "no such file"},
    ],
)
def test_an_old_image_of_the_name_is_not_pushed_when_the_build_fails(
    docker_engine: Engine, flow: Flow, failure: dict[str, Any]
) -> None:
    docker_engine.build = [{"stream": "Step 1"}, failure]
    with pytest.raises(ValueError, match="was not built, nor pushed") as error:
        register(docker_engine, flow)
    assert failure["error"] in str(error.value)
    assert not [each for each in docker_engine.requests if "push" in each]


def test_a_broken_login_does_not_keep_from_registering(
    docker_engine: Engine, flow: Flow, tmp_path: Any
) -> None:
    (tmp_path / "config.json").write_text('{"auths": {"other.example": {"auth": "?"}}}')
    register(docker_engine, flow)
    assert [each for each in docker_engine.requests if each.endswith("/push")]


def test_the_storage_is_stored_as_prefects(flow: Flow) -> None:
    """The Agent of Prefect 1.4.1 reads it, and knows no storage of ours."""
    storage: Any = flow.storage
    stored = storage.serialize()
    assert stored["type"] == "Docker"
    plain = prefect.storage.Docker(
        registry_url=storage.registry_url,
        image_name=storage.image_name,
        image_tag=storage.image_tag,
        dockerfile=str(PROJECT / "Dockerfile"),
        stored_as_script=True,
        path=storage.path,
    )
    assert stored == plain.serialize()
    loaded = prefect.serialization.storage.StorageSchema().load(stored)
    assert type(loaded) is prefect.storage.Docker
