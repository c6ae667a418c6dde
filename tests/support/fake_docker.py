"""A fake of the Docker daemon's HTTP API, for what a real daemon cannot be brought to do.

It has one container. A test says what the daemon answers: the events of a pull, the streams of
output, the exit.
"""

import base64
import json
import struct
import threading
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.support.background_server import BackgroundServer, QuietHandler

ID = "c0ffee" * 10
# What a stream consists of: bytes to send, or a function to call before the next item.
Item = bytes | Callable[[], Any]


def frame(stream: int, data: bytes) -> bytes:
    """A frame of Docker's multiplexed stream."""
    return struct.pack(">BxxxL", stream, len(data)) + data


class FakeDocker(BackgroundServer):
    """Answers on a port of the loopback interface as long as the `with` statement lasts."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"tcp://127.0.0.1:{self.server_port}"
        # All that was asked, such as ("POST /images/create", {"tag": "1"}).
        self.requests: list[tuple[str, dict[str, str]]] = []
        # The answer to "GET /version", and its HTTP status.
        self.version: tuple[dict[str, str], int] = ({"ApiVersion": "1.44"}, 200)
        # The events of a pull, with functions to call between them.
        self.pull: Iterable[Any] = [{"status": "Status: Image is up to date for app:1"}]
        # The words and the HTTP status that a pull is refused with.
        self.refusal: tuple[str, int] | None = None
        # The images that the daemon has.
        self.images: set[str] = set()
        # The names by digest that the daemon has for them.
        self.digests: list[str] = []
        # The output: the first request that follows it gets the first stream, and so on.
        self.streams: list[Iterable[Item]] = [[]]
        # The end of the output, for those who do not follow it.
        self.end: Iterable[Item] = []
        # Clear while the container runs.
        self.exited = threading.Event()
        self.exited.set()
        # The answer to a wait, and the words with which a wait is refused.
        self.result: dict[str, Any] = {"StatusCode": 0}
        self.wait_refusal: str | None = None
        # Whether the container has been started.
        self.started = True
        # Whether a process of the container was killed because of the memory limit.
        self.out_of_memory = False
        # What an attach gets; None if it is not answered.
        self.attached: Iterable[Item] | None = []
        # Set when an attach has ended.
        self.detached = threading.Event()
        # Whether the container has been removed.
        self.gone = False
        # Set at the end of the `with` statement, so that no stream waits for longer.
        self.closing = threading.Event()

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.exited.set()
        super().__exit__(*error)

    def asked(self, what: str) -> list[dict[str, str]]:
        """The queries of all requests of a kind."""
        return [query for request, query in self.requests if request == what]


class _Handler(QuietHandler):
    server: FakeDocker
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = url.path.replace("/v1.44", "").replace(f"/{ID}", "")
        query = dict(parse_qsl(url.query))
        self.note(f"{self.command} {path}", query)
        if self.server.gone and path.startswith("/containers"):
            self.send_json({"message": f"No such container: {ID}"}, 404)
        elif path.startswith("/images/") and path.endswith("/json"):
            self.inspect_image(unquote(path).removeprefix("/images/").removesuffix("/json"))
        elif path == "/containers/logs":
            self.send_output(follow=query.get("follow") == "1")
        elif path in ANSWERS:
            ANSWERS[path](self)
        else:
            self.send_nothing()

    def note(self, request: str, query: dict[str, str]) -> None:
        """Let the test see the request, with its body and its login."""
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        login = base64.urlsafe_b64decode(self.headers.get("X-Registry-Auth") or "").decode()
        self.server.requests.append((request, {**query, "body": body, "login": login}))

    def tell_version(self) -> None:
        answer, status = self.server.version
        self.send_json(answer, status)

    def inspect_image(self, name: str) -> None:
        if name in self.server.images:
            self.send_json({"Id": "1", "RepoDigests": self.server.digests})
        else:
            self.send_json({"message": f"No such image: {name}"}, 404)

    def pull_image(self) -> None:
        if self.server.refusal:
            words, status = self.server.refusal
            self.send_json({"message": words}, status)
        else:
            self.send_stream(_as_item(event) for event in self.server.pull)

    def create_container(self) -> None:
        self.send_json({"Id": ID}, 201)

    def inspect_container(self) -> None:
        status = "running"
        if self.server.exited.is_set():
            status = "exited"
        if not self.server.started:
            status = "created"
        state = {"Status": status, "OOMKilled": self.server.out_of_memory}
        self.send_json({"Config": {"Image": "app:1", "Tty": False}, "State": state})

    def wait_for_exit(self) -> None:
        if self.server.wait_refusal:
            self.send_json({"message": self.server.wait_refusal}, 400)
            return
        self.server.exited.wait()
        self.send_json(self.server.result)

    def attach(self) -> None:
        """Output without chunks: it ends with the connection."""
        if self.server.attached is None:
            self.server.closing.wait()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/vnd.docker.raw-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for item in self.server.attached:
                if callable(item):
                    item()
                else:
                    self.wfile.write(item)
        finally:
            self.server.detached.set()

    def stop_container(self) -> None:
        self.server.exited.set()
        self.send_nothing()

    def send_output(self, follow: bool) -> None:
        if not follow:
            self.send_stream(self.server.end)
        elif self.server.streams:
            self.send_stream(self.server.streams.pop(0))
        else:
            self.send_stream([])

    def send_json(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_nothing(self) -> None:
        self.send_response(204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_stream(self, items: Iterable[Item]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for item in items:
            if callable(item):
                item()
            elif item:
                self.wfile.write(f"{len(item):x}\r\n".encode() + item + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


def _as_item(event: Any) -> Item:
    """An event of a pull as a line of JSON; a function as it is."""
    if callable(event):
        return event  # type: ignore[no-any-return]
    return json.dumps(event).encode() + b"\n"


# What is answered by the path alone.
ANSWERS: dict[str, Callable[[_Handler], None]] = {
    "/version": _Handler.tell_version,
    "/images/create": _Handler.pull_image,
    "/containers/create": _Handler.create_container,
    "/containers/json": _Handler.inspect_container,
    "/containers/wait": _Handler.wait_for_exit,
    "/containers/attach": _Handler.attach,
    "/containers/stop": _Handler.stop_container,
}
