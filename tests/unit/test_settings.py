"""What a deployment may set, and what it is told when that cannot be used."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.parameters import validate_parameters
from flows.settings import Settings, SettingsError

DIGEST = f"@sha256:{'0123456789abcdef' * 4}"


GOOD = {
    "FLOW_REGISTRY_URL": [
        "localhost",
        "[2001:db8::1]:5000/",
        "gcr.io/dev",
        "a.b/c_d/e-f/",
        "Registry/team",
        "shibui/",
    ],
    "FLOW_IMAGE_NAME": ["flow", "team/flow", "my-flow_2.x"],
    "FLOW_IMAGE_TAG": ["latest", "V1.0-rc_1", "_", "x" * 128],
    "FLOW_BASE_IMAGE": ["python", "r:5000/prefect:1.4.1", f"prefecthq/prefect{DIGEST}"],
}
WRONG = {
    "FLOW_REGISTRY_URL": [
        "",
        " ",
        "https://gcr.io/dev/",
        "gcr.io/Dev",
        "gcr.io//dev",
        "gcr.io\n",
        "r:x/",
        "[::1",
    ],
    "FLOW_IMAGE_NAME": [
        "",
        "Flow",
        "flow:0.1.0",
        "localhost:5000/flow",
        "my flow",
        "-flow",
        "flow/",
    ],
    "FLOW_IMAGE_TAG": ["", "-1", ".1", "a b", "1+2", "x" * 129],
    "FLOW_BASE_IMAGE": ["", "Prefect", "a:b:c", "python:"],
}


@pytest.mark.parametrize("variable", GOOD)
def test_values(variable: str) -> None:
    for value in GOOD[variable]:
        assert (
            getattr(Settings.from_environ({variable: value}), variable[len("FLOW_") :].lower())
            == value
        )
    for value in WRONG[variable]:
        with pytest.raises(
            SettingsError, match=f"^{variable} is {re.escape(repr(value))}. Allowed: (an? |up to )"
        ):
            Settings.from_environ({variable: value})


def test_the_flow_cannot_be_imported_with_a_wrong_value(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("FLOW_IMAGE_TAG", "no tag")
    with pytest.raises(SettingsError, match="FLOW_IMAGE_TAG is 'no tag'"):
        request.getfixturevalue("flow")


@pytest.mark.parametrize(
    ("value", "labels"),
    [("", set()), (" , ", set()), ("team-a", {"team-a"}), ("team-a, gpu ,", {"team-a", "gpu"})],
)
def test_labels(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, value: str, labels: set[str]
) -> None:
    monkeypatch.setenv("FLOW_LABELS", value)
    assert request.getfixturevalue("flow").run_config.labels == labels


@pytest.mark.parametrize(
    "path", ["agent:///etc/job.yaml", "s3://bucket/job.yaml", "gcs://bucket/job.yaml"]
)
def test_a_template_that_the_agent_reads(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, path: str
) -> None:
    monkeypatch.setenv("JOB_TEMPLATE", path)
    config = request.getfixturevalue("flow").run_config
    assert (config.job_template, config.job_template_path) == (None, path)


IMAGES = f"""
python python:3.10-slim python{DIGEST} prefecthq/prefect:1.4.1 localhost/a a__b/c.d/e--f:_ registry:5000/a:b{DIGEST}
[2001:db8::1]:5000/app:1 [::1]/app alpine@sha512:{"0" * 128} alpine:3@sha384:{"a" * 96} Registry/app
"""
NO_IMAGES = "Python a/B a/ /a a:b:c a:-b :tag -x python: https://gcr.io/dev/flow registry:5000/ r:port/a a@md5:0 [::1]"


def test_image_references() -> None:
    assert [it for it in IMAGES.split() if validate_parameters({"image": it})] == []
    assert [
        it
        for it in ["", "no image", "name\n", *NO_IMAGES.split()]
        if not validate_parameters({"image": it})
    ] == []


JOB = """
apiVersion: batch/v1
kind: Job
spec:
  template:
    spec:
      containers:
        - name: flow
"""
FLOW = f"{JOB}          "


def load(folder: Path, content: str) -> dict[str, Any]:
    (folder / "own.yml").write_text(content)
    return Settings.from_environ({"JOB_TEMPLATE": str(folder / "own.yml")}).job_template


NO_TEXT = ["", ".", "missing", "missing.yaml", "x" * 5000, "nul\0", sys.executable]
NO_PATH_OF_THE_AGENT = ["agent://etc/job.yaml", "agent:///", "s3://", "ftp://host/job.yaml"]


@pytest.mark.parametrize("name", [*NO_TEXT, *NO_PATH_OF_THE_AGENT])
def test_a_template_that_cannot_be_read(name: str) -> None:
    with pytest.raises(SettingsError, match=r"Allowed: a name in job_templates/.* agent:///…"):
        Settings.from_environ({"JOB_TEMPLATE": name})


REFUSED = {
    "it is not a Kubernetes Job": [
        "",
        "- a",
        "{apiVersion: [], kind: {}}",
        "{apiVersion: batch/v1beta1, kind: Job}",
    ],
    "it is not YAML that Kubernetes takes": [
        *(f"a: {value}" for value in ("[b", "\tb\n\t- c", "!!bool maybe", "&a [*a]", "!x y", "\0")),
        "[" * 1000,
        # the first two are YAML, and JSON cannot hold them
        *(
            f"{FLOW}env: [{{name: A, value: {it}}}]"
            for it in (".inf", "!!binary aGVsbG8=", "*hunter2", "!hunter2 x")
        ),
        f"{FLOW}env: [{{name: PASSWORD, value: {{hunter2: [}}]",
    ],
    "the Agent needs spec.template.spec.containers[0]": [
        "{apiVersion: batch/v1, kind: Job}",
        "{apiVersion: batch/v1, kind: Job, spec: {template: {spec: {containers: []}}}}",
        "{apiVersion: batch/v1, kind: Job, spec: {template: {spec: {containers: }}}}",
        "{apiVersion: batch/v1, kind: Job, spec: [template]}",
        JOB.replace("name: flow", "flow"),
        *(
            f"{FLOW}env: {value}"
            for value in ("{A: b}", "[PASSWORD=hunter2]", "[{name: A}, {value: b}]")
        ),
    ],
    "or more than one document": [f"{JOB}---{JOB}---\n---\nkind: ConfigMap"],
    "it holds placeholders": [
        f"{JOB}metadata:\n  memory: {{{{ .Values.x }}}}",
        f"{JOB}metadata:\n  {{{{- if .Values.x }}}}\n  b: 1\n{{{{- end }}}}",
    ],
}


@pytest.mark.parametrize(
    ("what", "content"), [(what, content) for what, them in REFUSED.items() for content in them]
)
def test_a_template_that_is_refused(tmp_path: Path, what: str, content: str) -> None:
    """In one line, which holds no value of an environment."""
    with pytest.raises(SettingsError) as error:
        load(tmp_path, content)
    message = str(error.value)
    assert message.startswith("JOB_TEMPLATE is '")
    assert what in message
    assert "Allowed: a name in job_templates/ (docker_sidecar" in message
    assert "\n" not in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "content",
    [
        # what a command does, and what only the API server can judge
        *(
            f"{FLOW}command: {value}"
            for value in ("[sh, -c, /run.sh]", "[bash, -euo, pipefail, -c, /run.sh, flow]")
        ),
        f"{FLOW}command: [docker, info, --format, '{{{{.ID}}}}']",
        f"{FLOW}securityContext: {{privileged: true}}\nmetadata: {{annotations: }}",
        # empty documents
        *(f"{JOB}---\n", f"---\n{JOB}", f"---\n# none\n---{JOB}...\n", f"\ufeff{JOB}"),
    ],
)
def test_a_template_that_is_accepted(tmp_path: Path, content: str) -> None:
    assert load(tmp_path, content)["kind"] == "Job"


def test_null_is_as_good_as_nothing(tmp_path: Path) -> None:
    """As for kubectl. The Agent adds to the labels, the environment and the resources, and would fail on null."""
    text = FLOW.replace("template:", "template:\n    metadata: {labels: }")
    text += "resources: {limits: }\n          env:\nmetadata: {labels: , annotations: {note: }}"
    job = load(tmp_path, text)
    assert job["metadata"] == {"annotations": {"note": None}}
    pod = job["spec"]["template"]
    assert (pod["metadata"], pod["spec"]["containers"]) == ({}, [{"name": "flow", "resources": {}}])


TEXT = [
    "2023-05-01",
    "2023-05-01T12:00:00Z",
    "2023-13-45",
    "22:30",
    "1000:50",
    "-1:30",
    "190:20:30.15",
    "=",
]
NUMBERS = [("0644", 420), ("0o644", 420), ("0x1F", 31), ("-5", -5), ("1.5", 1.5)]


@pytest.mark.parametrize(("written", "value"), [*zip(TEXT, TEXT), *NUMBERS])
def test_values_are_read_as_kubectl_does(tmp_path: Path, written: str, value: str | float) -> None:
    """A date and a time are text. PyYAML makes a date of the first, and 81000 of 22:30."""
    job = load(
        tmp_path,
        f"{FLOW}command: [--user, {written}]\nmetadata: {{annotations: {{at: {written}, 1: a}}}}",
    )
    assert job["metadata"] == {"annotations": {"at": value, "1": "a"}}
    assert job["spec"]["template"]["spec"]["containers"][0]["command"] == ["--user", value]
