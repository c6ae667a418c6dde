"""Settings of a deployment: environment variables, and the job template that one of them names."""

from __future__ import annotations

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
_WORD = "[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_NAME = f"{_WORD}(?:/{_WORD})*"
_TAG = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_IMAGE = f"(?:{_REGISTRY}/)?{_NAME}(?::{_TAG})?(?:@sha[0-9]+:[0-9a-f]{{64,}})?"

_VARIABLES = {  # name: default, pattern, what is allowed
    "FLOW_REGISTRY_URL": ("gcr.io/dev/", f"{_REGISTRY}(?:/{_NAME})?/?", "a registry or a path, without a scheme"),
    "FLOW_IMAGE_NAME": ("docker-on-k8s-flow", _NAME, "an image name in lower case, without registry or tag"),
    "FLOW_IMAGE_TAG": ("0.1.0", _TAG, "up to 128 letters, digits, '_', '.' and '-', not starting with '.' or '-'"),
    "FLOW_BASE_IMAGE": ("prefecthq/prefect:1.4.1-python3.10", _IMAGE, "an image with Python 3.9, 3.10 or 3.11"),
}

# What the Agent needs of a Job and of its first container, see generate_job_spec() in Prefect 1.4.1's agent.py.
# A field with a question mark may be missing. The API server checks the rest: `make preflight`.
_METADATA = {"name?": str, "labels?": dict}
_JOB = {"metadata?": _METADATA, "spec": {"template": {"metadata?": _METADATA, "spec": {"containers": list}}}}
_FLOW = {"name": str, "env?": [{"name": str}], "resources?": {"requests?": dict, "limits?": dict}}
_TYPES = {dict: "a mapping", list: "a list", str: "a string", type(None): "missing or empty"}

# The script of `sh -c`, in words that "\0" separates: a shell, its options, and the script unless it is missing.
_SCRIPT = re.compile(r"(?:^|[/\0])(?:ba|da|a)?sh(?:\0-[^\0]+|\0pipefail)*?\0-\w*c(?:\0([^\0]*)|$)")


class SettingsError(ValueError):
    """A setting that cannot be used; the message names the setting, what was read and what is allowed."""


def is_image(reference: str) -> bool:
    """Whether a string looks like an image reference: ``name``, ``name:tag``, ``host:port/name@sha256:…``."""
    return re.fullmatch(_IMAGE, reference) is not None


@dataclass(frozen=True)
class Settings:
    """Where the flow's image goes, what it is built from, and the Job that runs it.

    Attributes:
        registry_url: registry and path that the flow's image is pushed to, ``gcr.io/dev/``.
        image_name: name of the flow's image within it.
        image_tag: tag of the flow's image.
        base_image: the image that ``Dockerfile`` starts from.
        job_template: the Kubernetes Job whose first container the Agent fills in.
    """

    registry_url: str
    image_name: str
    image_tag: str
    base_image: str
    job_template: dict[str, Any]

    @property
    def image(self) -> str:
        """The full reference of the flow's image."""
        return f"{self.registry_url.rstrip('/')}/{self.image_name}:{self.image_tag}"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the settings; a variable that is not set has the recipe's value.

        Raises:
            SettingsError: on the first value that cannot be used.
        """
        values = {}
        for variable, (default, pattern, allowed) in _VARIABLES.items():
            value = values[variable[len("FLOW_") :].lower()] = environ.get(variable, default)
            if not re.fullmatch(pattern, value):
                raise SettingsError(f"{variable} is {value!r}. Allowed: {allowed}. Not set, it is {default!r}.")
        return cls(job_template=load_job_template(environ.get("JOB_TEMPLATE", "docker_sidecar")), **values)


def load_job_template(name: str) -> dict[str, Any]:
    """Read a Kubernetes Job from YAML, and refuse what the Agent would fail on.

    Args:
        name: the name of a file in ``job_templates/``, without ``.yaml``, or the path of another.

    Raises:
        SettingsError: if there is no such file, or if it is not a Job whose first container the Agent can fill in.

    Example:
        >>> flow.run_config = KubernetesRun(job_template=load_job_template("native_sidecar"))
    """
    known = sorted(template.stem for template in JOB_TEMPLATES.glob("*.yaml"))
    path = JOB_TEMPLATES / f"{name}.yaml" if name in known else Path(name)
    try:
        job = _parse(path.read_text(encoding="utf-8"))
        _check_fields(job, _JOB)
        containers, where = job["spec"]["template"]["spec"]["containers"], "spec.template.spec.containers[0]"
        _check_fields(containers[0] if containers else None, _FLOW, where)
        script = _SCRIPT.search("\0".join(map(str, containers[0].get("command") or [])))
        if script and not re.search(r"\$\{?[@*1]|flow-run", script[1] or ""):
            fault = "starts a shell that would not run 'prefect execute flow-run', which the Agent puts in args"
            raise ValueError(f"{where}.command {fault}; write [sh, -c, 'exec \"$@\"', flow]")
    except (OSError, ValueError) as error:
        allowed = f"a name in job_templates/ ({', '.join(known)}) or the path of a Kubernetes Job in YAML"
        raise SettingsError(f"JOB_TEMPLATE is {name!r}: {' '.join(str(error).split())}. Allowed: {allowed}.") from None
    return job


class _Loader(yaml.SafeLoader):
    """YAML as kubectl reads it: a date is a string."""


_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def _parse(text: str) -> dict[str, Any]:
    """The Job in a YAML text; anything else is a ValueError."""
    hint = "; it holds placeholders, {{ … }}, which must be filled in first" if "{{" in text else ""
    try:
        documents = [document for document in yaml.load_all(io.StringIO(text), _Loader) if document is not None]
        documents = json.loads(json.dumps(documents, allow_nan=False))  # the Prefect API stores JSON
    except Exception as error:  # PyYAML and json raise errors of many types
        raise ValueError(f"it is not YAML that Kubernetes takes ({error}){hint}") from None
    if len(documents) > 1:
        raise ValueError(f"it has {len(documents)} documents, but must have one")
    for job in documents:
        if isinstance(job, dict) and (job.get("apiVersion"), job.get("kind")) == ("batch/v1", "Job"):
            return job
    raise ValueError(f"it is not a Kubernetes Job (apiVersion: batch/v1, kind: Job){hint}")


def _check_fields(value: Any, expected: Any, path: str = "") -> None:
    """Raise a ValueError that names a field which is missing or of another type than expected."""
    expected_type = expected if isinstance(expected, type) else type(expected)
    if not isinstance(value, expected_type):
        given = _TYPES.get(type(value), "a number")
        raise ValueError(f"{path} is {given}; it must be {_TYPES[expected_type]}")
    inner = expected.items() if isinstance(expected, dict) else []
    for key, what in inner:
        name = key.rstrip("?")
        if name == key or name in value:
            _check_fields(value.get(name), what, f"{path}.{name}".lstrip("."))
    for index, entry in enumerate(value if isinstance(expected, list) else []):
        _check_fields(entry, expected[0], f"{path}[{index}]")
