"""An HTTP server beside a test."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Server = TypeVar("Server", bound="BackgroundServer")


class BackgroundServer(ThreadingHTTPServer):
    """Answers requests in threads of its own as long as the `with` statement lasts."""

    daemon_threads = True
    block_on_close = False

    def __enter__(self: Server) -> Server:
        poll_interval = 0.02  # seconds that shutdown() may take
        threading.Thread(target=self.serve_forever, args=[poll_interval], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of an error, but not that a client has gone before its answer."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            super().handle_error(request, client_address)


class QuietHandler(BaseHTTPRequestHandler):
    """A handler that does not log its requests to stderr."""

    def log_message(self, format: str, *args: Any) -> None:
        pass
