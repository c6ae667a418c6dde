"""What a deployment may set, and what it is told when that cannot be used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.settings import JOB_TEMPLATES, PROJECT, Settings, SettingsError, is_image, load_job_template

DIGEST = f"@sha256:{'0123456789abcdef' * 4}"
FIRST = "spec.template.spec.containers[0]"


def test_defaults_are_the_recipes() -> None:
    settings = Settings.from_environ({})
    assert settings.image == "gcr.io/dev/docker-on-k8s-flow:0.1.0"
    assert settings.base_image == "prefecthq/prefect:1.4.1-python3.10"
    assert settings.job_template == yaml.safe_load((JOB_TEMPLATES / "docker_sidecar.yaml").read_text())


GOOD = {
    "FLOW_REGISTRY_URL": ["localhost", "localhost:5000/", "gcr.io/dev", "a.b/c_d/e-f/", "Registry/team"],
    "FLOW_IMAGE_NAME": ["flow", "team/flow", "my-flow_2.x"],
    "FLOW_IMAGE_TAG": ["latest", "V1.0-rc_1", "_", "x" * 128],
    "FLOW_BASE_IMAGE": ["python", "r:5000/prefect:1.4.1", f"prefecthq/prefect{DIGEST}"],
}
WRONG = {
    "FLOW_REGISTRY_URL": ["", " ", "https://gcr.io/dev/", "gcr.io/Dev", "gcr.io//dev", "gcr.io\n", "r:x/", "[::1"],
    "FLOW_IMAGE_NAME": ["", "Flow", "flow:0.1.0", "localhost:5000/flow", "my flow", "-flow", "flow/"],
    "FLOW_IMAGE_TAG": ["", "-1", ".1", "a b", "1+2", "x" * 129],
    "FLOW_BASE_IMAGE": ["", "Prefect", "a:b:c", "python:"],
}


@pytest.mark.parametrize("variable", GOOD)
def test_values(variable: str) -> None:
    for value in GOOD[variable]:
        assert getattr(Settings.from_environ({variable: value}), variable[len("FLOW_") :].lower()) == value
    for value in WRONG[variable]:
        with pytest.raises(SettingsError, match=f"^{variable} is {re.escape(repr(value))}. Allowed: (an? |up to )"):
            Settings.from_environ({variable: value})


def test_the_flow_cannot_be_imported_with_a_wrong_value() -> None:
    environ = {**os.environ, "FLOW_IMAGE_TAG": "no tag"}
    command = [sys.executable, "-c", "import flows.docker_sidecar"]
    result = subprocess.run(command, env=environ, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "SettingsError: FLOW_IMAGE_TAG is 'no tag'. Allowed: " in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("value", "labels"), [("", ()), (" , ", ()), ("team-a", ("team-a",)), ("team-a, gpu ,", ("team-a", "gpu"))]
)
def test_labels(value: str, labels: tuple[str, ...]) -> None:
    assert Settings.from_environ({"FLOW_LABELS": value}).labels == labels
    assert Settings.from_environ({}).labels == ()


@pytest.mark.parametrize("path", ["agent:///etc/job.yaml", "s3://bucket/job.yaml", "gcs://bucket/job.yaml"])
def test_a_template_that_the_agent_reads(path: str) -> None:
    settings = Settings.from_environ({"JOB_TEMPLATE": path})
    assert (settings.job_template, settings.job_template_path) == (None, path)


@pytest.mark.parametrize("path", ["agent://etc/job.yaml", "agent:///", "s3://", "ftp://host/job.yaml"])
def test_a_path_that_the_agent_cannot_read(path: str) -> None:
    with pytest.raises(SettingsError, match="agent:///…"):
        Settings.from_environ({"JOB_TEMPLATE": path})


def test_the_flow_takes_template_and_labels_from_the_environment() -> None:
    environ = {**os.environ, "JOB_TEMPLATE": "agent:///etc/job.yaml", "FLOW_LABELS": "team-a,gpu"}
    script = "from flows.docker_sidecar import flow; import json; print(json.dumps(flow.run_config.serialize()))"
    done = subprocess.run([sys.executable, "-c", script], env=environ, cwd=PROJECT, capture_output=True, text=True)
    config = json.loads(done.stdout)
    assert (config["job_template"], config["job_template_path"]) == (None, "agent:///etc/job.yaml")
    assert sorted(config["labels"]) == ["gpu", "team-a"]


IMAGES = f"""
python python:3.10-slim python{DIGEST} prefecthq/prefect:1.4.1 localhost/a a__b/c.d/e--f:_ registry:5000/a:b{DIGEST}
[2001:db8::1]:5000/app:1 [::1]/app alpine@sha512:{"0" * 128} alpine:3@sha384:{"a" * 96} Registry/app
"""
NO_IMAGES = "Python a/B a/ /a a:b:c a:-b :tag -x python: https://gcr.io/dev/flow registry:5000/ r:port/a a@md5:0 [::1]"


def test_image_references() -> None:
    assert [reference for reference in IMAGES.split() if not is_image(reference)] == []
    assert [reference for reference in ["", "no image", "name\n", *NO_IMAGES.split()] if is_image(reference)] == []


@pytest.mark.parametrize("url", ["shibui", "shibui/", "team/sub", "[2001:db8::1]:5000/"])
def test_registries(url: str) -> None:
    assert Settings.from_environ({"FLOW_REGISTRY_URL": url}).image == f"{url.rstrip('/')}/docker-on-k8s-flow:0.1.0"


# ------------------------------------------------------------------------------------- job templates

JOB = """
apiVersion: batch/v1
kind: Job
spec:
  template:
    spec:
      containers:
        - name: flow
"""


def load(folder: Path, content: str) -> dict[str, Any]:
    (folder / "own.yml").write_text(content)
    return Settings.from_environ({"JOB_TEMPLATE": str(folder / "own.yml")}).job_template


def refusal(folder: Path, content: str) -> str:
    """The one line by which a template is refused."""
    with pytest.raises(SettingsError) as error:
        load(folder, content)
    message = str(error.value)
    assert message.startswith("JOB_TEMPLATE is '")
    assert "Allowed: a name in job_templates/ (docker_sidecar" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["", ".", "missing", "missing.yaml", "x" * 5000, "nul\0", sys.executable])
def test_a_template_that_is_no_text(name: str) -> None:
    with pytest.raises(SettingsError, match=r"Allowed: a name in job_templates/"):
        load_job_template(name)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        *((content, "it is not a Kubernetes Job") for content in ("", "- a\n- list", "{apiVersion: [], kind: {}}")),
        ("{apiVersion: batch/v1beta1, kind: Job}", "it is not a Kubernetes Job"),
        *((f"a: {value}", "it is not YAML") for value in ("[b", "\tb\n\t- c", "!!bool maybe", "&a [*a]", "!x y", "\0")),
        ("[" * 1000, "it is not YAML"),
    ],
)
def test_a_template_that_is_no_job(tmp_path: Path, content: str, what: str) -> None:
    assert what in refusal(tmp_path, content)


@pytest.mark.parametrize("command", ["[sh, -c, /run.sh]", "[bash, -euo, pipefail, -c, /run.sh, flow]", "[/bin/sh]"])
def test_what_a_command_does_is_not_judged(tmp_path: Path, command: str) -> None:
    load(tmp_path, f"{JOB}          command: {command}")


@pytest.mark.parametrize(
    "content",
    [
        "{apiVersion: batch/v1, kind: Job}",
        "{apiVersion: batch/v1, kind: Job, spec: {template: {spec: {containers: []}}}}",
        "{apiVersion: batch/v1, kind: Job, spec: {template: {spec: {containers: }}}}",
        "{apiVersion: batch/v1, kind: Job, spec: [template]}",
        JOB.replace("name: flow", "flow"),
        f"{JOB}          env: {{A: b}}",
        f"{JOB}          env: [A=b]",
        f"{JOB}          env: [{{name: A}}, {{value: b}}]",
    ],
)
def test_what_the_agent_would_fail_on(tmp_path: Path, content: str) -> None:
    assert f"the Agent needs {FIRST}" in refusal(tmp_path, content)


def test_null_is_as_good_as_nothing(tmp_path: Path) -> None:
    """As for kubectl. The Agent adds to the labels, the environment and the resources, and would fail on null."""
    text = (
        JOB.replace("template:", "template:\n    metadata: {labels: }")
        + "          resources: {limits: }\n          env:"
    )
    job = load(tmp_path, f"{text}\nmetadata: {{labels: , annotations: {{note: }}}}")
    assert job["metadata"] == {"annotations": {"note": None}}
    pod = job["spec"]["template"]
    assert (pod["metadata"], pod["spec"]["containers"]) == ({}, [{"name": "flow", "resources": {}}])


@pytest.mark.parametrize("env", ["[PASSWORD=hunter2]", "[{name: PASSWORD, value: {hunter2: [}]"])
def test_no_value_of_an_environment_is_shown(tmp_path: Path, env: str) -> None:
    assert "hunter2" not in refusal(tmp_path, f"{JOB}          env: {env}")


TEXT = ["2023-05-01", "2023-05-01T12:00:00Z", "2023-13-45", "22:30", "1000:50", "-1:30", "190:20:30.15", "="]


@pytest.mark.parametrize("text", TEXT)
def test_dates_and_times_are_text(tmp_path: Path, text: str) -> None:
    """As kubectl reads them. PyYAML makes a date of the first, and 81000 of 22:30."""
    job = load(
        tmp_path, f"{JOB}          command: [--user, {text}]\nmetadata: {{annotations: {{reviewed: {text}, 1: a}}}}"
    )
    assert job["metadata"] == {"annotations": {"reviewed": text, "1": "a"}}
    assert job["spec"]["template"]["spec"]["containers"][0]["command"] == ["--user", text]


@pytest.mark.parametrize(("text", "number"), [("0644", 420), ("0o644", 420), ("0x1F", 31), ("-5", -5), ("1.5", 1.5)])
def test_numbers(tmp_path: Path, text: str, number: float) -> None:
    assert load(tmp_path, f"{JOB}  backoffLimit: {text}")["spec"]["backoffLimit"] == number


@pytest.mark.parametrize("value", [".inf", "!!binary aGVsbG8=", "*hunter2", "!hunter2 x"])
def test_what_json_cannot_hold_is_refused_without_its_value(tmp_path: Path, value: str) -> None:
    message = refusal(tmp_path, f"{JOB}          env: [{{name: A, value: {value}}}]")
    assert "not YAML that Kubernetes takes" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("content", [f"{JOB}---\n", f"---\n{JOB}", f"---\n# none\n---{JOB}...\n", f"\ufeff{JOB}"])
def test_empty_documents_are_no_matter(tmp_path: Path, content: str) -> None:
    assert load(tmp_path, content)["kind"] == "Job"


def test_several_documents(tmp_path: Path) -> None:
    assert "it has 3 documents" in refusal(tmp_path, f"{JOB}---{JOB}---\n---\nkind: ConfigMap")


@pytest.mark.parametrize("line", ["memory: {{ .Values.x }}", "{{- if .Values.x }}\n  b: 1\n{{- end }}"])
def test_placeholders(tmp_path: Path, line: str) -> None:
    assert "it holds placeholders" in refusal(tmp_path, f"{JOB}metadata:\n  {line}\n")
    load(tmp_path, f"{JOB}          command: [docker, info, --format, '{{{{.ID}}}}']\n")


@pytest.mark.parametrize("line", ["image: gcr.io/findindia/flow", "securityContext: {privileged: true}"])
def test_what_only_the_api_server_can_judge_is_accepted(tmp_path: Path, line: str) -> None:
    load(tmp_path, f"{JOB}          {line}\nmetadata: {{annotations: }}")
