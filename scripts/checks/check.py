"""What a check of `make preflight` is, what it may find, and what the checks know of the setup."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flows.settings import Settings
from scripts.checks.kubernetes_api import KubernetesAPI


class Finding(Exception):
    """What a check found in place of "fine", and what to do."""

    outcome = ""

    def __init__(self, seen: str, remedy: str = "") -> None:
        super().__init__(seen)
        self.remedy = remedy


class CheckFailed(Finding):
    """What keeps the flow from running."""

    outcome = "wrong"


class Unsure(Finding):
    """What preflight cannot know."""

    outcome = "unsure"


class Forbidden(Finding):
    """What the user of preflight may not do, or may not look at."""

    outcome = "forbidden"


@dataclass
class Setup:
    """What is checked, and what earlier checks have found."""

    namespace: str
    account: str  # of the Agent
    project: str
    settings: Settings = field(init=False)
    api: KubernetesAPI = field(init=False)
    pod: Any = None  # the template of the run's pod, as the Agent fills it in

    @property
    def agent(self) -> str:
        """The Agent's name as a user of Kubernetes."""
        return f"system:serviceaccount:{self.namespace}:{self.account}"


@dataclass(frozen=True)
class Check:
    """One line of preflight.

    Attributes:
        name: what is checked.
        look: returns what is fine, or raises; a Finding says what it found.
        needs: names of checks without whose result this one cannot look.
        remedy: what to do if it is wrong. {namespace} and {account} are filled in.
    """

    name: str
    look: Callable[[Setup], str]
    needs: tuple[str, ...] = ()
    remedy: str = ""
