"""Job templates, and changes of them."""

import json
from typing import Any

from flows.settings import JOB_TEMPLATES, load_job_template

Template = dict[str, Any]
# the policies of the tests' namespace admit it, and no registry has it
NO_SUCH_DAEMON = "docker:no-such-dind"
TEMPLATES = sorted(path.stem for path in JOB_TEMPLATES.glob("*.yaml"))


def daemon_of(template: Template) -> dict[str, Any]:
    """The container of a template that runs the Docker daemon."""
    pod = template["spec"]["template"]["spec"]
    containers = pod["containers"] + pod.get("initContainers", [])
    [daemon] = [container for container in containers if container["name"] == "dind-daemon"]
    return dict_of(daemon)


def edited(name: str, old: str, new: str) -> Template:
    """A job template with one change of its text, as JSON."""
    text = json.dumps(load_job_template(name))
    assert old in text, f"{old!r} is no longer in {name}"
    return dict_of(json.loads(text.replace(old, new)))


def with_edits(container: dict[str, Any], edits: dict[str, str]) -> dict[str, Any]:
    """A container of a template with some texts in its strings replaced."""
    text = json.dumps(container)
    for old, new in edits.items():
        assert old in text, f"{old!r} is no longer in the template"
        text = text.replace(old, json.dumps(new)[1:-1])
    return dict_of(json.loads(text))


def dict_of(value: Any) -> dict[str, Any]:
    assert isinstance(value, dict)
    return value
