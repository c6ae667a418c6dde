"""A pull in the background: its progress, and whether its error is transient."""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import docker
import pendulum
import prefect
from docker.errors import APIError
from docker.utils.config import find_config_file
from prefect.engine import signals

from flows.daemon import unreachable
from flows.parameters import abbreviated

PULL_RETRY_SECONDS = (3, 10, 30)  # the pauses before the retries of a pull
# Words of Docker 20.10 and 29, without the names of images, hosts and files around them. Transient ones win.
_NAMES = r'"[^"]*"|\bfor \S+|\S*[/%@.:]\w\S*'
_TRANSIENT = r"(?i)(?<!\S)(429|50[0-4])\b|too ?many ?requests|time(d )?out|connection (refused|reset)|\bEOF\b"
_DENIED = r"(?i)(?<!permission )denied|unauthorized|authentication required|basic auth|insufficient_scope"
_PERMANENT = (
    r"(?i)not found|(manifest|name) unknown|unknown blob|no matching manifest|forbidden|bad request|invalid reference"
    r"|unsupported|no space left|permission denied|x509|\btls: |HTTP response to HTTPS client"
)


class Pull(threading.Thread):
    """A pull in a thread, and what its events say. Any field of an event may be missing."""

    def __init__(self, client: docker.APIClient, options: dict[str, Any], log: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self.outcome = self.login_fault = ""
        self.error: Exception | None = None
        self.heard = time.monotonic()  # when the last event came
        self._client, self._options, self._log, self._context = client, options, log, prefect.context.copy()
        self._layers: dict[str, str] = {}  # id: status
        self._received: dict[str, float] = {}  # id: bytes

    def run(self) -> None:
        """Pull, and add the events."""
        try:
            with prefect.context(self._context):  # a thread has none: what it logs would not reach the run's logs
                for event in self._events():
                    self._add(event if isinstance(event, dict) else {})
        except Exception as error:
            self.error = error

    def _events(self) -> Any:
        """Pull with the login that Docker's configuration names, or without one if its credential helper fails."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the SDK's own, of a helper that is missing
                return self._client.pull(stream=True, decode=True, **self._options)
        except Exception as error:
            if isinstance(error, (APIError, OSError)) or "auth_config" in self._options:
                raise
            self.login_fault = f"no login was sent: {abbreviated(str(error), 200)}, see {find_config_file()!r}"
            return self._client.pull(stream=True, decode=True, auth_config={}, **self._options)

    def _add(self, event: dict[str, Any]) -> None:
        self.heard = time.monotonic()
        if error := event.get("error") or event.get("errorDetail"):
            words = str(error.get("message") if isinstance(error, dict) else error)
            raise APIError(words, explanation=words)
        status, layer = (value if isinstance(value := event.get(key), str) else "" for key in ("status", "id"))
        if status:
            self._log(status)
        if status.startswith("Status: "):
            self.outcome = status[len("Status: ") :]
        elif status and layer and not status.startswith("Pulling from"):
            self._layers[layer] = status
        if status == "Downloading" and isinstance(detail := event.get("progressDetail"), dict):
            current = detail.get("current")
            self._received[layer] = current if isinstance(current, (int, float)) else 0

    def __str__(self) -> str:
        layers = [f"{count} {status.lower()}" for status, count in Counter(list(self._layers.values())).items()]
        return ", ".join([*layers, f"{sum(list(self._received.values())) / 1e6:.1f} MB received"])

    def failure(self, message: str, error: Exception, words: str) -> signals.PrefectStateSignal:
        """RETRY after a transient error, FAIL after a permanent one or the last retry. Docker's ``words`` decide."""
        words = re.sub(_NAMES, " ", words[-2000:])
        transient, denied = re.search(_TRANSIENT, words), re.search(_DENIED, words)
        if denied and not transient:
            remedy = "for a private image: `docker login`, or the Secret docker-sidecar on Kubernetes"
            message += f" ({self.login_fault or remedy})"
        refused = error.is_client_error() if isinstance(error, APIError) else not unreachable(error)
        permanent = not transient and (refused or denied or re.search(_PERMANENT, words))
        attempt = prefect.context.get("task_run_count", 1)
        if permanent or attempt > len(PULL_RETRY_SECONDS):
            return signals.FAIL(message)
        pause = PULL_RETRY_SECONDS[attempt - 1]
        message += f"; retry {attempt} of {len(PULL_RETRY_SECONDS)} in {pause} s"
        return signals.RETRY(message, start_time=pendulum.now("utc").add(seconds=pause))
