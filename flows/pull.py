"""A pull in the background: its progress, and what its error means."""

import logging
import re
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import docker
import pendulum
import prefect
from docker.errors import APIError
from prefect.engine import signals

from flows.daemon import call_sdk, failure, unavailable
from flows.messages import abbreviated

PULL_RETRY_SECONDS = (3, 10, 30)  # the pauses before the retries of a pull
LOGIN = "for a private image: `docker login`, or the Secret docker-sidecar on Kubernetes"
EXPIRED = "the login may have expired, as one for ECR does after 12 hours: get a fresh token"
PROXY = "give the login for the proxy in the daemon's HTTPS_PROXY"


@dataclass(frozen=True)
class Cause:
    """Why a pull failed, by words that are found in Docker's message."""

    name: str
    words: str  # a regular expression, whatever the case
    transient: bool = False  # worth a retry
    reached: bool = True  # the registry has answered, so that no other image may replace its own
    advice: str = ""
    advice_with_login: str = ""  # if a login was sent


_STATUS = r"\b(http|status|code|request to|anonymous token):?\s+"  # and a number of three digits

# Docker answers HTTP 200 before most errors come, so its words decide. The table is read from top
# to bottom, and the first cause whose words are found is the one.
CAUSES = (
    Cause("no space on the daemon", r"no space left|disk quota exceeded"),
    Cause(
        "too many requests",
        r"too ?many ?requests?|rate limit|rate exceeded|quota exceeded|data limit exceeded"
        rf"|{_STATUS}429\b",
        transient=True,
    ),
    Cause(
        "registry in trouble",
        rf"{_STATUS}5\d\d\b|internal server error"
        r"|bad gateway|service unavailable|gateway time-?out|remote auto blocked",
        transient=True,
        reached=False,
    ),
    Cause("proxy", r"proxy authentication|\s407\s", reached=False, advice=PROXY),
    Cause(  # to a CONNECT: what a registry refuses has its status, or its own words
        "refused by the proxy",
        r"^(get|head)\s+:\s+(proxyconnect \S+\s+)?forbidden$",
        reached=False,
    ),
    Cause(
        "no trust",
        r"x509|HTTP response to HTTPS client|handshake failure|bad certificate"
        r"|certificate required|not look like a TLS",
        reached=False,
    ),
    Cause(
        "refused by a policy",
        r"configured policy|by policy|'s policy|blocking policy|blocked by|has been blocked"
        r"|quarantin|xray|by plugin|not signed|not allowed access|not authorized to perform"
        r"|has not been used|requires billing|precondition failed|legal reasons|administrator",
    ),
    Cause(
        "an image for others",
        r"no matching manifest|operating system|platform|schema ?1|media ?type|prettyjws"
        r"|invalid reference|must be lower ?case|signature key|match image config",
    ),
    Cause("login has expired", r"token\b.* expired|denied.* expired", advice=EXPIRED),
    Cause(  # Docker Hub does not say which one
        "no such image, or no login",
        r"repository does not exist or may require",
        advice=LOGIN,
        advice_with_login=EXPIRED,
    ),
    Cause(
        "no login",
        r"(?<!permission )denied|unauthori[sz]ed|unauthenticated|authentication (is )?required"
        r"|no basic auth|credentials|_scope|not authorized|have permission"
        r"|(wrong|invalid|incorrect) username|\bauth token|authentication token"
        rf"|{_STATUS}401\b",
        advice=LOGIN,
        advice_with_login=EXPIRED,
    ),
    Cause("forbidden", rf"forbidden|{_STATUS}403\b", advice_with_login=EXPIRED),
    Cause(
        "no such image",
        r"not found|(manifest|name) unknown|unknown manifest|does not exist"
        rf"|deleted or has expired|{_STATUS}404\b",
    ),
    Cause("a broken image", r"unknown blob|blob unknown"),
    Cause("the daemon may not", r"permission denied|not permitted|invalid argument|read-only file"),
    Cause("refused", rf"{_STATUS}4(?!08|25)\d\d\b"),
    Cause("the pull hangs", r"registry or the daemon hangs", reached=False),
    Cause(
        "not reached",
        r"no such host|misbehaving|lookup|dial tcp|refused|no route|unreachable|reset by peer"
        r"|time-?d? ?out|deadline|cancell?ed|broken pipe|EOF|proxyconnect|tls:|goaway|stream error"
        r"|connection",
        transient=True,
        reached=False,
    ),
)
UNKNOWN = Cause("unknown", "", transient=True)
REFUSED_BY_DAEMON = Cause("refused by the daemon", "")
DAEMON_LOST = Cause("the daemon does not answer", "", transient=True, reached=False)
NOT_HERE = ("no such image", "no such image, or no login")

# What may be a name, and hold such words: quoted text, "for NAME", and words with / % @ . : inside.
_NAMES = re.compile(r"\"[^\"]*\"|(?<!\w)'[^']*'(?!\w)|\bfor \S+|\S*[/%@.:]\w\S*")


def cause_of(error: Exception, message: str) -> Cause:
    """Why a pull failed, by its error and by Docker's words."""
    if unavailable(error):
        return DAEMON_LOST
    words = _NAMES.sub(" ", message[-2000:])
    for cause in CAUSES:
        if re.search(cause.words, words, re.IGNORECASE):
            return cause
    if isinstance(error, APIError) and not error.is_client_error():
        return UNKNOWN
    return REFUSED_BY_DAEMON


def was_pulled(image: dict[str, Any], name: str) -> bool:
    """Whether an image of the daemon came from the registry of its name, by what Docker says.

    In containerd's store, every tag has a digest, and only the identity says where an image is
    from. Without one, the image counts as made on the daemon.
    """
    repository = name.partition("@")[0]
    if ":" in repository.rpartition("/")[2]:
        repository = repository.rpartition(":")[0]
    if image.get("Descriptor"):
        pulls = (image.get("Identity") or {}).get("Pull") or []
        sources = [str(pull.get("Repository")) for pull in pulls]
    else:
        sources = [digest.partition("@")[0] for digest in image.get("RepoDigests") or []]
    return _short(repository) in [_short(source) for source in sources]


def _short(repository: str) -> str:
    """app in place of docker.io/library/app."""
    for registry in ("index.docker.io/", "docker.io/"):
        repository = repository.removeprefix(registry)
    return repository.removeprefix("library/")


def pull_signal(
    image: str, message: str, cause: Cause, login_sent: bool, config_faults: list[str]
) -> signals.PrefectStateSignal:
    """RETRY after a transient error; FAIL, with advice, after a permanent one or the last retry."""
    advice = cause.advice
    if login_sent or (cause.name == "forbidden" and ".dkr.ecr." in image):
        advice = cause.advice_with_login or cause.advice
    text = f"Pulling {image}: {abbreviated(message, 300)}"
    if advice == LOGIN:
        advice = "; ".join([LOGIN, *config_faults])
    if advice:
        text += f" ({advice})"
    attempt = prefect.context.get("task_run_count", 1)
    if not cause.transient or attempt > len(PULL_RETRY_SECONDS):
        return failure(text)
    pause = PULL_RETRY_SECONDS[attempt - 1]
    text += f"; retry {attempt} of {len(PULL_RETRY_SECONDS)} in {pause} s"
    start_time = pendulum.now("utc").add(seconds=pause)
    return signals.RETRY(abbreviated(text, 600), start_time=start_time)


class Pull(threading.Thread):
    """A pull in a thread, and what its events say. Any field of an event may be missing."""

    def __init__(
        self, client: docker.APIClient, options: dict[str, Any], logger: logging.Logger | None
    ) -> None:
        super().__init__(daemon=True)
        self.outcome = ""  # Docker's last words, such as "Image is up to date for alpine:3"
        self.error: Any = None
        self.heard = time.monotonic()  # when the last event came
        self._client = client
        self._options = options
        self._logger = logger
        self._context = prefect.context.copy()
        self._layers: dict[str, str] = {}  # the status of each, by its id
        self._received: dict[str, float] = {}  # the bytes of each

    def run(self) -> None:
        """Pull, and add the events."""
        try:
            # a thread has no context, and what it logs would not reach the run's logs
            with prefect.context(self._context):
                events = call_sdk(self._client.pull, stream=True, decode=True, **self._options)
                for event in events:
                    self.heard = time.monotonic()
                    self._add(event)
        except Exception as error:
            self.error = error

    def _add(self, event: dict[str, Any]) -> None:
        with suppress(AttributeError, KeyError, TypeError, ValueError):  # of any shape
            self._raise_error(event)
            self._add_status(event)

    def _raise_error(self, event: dict[str, Any]) -> None:
        error = event.get("error") or event.get("errorDetail")
        if not error:
            return
        words = error
        if isinstance(error, dict):
            words = error.get("message")
        raise APIError(str(words), explanation=str(words))

    def _add_status(self, event: dict[str, Any]) -> None:
        status = event["status"]
        layer = event.get("id")
        if self._logger:
            self._logger.debug(status)
        if status.startswith("Status: "):
            self.outcome = status.removeprefix("Status: ")
        elif layer and not status.startswith("Pulling from"):
            self._layers[layer] = status
        if status == "Downloading":
            self._received[str(layer)] = float(event["progressDetail"]["current"])

    def __str__(self) -> str:
        """How far the pull is, such as "1 downloading, 2 pull complete, 5.3 MB received"."""
        statuses = Counter(list(self._layers.values()))  # a copy: the thread goes on
        parts = [f"{count} {status.lower()}" for status, count in statuses.items()]
        megabytes = sum(list(self._received.values())) / 1e6
        parts.append(f"{megabytes:.1f} MB received")
        return ", ".join(parts)
