"""What a deployment may set, and what it is told when that cannot be used."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.parameters import validate_parameters
from flows.settings import Settings, SettingsError

DIGEST = f"@sha256:{'0123456789abcdef' * 4}"


# The names of the flow's image


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
def test_a_value_that_is_allowed_is_the_setting(variable: str) -> None:
    setting = variable.removeprefix("FLOW_").lower()
    for value in GOOD[variable]:
        settings = Settings.from_environ({variable: value})
        assert getattr(settings, setting) == value


@pytest.mark.parametrize("variable", WRONG)
def test_a_value_that_is_not_allowed_is_named_with_what_is(variable: str) -> None:
    for value in WRONG[variable]:
        says = f"{variable} is {value!r}. Allowed: "
        with pytest.raises(SettingsError, match=f"^{re.escape(says)}(an? |up to )"):
            Settings.from_environ({variable: value})


def test_the_flow_cannot_be_imported_with_a_wrong_value(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("FLOW_IMAGE_TAG", "no tag")
    with pytest.raises(SettingsError, match="FLOW_IMAGE_TAG is 'no tag'"):
        request.getfixturevalue("flow")


# References of images, here and in a run's parameter


IMAGES = [
    "python",
    "python:3.10-slim",
    f"python{DIGEST}",
    "prefecthq/prefect:1.4.1",
    "localhost/a",
    "a__b/c.d/e--f:_",
    f"registry:5000/a:b{DIGEST}",
    "[2001:db8::1]:5000/app:1",
    "[::1]/app",
    f"alpine@sha512:{'0' * 128}",
    f"alpine:3@sha384:{'a' * 96}",
    "Registry/app",
]
NO_IMAGES = [
    "",
    "no image",
    "name\n",
    "Python",
    "a/B",
    "a/",
    "/a",
    "a:b:c",
    "a:-b",
    ":tag",
    "-x",
    "python:",
    "https://gcr.io/dev/flow",
    "registry:5000/",
    "r:port/a",
    "a@md5:0",
    "[::1]",
]


@pytest.mark.parametrize("reference", IMAGES)
def test_a_reference_of_an_image_is_accepted(reference: str) -> None:
    assert not validate_parameters({"image": reference})


@pytest.mark.parametrize("reference", NO_IMAGES)
def test_what_is_no_reference_of_an_image_is_refused(reference: str) -> None:
    assert validate_parameters({"image": reference})


# What the Agent looks at


@pytest.mark.parametrize(
    ("value", "registry_url"),
    [
        ("docker.io/team", "team"),
        ("docker.io/team/", "team/"),
        ("index.docker.io/team/", "team/"),
        ("docker.io.example/team/", "docker.io.example/team/"),
    ],
)
def test_docker_hub_by_its_short_name(value: str, registry_url: str) -> None:
    """By the long one, Prefect does not find the image that an older engine has built."""
    assert Settings.from_environ({"FLOW_REGISTRY_URL": value}).registry_url == registry_url


@pytest.mark.parametrize("value", ["docker.io", "docker.io/", "registry-1.docker.io/"])
def test_docker_hub_needs_an_account(value: str) -> None:
    with pytest.raises(SettingsError, match=f"FLOW_REGISTRY_URL is '{value}'.*docker.io/ACCOUNT/"):
        Settings.from_environ({"FLOW_REGISTRY_URL": value})


def test_a_password_in_an_address_is_not_shown() -> None:
    with pytest.raises(SettingsError) as error:
        Settings.from_environ({"FLOW_REGISTRY_URL": "https://user:hunter2@registry.example/"})
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "labels"),
    [("", set()), (" , ", set()), ("team-a", {"team-a"}), ("team-a, gpu ,", {"team-a", "gpu"})],
)
def test_labels_are_separated_by_commas(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, value: str, labels: set[str]
) -> None:
    monkeypatch.setenv("FLOW_LABELS", value)
    assert request.getfixturevalue("flow").run_config.labels == labels


@pytest.mark.parametrize(
    "path", ["agent:///etc/job.yaml", "s3://bucket/job.yaml", "gcs://bucket/job.yaml"]
)
def test_a_template_that_the_agent_reads_is_not_read_here(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, path: str
) -> None:
    monkeypatch.setenv("JOB_TEMPLATE", path)
    config = request.getfixturevalue("flow").run_config
    assert config.job_template is None
    assert config.job_template_path == path


# Job templates


JOB = """
apiVersion: batch/v1
kind: Job
spec:
  template:
    spec:
      containers:
        - name: flow
"""
# The same, to be continued with a field of the container.
FLOW = f"{JOB}          "


def load(folder: Path, content: str) -> dict[str, Any]:
    """The Job that is made of a template's text."""
    path = folder / "own.yml"
    path.write_text(content)
    settings = Settings.from_environ({"JOB_TEMPLATE": str(path)})
    return dict(settings.job_template)


NO_FILES = ["", ".", "missing", "missing.yaml", "x" * 5000, "nul\0"]
NO_TEXT = [sys.executable]
NO_PATH_OF_THE_AGENT = ["agent://etc/job.yaml", "agent:///", "s3://", "ftp://host/job.yaml"]


@pytest.mark.parametrize("name", [*NO_FILES, *NO_TEXT, *NO_PATH_OF_THE_AGENT])
def test_a_template_that_cannot_be_read_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=r"Allowed: a name in job_templates/.* agent:///…"):
        Settings.from_environ({"JOB_TEMPLATE": name})


NO_JOBS = ["", "- a", "{apiVersion: [], kind: {}}", "{apiVersion: batch/v1beta1, kind: Job}"]
NO_YAML = [
    "a: [b",
    "a: \tb\n\t- c",
    "a: !!bool maybe",
    "a: &a [*a]",
    "a: !x y",
    "a: \0",
    "[" * 1000,
    f"{FLOW}env: [{{name: A, value: *hunter2}}]",
    f"{FLOW}env: [{{name: A, value: !hunter2 x}}]",
    f"{FLOW}env: [{{name: PASSWORD, value: {{hunter2: [}}]",
]
YAML_THAT_JSON_CANNOT_HOLD = [
    f"{FLOW}env: [{{name: A, value: .inf}}]",
    f"{FLOW}env: [{{name: A, value: !!binary aGVsbG8=}}]",
]
NO_CONTAINER_FOR_THE_AGENT = [
    "{apiVersion: batch/v1, kind: Job}",
    "{apiVersion: batch/v1, kind: Job, spec: {template: {spec: {containers: []}}}}",
    "{apiVersion: batch/v1, kind: Job, spec: {template: {spec: {containers: }}}}",
    "{apiVersion: batch/v1, kind: Job, spec: [template]}",
    JOB.replace("name: flow", "flow"),
    f"{FLOW}env: {{A: b}}",
    f"{FLOW}env: [PASSWORD=hunter2]",
    f"{FLOW}env: [{{name: A}}, {{value: b}}]",
]
MORE_THAN_ONE = [f"{JOB}---{JOB}---\n---\nkind: ConfigMap"]
PLACEHOLDERS = [
    f"{JOB}metadata:\n  memory: {{{{ .Values.x }}}}",
    f"{JOB}metadata:\n  {{{{- if .Values.x }}}}\n  b: 1\n{{{{- end }}}}",
]


def refusal(folder: Path, content: str) -> str:
    """What is said of a template: one line, which holds no value of an environment."""
    with pytest.raises(SettingsError) as error:
        load(folder, content)
    message = str(error.value)
    assert message.startswith("JOB_TEMPLATE is '")
    assert "Allowed: a name in job_templates/ (docker_sidecar" in message
    assert "\n" not in message
    assert "hunter2" not in message
    return message


@pytest.mark.parametrize("content", NO_JOBS)
def test_what_is_no_job_is_refused(tmp_path: Path, content: str) -> None:
    assert "it is not a Kubernetes Job" in refusal(tmp_path, content)


@pytest.mark.parametrize("content", [*NO_YAML, *YAML_THAT_JSON_CANNOT_HOLD])
def test_what_kubernetes_does_not_take_is_refused(tmp_path: Path, content: str) -> None:
    assert "it is not YAML that Kubernetes takes" in refusal(tmp_path, content)


@pytest.mark.parametrize("content", NO_CONTAINER_FOR_THE_AGENT)
def test_a_job_that_the_agent_cannot_fill_in_is_refused(tmp_path: Path, content: str) -> None:
    assert "the Agent needs spec.template.spec.containers[0]" in refusal(tmp_path, content)


@pytest.mark.parametrize("content", MORE_THAN_ONE)
def test_more_than_one_document_is_refused(tmp_path: Path, content: str) -> None:
    assert "or more than one document" in refusal(tmp_path, content)


@pytest.mark.parametrize("content", PLACEHOLDERS)
def test_a_template_of_helm_is_refused(tmp_path: Path, content: str) -> None:
    assert "it holds placeholders" in refusal(tmp_path, content)


WHAT_A_COMMAND_DOES_IS_NOT_JUDGED = [
    f"{FLOW}command: [sh, -c, /run.sh]",
    f"{FLOW}command: [bash, -euo, pipefail, -c, /run.sh, flow]",
    f"{FLOW}command: [docker, info, --format, '{{{{.ID}}}}']",
]
ONLY_THE_API_SERVER_CAN_JUDGE = [
    f"{FLOW}securityContext: {{privileged: true}}\nmetadata: {{annotations: }}"
]
WITH_EMPTY_DOCUMENTS = [
    f"{JOB}---\n",
    f"---\n{JOB}",
    f"---\n# none\n---{JOB}...\n",
    f"\ufeff{JOB}",
]


@pytest.mark.parametrize(
    "content",
    [*WHAT_A_COMMAND_DOES_IS_NOT_JUDGED, *ONLY_THE_API_SERVER_CAN_JUDGE, *WITH_EMPTY_DOCUMENTS],
)
def test_a_template_is_accepted(tmp_path: Path, content: str) -> None:
    assert load(tmp_path, content)["kind"] == "Job"


def test_null_is_as_good_as_nothing(tmp_path: Path) -> None:
    """As for kubectl. The Agent adds to labels, environment and resources, and fails on null."""
    text = FLOW.replace("template:", "template:\n    metadata: {labels: }")
    text += "resources: {limits: }\n          env:\nmetadata: {labels: , annotations: {note: }}"
    job = load(tmp_path, text)
    assert job["metadata"] == {"annotations": {"note": None}}
    pod = job["spec"]["template"]
    assert pod["metadata"] == {}
    assert pod["spec"]["containers"] == [{"name": "flow", "resources": {}}]


def value_in_a_template(folder: Path, written: str) -> Any:
    """What a value is read as, the same in a command and in an annotation."""
    annotations = f"metadata: {{annotations: {{at: {written}, 1: a}}}}"
    job = load(folder, f"{FLOW}command: [--user, {written}]\n{annotations}")
    [container] = job["spec"]["template"]["spec"]["containers"]
    _, value = container["command"]
    assert job["metadata"] == {"annotations": {"at": value, "1": "a"}}
    return value


@pytest.mark.parametrize(
    "written",
    [
        "2023-05-01",
        "2023-05-01T12:00:00Z",
        "2023-13-45",
        "22:30",
        "1000:50",
        "-1:30",
        "190:20:30.15",
        "=",
    ],
)
def test_dates_and_times_are_text_as_for_kubectl(tmp_path: Path, written: str) -> None:
    """PyYAML makes a date of the first, and 81000 of 22:30."""
    assert value_in_a_template(tmp_path, written) == written


@pytest.mark.parametrize(
    ("written", "number"), [("0644", 420), ("0o644", 420), ("0x1F", 31), ("-5", -5), ("1.5", 1.5)]
)
def test_numbers_are_read_as_kubectl_does(tmp_path: Path, written: str, number: float) -> None:
    assert value_in_a_template(tmp_path, written) == number
