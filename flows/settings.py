"""Settings of a deployment: environment variables, and the job template that one of them names."""

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.messages import without_passwords

PROJECT = Path(__file__).resolve().parent.parent
JOB_TEMPLATES = PROJECT / "job_templates"

# Image names, a little wider than https://github.com/distribution/reference, because Docker has the
# last word.
_REGISTRY = r"(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_NAME = "[a-z0-9]+(?:[._/-]+[a-z0-9]+)*"
_TAG = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
IMAGE = f"(?:{_REGISTRY}/)?{_NAME}(?::{_TAG})?(?:@sha[0-9]+:[0-9a-f]+)?"

_VARIABLES = {  # name: default, pattern, what is allowed
    "FLOW_REGISTRY_URL": (
        "gcr.io/dev/",
        f"{_REGISTRY}(?:/{_NAME})?/?",
        "a registry or a path, without a scheme",
    ),
    "FLOW_IMAGE_NAME": (
        "docker-on-k8s-flow",
        _NAME,
        "an image name in lower case, without registry or tag",
    ),
    "FLOW_IMAGE_TAG": (
        "0.1.0",
        _TAG,
        "up to 128 letters, digits, '_', '.' and '-', not starting with '.' or '-'",
    ),
    "FLOW_BASE_IMAGE": (
        "prefecthq/prefect:1.4.1-python3.10",
        IMAGE,
        "an image with Python 3.10 or 3.11",
    ),
}

# For kubectl, null is as good as nothing. Prefect's Agent fails on it where it reads or fills in
# one of these.
_NEVER_NULL = ("metadata", "labels", "env", "resources", "requests", "limits")


class _Loader(yaml.SafeLoader):
    """YAML as kubectl reads it.

    A date, a time and a number of base 60 are text, and 0o644 is a number.
    """

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        is_text = kind is yaml.ScalarNode and (
            ":" in value or tag.endswith((":timestamp", ":value"))
        )
        return self.DEFAULT_SCALAR_TAG if is_text else tag


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("0o[0-7]+$"), ["0"])


class SettingsError(ValueError):
    """A setting that cannot be used.

    The message names the setting, what was read and what is allowed.
    """


@dataclass(frozen=True)
class Settings:
    """Where the flow's image goes, what it is built from, and the Job that runs it."""

    registry_url: str  # with the path that the flow's image is pushed to
    image_name: str
    image_tag: str
    base_image: str  # which `Dockerfile` starts from
    job_template: Any  # a Job; the Agent fills in its first container
    job_template_path: Any = None  # in place of it: where the Agent reads it at each run
    labels: tuple[str, ...] = ()  # of the Agent that takes the flow's runs

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings, by default the recipe's.

        Raises a SettingsError on a value that cannot be used.
        """
        name = environ.get("JOB_TEMPLATE", "docker_sidecar")
        job = None
        path = None
        if re.match("agent:///.|(s3|gcs|gs)://.", name):
            path = name
        else:
            job = load_job_template(name)
        return cls(
            registry_url=_docker_hub_by_its_short_name(_variable("FLOW_REGISTRY_URL", environ)),
            image_name=_variable("FLOW_IMAGE_NAME", environ),
            image_tag=_variable("FLOW_IMAGE_TAG", environ),
            base_image=_variable("FLOW_BASE_IMAGE", environ),
            job_template=job,
            job_template_path=path,
            labels=_labels(environ.get("FLOW_LABELS", "")),
        )


def _variable(name: str, environ: Mapping[str, str]) -> str:
    """The value of a variable, or its default."""
    default, pattern, allowed = _VARIABLES[name]
    value = environ.get(name, default)
    if not re.fullmatch(pattern, value):
        shown = without_passwords(repr(value))
        raise SettingsError(f"{name} is {shown}. Allowed: {allowed}. Not set, it is {default!r}.")
    return value


def _labels(text: str) -> tuple[str, ...]:
    labels = [label.strip() for label in text.split(",")]
    return tuple(label for label in labels if label)


def _docker_hub_by_its_short_name(registry_url: str) -> str:
    """team/ in place of docker.io/team/.

    Prefect looks for the image that it has built by its name, and an engine before 2026 lists it by
    the short one.
    """
    registry, _, account = registry_url.partition("/")
    if registry not in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        return registry_url
    if not account:
        write = "with your account: docker.io/ACCOUNT/"
        raise SettingsError(f"FLOW_REGISTRY_URL is {registry_url!r}. Write it {write}")
    return account


def load_job_template(name: str) -> dict[str, Any]:
    """Read a Job by its name in ``job_templates/`` or by its path.

    Raises SettingsError, without a value of the file, if the Agent would fail on it.
    """
    known = sorted(template.stem for template in JOB_TEMPLATES.glob("*.yaml"))
    path = Path(name)
    if name in known:
        path = JOB_TEMPLATES / f"{name}.yaml"
    try:
        job: dict[str, Any] = _clean(_read(path.read_text(encoding="utf-8")))
        _check(job)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        names = ", ".join(known)
        allowed = (
            f"a name in job_templates/ ({names}), a Job's path, or agent:///…, s3://…, gcs://…"
        )
        raise SettingsError(f"JOB_TEMPLATE is {name!r}: {reason}. Allowed: {allowed}.") from None
    return job


def _read(text: str) -> Any:
    """Read YAML as kubectl does, into what JSON can hold: the Prefect API stores it as JSON."""
    try:
        # of a StringIO, an error does not quote a line
        documents = [each for each in yaml.load_all(io.StringIO(text), _Loader) if each]
        documents = json.loads(json.dumps(documents, allow_nan=False))
    except Exception as error:  # PyYAML and json raise errors of many types
        reason = re.sub(r"'(?!<)[^']{2,}'", "…", str(error))  # a value may be a secret
        hint = ""
        if "{{" in text:
            hint = "; it holds placeholders, {{ … }}, which must be filled in first"
        raise ValueError(f"it is not YAML that Kubernetes takes ({reason}){hint}") from None
    if len(documents) != 1:
        raise ValueError("it is not a Kubernetes Job, or more than one document")
    return documents[0]


def _clean(value: Any) -> Any:
    """Leave out what is null, where Prefect's Agent would fail on it."""
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if not isinstance(value, dict):
        return value
    cleaned = {}
    for name, inner in value.items():
        if inner is not None or name not in _NEVER_NULL:
            cleaned[name] = _clean(inner)
    return cleaned


def _check(job: Any) -> None:
    """Raise ValueError unless a template has what the Agent reads.

    The API server checks the rest.
    """
    if not isinstance(job, dict) or (job.get("apiVersion"), job.get("kind")) != ("batch/v1", "Job"):
        raise ValueError("it is not a Kubernetes Job (apiVersion: batch/v1, kind: Job)")
    needed = "the Agent needs spec.template.spec.containers[0], and a name in each item of env"
    try:
        variables = job["spec"]["template"]["spec"]["containers"][0].get("env", [])
        names = [variable["name"] for variable in variables]
    except (AttributeError, LookupError, TypeError):
        raise ValueError(needed) from None
    if None in names:
        raise ValueError(needed)
