"""What a deployment may set, and what it is told when that cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("FLOW_REGISTRY_URL", v) for v in ("localhost", "localhost:5000/", "gcr.io/dev", "a.b/c_d/e-f/", "dev/")),
        *(("FLOW_IMAGE_NAME", v) for v in ("flow", "team/flow", "my-flow_2.x")),
        *(("FLOW_IMAGE_TAG", v) for v in ("latest", "V1.0-rc_1", "_", "x" * 128)),
        *(("FLOW_BASE_IMAGE", v) for v in ("python", "r:5000/prefect:1.4.1", f"prefecthq/prefect{DIGEST}")),
    ],
)
def test_good_values(variable: str, value: str) -> None:
    assert getattr(Settings.from_environ({variable: value}), variable[len("FLOW_") :].lower()) == value


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        *(
            ("FLOW_REGISTRY_URL", value, "without a scheme")
            for value in ("", " ", "https://gcr.io/dev/", "gcr.io/Dev/", "gcr.io//dev", "gcr.io/dev/\n", "r:x/", "[::1")
        ),
        *(
            ("FLOW_IMAGE_NAME", value, "lower case, without registry or tag")
            for value in ("", "Flow", "flow:0.1.0", "localhost:5000/flow", "my flow", "-flow", "flow/")
        ),
        *(("FLOW_IMAGE_TAG", value, "up to 128 letters") for value in ("", "-1", ".1", "a b", "1+2", "x" * 129)),
        *(("FLOW_BASE_IMAGE", value, "Python 3.9, 3.10 or 3.11") for value in ("", "Prefect", "a:b:c", "python:")),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(variable: str, value: str, allowed: str) -> None:
    with pytest.raises(SettingsError) as error:
        Settings.from_environ({variable: value})
    assert str(error.value).startswith(f"{variable} is {value!r}. Allowed: ")
    assert allowed in str(error.value)


def test_the_flow_cannot_be_imported_with_a_wrong_value() -> None:
    environ = {**os.environ, "FLOW_IMAGE_TAG": "no tag"}
    command = [sys.executable, "-c", "import flows.docker_sidecar"]
    result = subprocess.run(command, env=environ, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "SettingsError: FLOW_IMAGE_TAG is 'no tag'. Allowed: " in result.stderr.splitlines()[-1]


IMAGES = f"""
python python:3.10-slim python{DIGEST} prefecthq/prefect:1.4.1 localhost/a a__b/c.d/e--f:_ {"a" * 255}
gcr.io/dev/docker-on-k8s-flow:0.1.0 registry:5000/name:tag registry:5000/name:tag{DIGEST} Registry.Example:5000/a
[2001:db8::1]:5000/app:1 [::1]/app alpine@sha512:{"0" * 128} alpine:3@sha384:{"a" * 96} Registry/app {"f" * 63}
"""
NO_IMAGES = f"""
Python a/B a..b a/ /a a:b:c a:-b :tag -x python: python:{"x" * 129} https://gcr.io/dev/flow -r.io/a registry:5000/
registry:port/name:tag python@sha256:0123 python@md5:{"0" * 64} python{DIGEST.upper()} python{DIGEST}0 {"f" * 64}
[::1] [2001:db8::g]/a 2001:db8::1/a gcr.io/{"a" * 256} {"a" * 256} alpine@sha512:{"0" * 64}
"""


@pytest.mark.parametrize("reference", IMAGES.split())
def test_row_25_image_references(reference: str) -> None:
    assert is_image(reference)


@pytest.mark.parametrize("reference", ["", " ", "two words", "name\n", " name", *NO_IMAGES.split()])
def test_row_25_no_image_references(reference: str) -> None:
    """Each of them is refused by Docker, too."""
    assert not is_image(reference)


@pytest.mark.parametrize("url", ["shibui", "shibui/", "team/sub", "[2001:db8::1]:5000/", "Registry/team"])
def test_row_25_registries(url: str) -> None:
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


def load(folder: Path, content: str | bytes) -> dict[str, object]:
    path = folder / "own.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Settings.from_environ({"JOB_TEMPLATE": str(path)}).job_template


def refusal(folder: Path, content: str | bytes) -> str:
    """The one line by which a template is refused."""
    with pytest.raises(SettingsError) as error:
        load(folder, content)
    message = str(error.value)
    assert message.startswith("JOB_TEMPLATE is '")
    assert "Allowed: a name in job_templates/ (docker_sidecar" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["", ".", "missing", "missing.yaml", "x" * 5000, "nul\0"])
def test_a_template_that_is_no_file(name: str) -> None:
    with pytest.raises(SettingsError, match=r"Allowed: a name in job_templates/"):
        load_job_template(name)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "it is not a Kubernetes Job"),
        ("- a\n- list", "it is not a Kubernetes Job"),
        ("{apiVersion: apps/v1, kind: Deployment}", "it is not a Kubernetes Job"),
        ("{apiVersion: batch/v1beta1, kind: Job}", "it is not a Kubernetes Job"),
        ("{apiVersion: [], kind: {}}", "it is not a Kubernetes Job"),
        ("a: [b", "it is not YAML"),
        ("a: \tb\n\t- c", "it is not YAML"),
        ("\x7fELF\x02\x01\x01\x00", "it is not YAML"),
        ("[" * 1000, "it is not YAML"),
        *(
            (f"a: {value}", "it is not YAML")
            for value in ("!!int x", "!!bool maybe", "!!int", "&a [*a]", ".nan", "!x y")
        ),
        (b"a: \xff\xfe", "'utf-8' codec can't decode"),
    ],
)
def test_a_template_that_is_no_job(tmp_path: Path, content: str | bytes, what: str) -> None:
    assert what in refusal(tmp_path, content)


def with_command(command: list[str]) -> str:
    return f"{JOB}          command: {json.dumps(command)}\n"


@pytest.mark.parametrize(
    "command",
    [
        ["/bin/sh", "-c"],
        ["bash", "-euo", "pipefail", "-c"],
        ["sh", "-ec", "--"],
        ["/usr/bin/env", "bash", "-c"],
        ["tini", "-g", "--", "sh", "-c"],
        ["sh"],  # without -c the first of args is the name of a script
        ["bash", "-l"],
        ["sh", "-lc", "echo hello"],
        ["bash", "-o", "pipefail", "-c", "exec python /run.py", "flow"],
        ["sh", "-c", "prefect"],
        ["sh", "-c", 'echo "$0"', "flow"],
        ["sh", "-c", 'exec "$@"'],  # $0 is "prefect", $@ lacks it
    ],
)
def test_row_17_a_shell_that_would_not_run_the_flow(tmp_path: Path, command: list[str]) -> None:
    message = refusal(tmp_path, with_command(command))
    assert f"{FIRST}.command starts a shell that would not run 'prefect execute flow-run'" in message


@pytest.mark.parametrize(
    "command",
    [
        ["sh", "-euc", '\nset -x\nexec tini -- "$@"', "flow"],
        ["bash", "-c", 'exec "${@:1}"', "flow"],
        ["sh", "-c", 'exec "$0" "$@"'],
        ["sh", "-c", 'exec prefect "$@"'],
        ["sh", "-c", "prefect execute flow-run"],
        ["sh", "-c", ". /etc/environment; main"],
        ["bash", "--norc", "-e", "/run.sh"],
        ["tini", "-g", "--"],
        ["python", "-m"],
        [],
    ],
)
def test_row_17_commands_that_run_the_flow(tmp_path: Path, command: list[str]) -> None:
    load(tmp_path, with_command(command))


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("{apiVersion: batch/v1, kind: Job}", "spec is missing"),
        ("{apiVersion: batch/v1, kind: Job, spec: {template: {spec: {containers: []}}}}", f"{FIRST} is missing"),
        *(
            (f"{JOB}metadata: {metadata}", field)
            for metadata, field in (
                ("", "metadata is missing or empty"),
                ("[]", "metadata is a list; it must be a mapping"),
                ("{labels: }", "metadata.labels is missing or empty"),
                ("{labels: [a]}", "metadata.labels is a list"),
                ("{name: }", "metadata.name is missing or empty"),
                ("{name: 5}", "metadata.name is a number"),
            )
        ),
        (JOB.replace("template:", "template:\n    metadata:"), "spec.template.metadata is missing or empty"),
        (JOB.replace("template:", "template:\n    metadata: {labels: }"), "spec.template.metadata.labels is missing"),
        (JOB.replace("- name: flow", "name: flow"), "spec.template.spec.containers is a mapping; it must be a list"),
        (JOB.replace("name: flow", "image: flow"), f"{FIRST}.name is missing or empty; it must be a string"),
        *(
            (f"{JOB}          {field}", f"{FIRST}.{fault}")
            for field, fault in (
                ("env: ", "env is missing or empty; it must be a list"),
                ("env: {A: b}", "env is a mapping; it must be a list"),
                ("env: [A=b]", "env[0] is a string; it must be a mapping"),
                ("env: [{name: A}, {value: b}]", "env[1].name is missing or empty; it must be a string"),
                ("resources: ", "resources is missing or empty"),
                ("resources: {limits: 1Gi}", "resources.limits is a string"),
                ("command: sh -c", "command is a string; it must be a list"),
                ("args: 5", "args is a number"),
            )
        ),
    ],
)
def test_row_18_the_field_that_the_agent_would_fail_on(tmp_path: Path, content: str, field: str) -> None:
    assert field in refusal(tmp_path, content)


def test_row_18_no_value_of_an_environment_is_shown(tmp_path: Path) -> None:
    assert "hunter2" not in refusal(tmp_path, f"{JOB}          env: [PASSWORD=hunter2]")


def test_row_20_dates_and_times_are_strings(tmp_path: Path) -> None:
    annotations = (
        "{reviewed: 2023-05-01, at: 2023-05-01T10:00:00Z, window: 12:30, never: 2021-13-01, 2024-01-01: '=', 1: a}"
    )
    job = load(tmp_path, f"{JOB}metadata: {{annotations: {annotations}}}")
    assert job["metadata"] == {
        "annotations": {
            "reviewed": "2023-05-01",
            "at": "2023-05-01T10:00:00Z",
            "window": "12:30",
            "never": "2021-13-01",
            "2024-01-01": "=",
            "1": "a",
        }
    }
    json.dumps(job)


@pytest.mark.parametrize("content", [f"{JOB}---\n", f"---\n{JOB}", f"---\n# none\n---{JOB}...\n", f"\ufeff{JOB}"])
def test_row_21_empty_documents_are_no_matter(tmp_path: Path, content: str) -> None:
    assert load(tmp_path, content)["kind"] == "Job"


def test_row_21_several_documents(tmp_path: Path) -> None:
    assert "it has 3 documents" in refusal(tmp_path, f"{JOB}---{JOB}---\n---\nkind: ConfigMap")


@pytest.mark.parametrize(
    "line",
    [
        "memory: {{ .Values.x }}",
        "{{- if .Values.x }}\n  b: 1\n{{- end }}",
        "{% if x %}\n  b: 1\n{% endif %}",
        'labels:\n    {{ include "x" . | indent 4 }}\n    app: y',
        "hosts: [${HOST}]",
    ],
)
def test_row_21_placeholders(tmp_path: Path, line: str) -> None:
    assert "it holds placeholders" in refusal(tmp_path, f"{JOB}metadata:\n  {line}\n")


def test_row_21_placeholders_that_are_not_the_fault(tmp_path: Path) -> None:
    innocent = f"{JOB}          command: [docker, info, --format, '{{{{.ID}}}}']\n"
    assert load(tmp_path, innocent)
    assert "it holds placeholders" not in refusal(tmp_path, f"{innocent}metadata: [")


@pytest.mark.parametrize(
    "line",
    [
        "image: gcr.io/findindia/flow",
        "securityContext: {privileged: true}",
        "securityContext: ",
        "command: ",
        "resources: {}",
    ],
)
def test_row_22_accepted(tmp_path: Path, line: str) -> None:
    load(tmp_path, f"{JOB}          {line}\nmetadata: {{annotations: }}")


def test_row_22_the_true_reason(tmp_path: Path) -> None:
    message = refusal(tmp_path, f"{JOB}          securityContext: restricted")
    assert f"{FIRST}.securityContext is a string; it must be a mapping" in message
