"""What a cluster has changed of a pod that was asked for, such as a webhook that drops a field.

A cluster may change where a pod runs, the names of images, and what it requests. What is asked for
otherwise must be in the answer, and some fields must not be added to it.
"""

import json
from collections.abc import Iterator
from typing import Any

from kubernetes.utils.quantity import parse_quantity

MAY_CHANGE = ("image", "imagePullPolicy", "resources")
# What breaks a run if it is added to a container of the run, or to its pod.
MAY_NOT_BE_ADDED = (
    "activeDeadlineSeconds",
    "allowPrivilegeEscalation",
    "args",
    "capabilities",
    "command",
    "hostIPC",
    "hostNetwork",
    "hostPID",
    "lifecycle",
    "livenessProbe",
    "privileged",
    "readOnlyRootFilesystem",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "runtimeClassName",
    "shareProcessNamespace",
    "startupProbe",
)
IDENTITIES = ("mountPath", "name")  # which of a list's items is the same one


def changes_of_pod(asked: Any, answer: Any) -> list[str]:
    """What breaks a run, of what the API server made of a pod's spec."""
    found = list(_changes("spec", asked, answer))
    ours = [container["name"] for container in asked["containers"]]
    theirs = [container["name"] for container in answer["containers"]]
    for name in theirs:
        if name not in ours:
            found.append(f"the container {name} was added, and the pod ends only when it ends")
    kept = [name for name in theirs if name in ours]
    if kept != ours and sorted(kept) == sorted(ours):
        found.append(f"the order of the containers was changed to {', '.join(theirs)}")
    elif theirs[0] != ours[0]:
        found.append(f"the first container is {theirs[0]}, not {ours[0]}")
    return found


def changes_of_job(asked: Any, answer: Any) -> list[str]:
    """What breaks a run, of what the API server made of a Job's spec, but for its pod."""
    own = {name: value for name, value in asked.items() if name != "template"}
    return list(_changes("spec", own, answer))


def _changes(path: str, asked: Any, answer: Any) -> Iterator[str]:
    """Where an answer lacks what was asked. Values are not shown: they may be secrets."""
    if isinstance(asked, dict) and asked:
        yield from _changes_of_mapping(path, asked, answer)
    elif isinstance(asked, list) and asked:
        yield from _changes_of_list(path, asked, answer)
    elif asked in ("", None, []):
        return  # the API server fills it in, or leaves it out
    elif asked == {} and isinstance(answer, dict):
        return
    elif answer is None and asked is not False:
        yield f"{path} was taken away"
    elif not _same(asked, answer):
        yield f"{path} was changed"


def _changes_of_mapping(path: str, asked: Any, answer: Any) -> Iterator[str]:
    if not isinstance(answer, dict):
        yield f"{path} was taken away"
        return
    for name, value in asked.items():
        if name not in MAY_CHANGE:
            yield from _changes(f"{path}.{name}", value, answer.get(name))
    for name in MAY_NOT_BE_ADDED:
        if name not in asked and answer.get(name):
            yield f"{path}.{name} was added"
    if "securityContext" in answer and "securityContext" not in asked:
        added = answer["securityContext"] or {}
        yield from _changes_of_mapping(f"{path}.securityContext", {}, added)


def _changes_of_list(path: str, asked: Any, answer: Any) -> Iterator[str]:
    answer = answer or []
    if not isinstance(asked[0], dict):
        if asked != answer:
            yield f"{path} was changed"
        return
    for item in asked:
        yield from _changes_of_item(path, item, answer)


def _changes_of_item(path: str, item: Any, answer: list[Any]) -> Iterator[str]:
    """What was changed of one item of a list, wherever it is now."""
    identity = _identity(item)
    if identity is None:
        if not any(not list(_changes("", item, other)) for other in answer):
            yield f"an item of {path} was changed or taken away"
        return
    same = [other for other in answer if _identity(other) == identity]
    if same:  # of several of one name the last one counts, as in env
        yield from _changes(f"{path}[{identity}]", item, same[-1])
    else:
        yield f"{path}[{identity}] was taken away"


def _identity(item: Any) -> str | None:
    for name in IDENTITIES:
        if name in item:
            return str(item[name])
    return None


def _same(asked: Any, answer: Any) -> bool:
    """Whether two values are the same to Kubernetes: 1024Mi is 1Gi, and false may be left out."""
    if asked == answer or (asked is False and answer is None):
        return True
    try:
        return bool(parse_quantity(asked) == parse_quantity(answer))  # type: ignore[no-untyped-call]
    except (TypeError, ValueError):
        return json.dumps(asked) == json.dumps(answer)
