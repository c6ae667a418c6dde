"""What a deployment may change without touching the flow, read from environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parent.parent
JOB_TEMPLATES = PROJECT / "job_templates"

# The grammar of image names, https://github.com/distribution/reference/blob/main/reference.go
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = rf"{_COMPONENT}(?:/{_COMPONENT})*"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST = rf"(?:localhost|{_LABEL}(?:\.{_LABEL})+|{_LABEL}(?=:))(?::[0-9]+)?"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_IMAGE = rf"(?:{_HOST}/)?{_PATH}(?::{_TAG})?(?:@sha256:[0-9a-f]{{64}})?"


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it, what was read and what is allowed."""


def is_image(reference: str) -> bool:
    """Whether a string is an image reference: ``name``, ``name:tag``, ``name@sha256:…``, ``host:port/name``."""
    return re.fullmatch(_IMAGE, reference) is not None


@dataclass(frozen=True)
class Settings:
    """Where the flow's image goes, what it is built from, and the Job that runs it.

    Attributes:
        registry_url: registry and path that the flow's image is pushed to, ``gcr.io/dev/``.
        image_name: name of the flow's image within it.
        image_tag: tag of the flow's image.
        base_image: the image that ``Dockerfile`` starts from.
        job_template: the Kubernetes Job, as read from YAML, whose first container the Agent fills in.
    """

    registry_url: str
    image_name: str
    image_tag: str
    base_image: str
    job_template: dict[str, Any]

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the settings; what is not set has the recipe's value.

        Args:
            environ: the environment variables.

        Raises:
            SettingsError: on the first value that cannot be used.
        """

        def read(variable: str, default: str, pattern: str, allowed: str) -> str:
            value = environ.get(variable, default)
            if not re.fullmatch(pattern, value):
                raise SettingsError(f"{variable} is {value!r}. Allowed: {allowed}. Not set, it is {default!r}.")
            return value

        return cls(
            registry_url=read(
                "FLOW_REGISTRY_URL",
                "gcr.io/dev/",
                rf"{_HOST}(?:/{_PATH})?/?",
                "a registry and a path without a scheme, as in 'gcr.io/dev/' or 'localhost:5000/'",
            ),
            image_name=read(
                "FLOW_IMAGE_NAME",
                "docker-on-k8s-flow",
                _PATH,
                "an image name in lower case, without registry or tag",
            ),
            image_tag=read(
                "FLOW_IMAGE_TAG",
                "0.1.0",
                _TAG,
                "up to 128 letters, digits, '_', '.' and '-', not starting with '.' or '-'",
            ),
            base_image=read(
                "FLOW_BASE_IMAGE",
                "prefecthq/prefect:1.4.1-python3.10",
                _IMAGE,
                "an image with Python 3.9, 3.10 or 3.11, as in 'prefecthq/prefect:1.4.1-python3.10'",
            ),
            job_template=load_job_template(environ.get("JOB_TEMPLATE", "docker_sidecar")),
        )


def load_job_template(name: str) -> dict[str, Any]:
    """Read a Kubernetes Job from YAML and check what the Agent takes for granted.

    Args:
        name: the name of a file in ``job_templates/``, without ``.yaml``, or the path of another.

    Raises:
        SettingsError: if there is no such file, or it is not a Job whose first container is for the flow.
    """
    known = sorted(template.stem for template in JOB_TEMPLATES.glob("*.yaml"))
    path = JOB_TEMPLATES / f"{name}.yaml" if name in known else Path(name)

    def wrong(what: str) -> SettingsError:
        return SettingsError(
            f"JOB_TEMPLATE is {name!r}: {what}. "
            f"Allowed: a name in job_templates/ ({', '.join(known)}) or the path of a Kubernetes Job in YAML."
        )

    try:
        job = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise wrong(f"cannot read {str(path)!r} ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that is none
        raise wrong(f"{str(path)!r} is not YAML ({' '.join(str(error).split())})") from None

    if not isinstance(job, dict) or job.get("kind") != "Job" or job.get("apiVersion") != "batch/v1":
        raise wrong("it is not a Kubernetes Job (apiVersion: batch/v1, kind: Job)")
    try:
        first = job["spec"]["template"]["spec"]["containers"][0]
        privileged = (first.get("securityContext") or {}).get("privileged")
    except (AttributeError, KeyError, IndexError, TypeError):
        raise wrong("it has no containers (spec.template.spec.containers)") from None
    if privileged or "dind" in str(first.get("image")):
        raise wrong(
            f"its first container, {first.get('name')!r}, is the Docker daemon; "
            "the Agent fills in the first container to run the flow, so put that one first"
        )
    if empty := [key for part in (job, first) for key in ("metadata", "env", "resources") if part.get(key, 0) is None]:
        raise wrong(f"{empty[0]!r} is empty; leave it out, or the Agent fails on it")
    return job
