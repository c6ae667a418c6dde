"""A fake of the Docker daemon's HTTP API, for what a real daemon cannot be brought to do.

It has one container. A test says what the daemon answers: the events of a pull, the streams of output, the exit.
"""

import base64
import json
import struct
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ID = "c0ffee" * 10
Item = (
    bytes | Callable[[], Any]
)  # bytes to send, or something to do or to wait for before the next item


def frame(stream: int, data: bytes) -> bytes:
    """A frame of Docker's multiplexed stream."""
    return struct.pack(">BxxxL", stream, len(data)) + data


class FakeDocker(ThreadingHTTPServer):
    """Answers on a port of the loopback interface as long as the `with` statement lasts."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"tcp://127.0.0.1:{self.server_port}"
        self.requests: list[
            tuple[str, dict[str, str]]
        ] = []  # such as ("POST /images/create", {"tag": "1"})
        self.pull: Iterable[Any] = [
            {"status": "Status: Image is up to date for app:1"}
        ]  # events, or callables
        self.refusal: tuple[str, int] | None = None  # of a pull: words, and the status
        self.images: set[str] = set()  # that the daemon has
        self.streams: list[Iterable[Item]] = [
            []
        ]  # of output: the first request gets the first one, and so on
        self.version: tuple[dict[str, str], int] = {"ApiVersion": "1.44"}, 200
        self.end: Iterable[Item] = []  # of the output, when it is asked for without "follow"
        self.exited = threading.Event()
        self.exited.set()
        self.result = {"StatusCode": 0}  # of the wait
        self.gone = False  # whether the container has been removed
        self.closing = threading.Event()

    def __enter__(self) -> "FakeDocker":
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.exited.set()
        self.shutdown()
        self.server_close()

    def asked(self, what: str) -> list[dict[str, str]]:
        """The queries of all requests of a kind."""
        return [query for request, query in self.requests if request == what]


class _Handler(BaseHTTPRequestHandler):
    server: FakeDocker
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = url.path.replace("/v1.44", "").replace(f"/{ID}", "")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request, query = (
            f"{self.command} {path}",
            {key: value[0] for key, value in parse_qs(url.query).items()},
        )
        fake = self.server
        login = base64.urlsafe_b64decode(self.headers.get("X-Registry-Auth") or "").decode()
        gone = fake.gone and path.startswith("/containers")
        fake.requests.append((request, {**query, "body": body.decode(), "login": login}))
        if gone:
            self.json({"message": f"No such container: {ID}"}, 404)
        elif path == "/version":
            self.json(*fake.version)
        elif path.startswith("/images/") and path.endswith("/json"):
            name = unquote(path).removeprefix("/images/").removesuffix("/json")
            self.json(
                *(
                    ({"Id": "1"}, 200)
                    if name in fake.images
                    else ({"message": f"No such image: {name}"}, 404)
                )
            )
        elif path == "/images/create" and fake.refusal:
            self.json({"message": fake.refusal[0]}, fake.refusal[1])
        elif path == "/images/create":
            self.stream(
                item if callable(item) else json.dumps(item).encode() + b"\n" for item in fake.pull
            )
        elif path == "/containers/create":
            self.json({"Id": ID}, 201)
        elif path == "/containers/json":
            state = {"Running": not fake.exited.is_set(), "OOMKilled": False}
            self.json({"Config": {"Image": "app:1", "Tty": False}, "State": state})
        elif path == "/containers/wait":
            fake.exited.wait()
            self.json(fake.result)
        elif path == "/containers/logs" and query.get("follow") == "1":
            self.stream(fake.streams.pop(0) if fake.streams else [])
        elif path == "/containers/logs":
            self.stream(fake.end)
        elif path == "/containers/stop":
            fake.exited.set()
            self.json(None, 204)
        else:
            self.json(None, 204)

    do_GET = do_POST = answer

    def json(self, value: Any, status: int = 200) -> None:
        body = b"" if status == 204 else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, items: Iterable[Item]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for item in items:
            if callable(item):
                item()
            elif item:
                self.wfile.write(f"{len(item):x}\r\n".encode() + item + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass
