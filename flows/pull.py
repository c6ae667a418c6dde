"""A pull in the background: its progress, and whether its error is transient."""

import logging
import re
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import docker
import pendulum
import prefect
from docker.errors import APIError
from prefect.engine import signals

from flows.daemon import abbreviated, call_sdk, failure, registry_login, unavailable

PULL_RETRY_SECONDS = (3, 10, 30)  # the pauses before the retries of a pull
# Docker answers HTTP 200 before most errors come, so its words decide. Names, which may hold such words, go first.
_NAMES = r'"[^"]*"|\bfor \S+|\S*[/%@.:]\w\S*'
_OVERLOADED = r"(?i)(?<!\S)(429|50[0-4])\b|too ?many ?requests"  # transient, whatever else is said
_PERMANENT = (
    r"(?i)(?P<proxy>proxy authentication)|(?P<expired>denied.*expired|token[^:]*expired)|(?P<forbidden>forbidden)"
    r"|permission denied|denied by plugin|(?P<login>denied|unauthorized|authentication required|no basic auth|_scope)"
    r"|not found|(?:manifest|name) unknown|unknown blob|no matching manifest|no space left|x509|HTTP response to HTTPS"
)
_ADVICE = {
    "proxy": "give the login for the proxy in the daemon's HTTPS_PROXY",
    "login": "for a private image: `docker login`, or the Secret docker-sidecar on Kubernetes",
    "expired": "the login may have expired, as one for ECR does after 12 hours: get a fresh token",
}


class Pull(threading.Thread):
    """A pull in a thread, and what its events say. Any field of an event may be missing."""

    def __init__(
        self, client: docker.APIClient, options: dict[str, Any], logger: logging.Logger | None
    ) -> None:
        super().__init__(daemon=True)
        self.outcome, self.login_fault, self.heard = (
            "",
            "",
            time.monotonic(),
        )  # heard: when the last event came
        self.error: Any = None
        self._client, self._options, self._logger, self._context = (
            client,
            options,
            logger,
            prefect.context.copy(),
        )
        self._layers, self._received = (
            dict[str, str](),
            dict[Any, float](),
        )  # by id, the status and the bytes

    def run(self) -> None:
        """Pull, and add the events."""
        try:
            with prefect.context(
                self._context
            ):  # a thread has none: what it logs would not reach the run's logs
                if self._options.get("auth_config") is None:
                    self._options["auth_config"], self.login_fault = registry_login(
                        self._options["repository"]
                    )
                events = call_sdk(self._client.pull, stream=True, decode=True, **self._options)
                for event in events:
                    self.heard = time.monotonic()
                    with suppress(
                        AttributeError, KeyError, TypeError, ValueError
                    ):  # an event may have any shape
                        self._add(event)
        except Exception as error:
            self.error = error

    def _add(self, event: dict[str, Any]) -> None:
        if error := event.get("error") or event.get("errorDetail"):
            words = str(error.get("message") if isinstance(error, dict) else error)
            raise APIError(words, explanation=words)
        status, layer = event["status"], event.get("id")
        if self._logger:
            self._logger.debug(status)
        if status.startswith("Status: "):
            self.outcome = status[len("Status: ") :]
        elif layer and not status.startswith("Pulling from"):
            self._layers[layer] = status
        if status == "Downloading":
            self._received[layer] = float(event["progressDetail"]["current"])

    def __str__(self) -> str:
        layers = [
            f"{count} {status.lower()}"
            for status, count in Counter(list(self._layers.values())).items()
        ]
        return ", ".join([*layers, f"{sum(list(self._received.values())) / 1e6:.1f} MB received"])

    def signal(self, image: str, words: str) -> signals.PrefectStateSignal:
        """RETRY after a transient error; FAIL, with advice, after a permanent one or the last retry."""
        message, words = (
            f"Pulling {image}: {abbreviated(words, 300)}",
            re.sub(_NAMES, " ", words[-2000:]),
        )
        overloaded = re.search(_OVERLOADED, words)
        permanent = None if overloaded else re.search(_PERMANENT, words)
        kind, login = (permanent and permanent.lastgroup) or "", self._options.get("auth_config")
        if (login and kind in ("login", "forbidden")) or (
            kind == "forbidden" and ".dkr.ecr." in message
        ):
            kind = "expired"
        advice = filter(None, [_ADVICE.get(kind), self.login_fault if kind == "login" else ""])
        message += f" ({'; '.join(advice)})" if kind in _ADVICE else ""
        refused = (
            self.error.is_client_error()
            if isinstance(self.error, APIError)
            else not unavailable(self.error)
        )
        attempt = prefect.context.get("task_run_count", 1)
        if permanent or (refused and not overloaded) or attempt > len(PULL_RETRY_SECONDS):
            return failure(message)
        pause = PULL_RETRY_SECONDS[attempt - 1]
        retry = abbreviated(
            f"{message}; retry {attempt} of {len(PULL_RETRY_SECONDS)} in {pause} s", 600
        )
        return signals.RETRY(retry, start_time=pendulum.now("utc").add(seconds=pause))
