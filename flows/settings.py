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

PROJECT = Path(__file__).resolve().parent.parent
JOB_TEMPLATES = PROJECT / "job_templates"

# Image names, a little wider than https://github.com/distribution/reference: Docker has the last word.
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

# For kubectl, null is as good as nothing. Prefect's Agent fails on it where it reads or fills in one of these.
_NEVER_NULL = ("metadata", "labels", "env", "resources", "requests", "limits")


class _Loader(yaml.SafeLoader):
    """YAML as kubectl reads it: a date, a time and a number of base 60 are text, and 0o644 is a number."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        is_text = kind is yaml.ScalarNode and (
            ":" in value or tag.endswith((":timestamp", ":value"))
        )
        return self.DEFAULT_SCALAR_TAG if is_text else tag


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("0o[0-7]+$"), ["0"])


class SettingsError(ValueError):
    """A setting that cannot be used; the message names the setting, what was read and what is allowed."""


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
        """Read the settings, by default the recipe's. Raises a SettingsError on a value that cannot be used."""
        values = {}
        for variable, (default, pattern, allowed) in _VARIABLES.items():
            value = values[variable[len("FLOW_") :].lower()] = environ.get(variable, default)
            if not re.fullmatch(pattern, value):
                raise SettingsError(
                    f"{variable} is {value!r}. Allowed: {allowed}. Not set, it is {default!r}."
                )
        labels = tuple(filter(None, map(str.strip, environ.get("FLOW_LABELS", "").split(","))))
        name = environ.get("JOB_TEMPLATE", "docker_sidecar")
        path = name if re.match("agent:///.|(s3|gcs|gs)://.", name) else None
        job = None if path else load_job_template(name)
        return cls(**values, job_template=job, job_template_path=path, labels=labels)


def load_job_template(name: str) -> dict[str, Any]:
    """Read a Job by its name in ``job_templates/`` or its path; raises SettingsError if the Agent would fail on it."""
    known = sorted(template.stem for template in JOB_TEMPLATES.glob("*.yaml"))
    path = JOB_TEMPLATES / f"{name}.yaml" if name in known else Path(name)
    try:
        return _job(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        allowed = f"a name in job_templates/ ({', '.join(known)}), a Job's path, or agent:///…, s3://…, gcs://…"
        raise SettingsError(
            f"JOB_TEMPLATE is {name!r}: {' '.join(str(error).split())}. Allowed: {allowed}."
        ) from None


def _job(text: str) -> dict[str, Any]:
    try:  # as JSON, which is what the Prefect API stores; of a StringIO, an error does not quote a line
        encoded = json.dumps(
            list(filter(None, yaml.load_all(io.StringIO(text), _Loader))), allow_nan=False
        )
        kept = lambda it: {
            name: it[name] for name in it if it[name] is not None or name not in _NEVER_NULL
        }  # noqa: E731
        documents = json.loads(encoded, object_hook=kept)
    except Exception as error:  # PyYAML and json raise errors of many types
        reason = re.sub(r"'(?!<)[^']{2,}'", "…", str(error))  # a value may be a secret
        hint = (
            "; it holds placeholders, {{ … }}, which must be filled in first"
            if "{{" in text
            else ""
        )
        raise ValueError(f"it is not YAML that Kubernetes takes ({reason}){hint}") from None
    job: dict[str, Any] = (
        documents[0] if len(documents) == 1 and isinstance(documents[0], dict) else {}
    )
    if (job.get("apiVersion"), job.get("kind")) != ("batch/v1", "Job"):
        raise ValueError(
            "it is not a Kubernetes Job (apiVersion: batch/v1, kind: Job), or more than one document"
        )
    try:  # what the Agent reads; the API server checks the rest
        _ = [
            variable["name"]
            for variable in job["spec"]["template"]["spec"]["containers"][0].get("env", [])
        ]
    except (AttributeError, LookupError, TypeError):
        raise ValueError(
            "the Agent needs spec.template.spec.containers[0], and a name in each item of env"
        ) from None
    return job
