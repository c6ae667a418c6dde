"""What a deployment may set, and what it is told when that cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.settings import JOB_TEMPLATES, PROJECT, Settings, SettingsError, is_image, load_job_template

DIGEST = f"@sha256:{'0123456789abcdef' * 4}"


def test_defaults_are_the_recipes() -> None:
    settings = Settings.from_environ({})
    assert settings.registry_url == "gcr.io/dev/"
    assert settings.image_name == "docker-on-k8s-flow"
    assert settings.image_tag == "0.1.0"
    assert settings.base_image == "prefecthq/prefect:1.4.1-python3.10"
    assert settings.job_template == yaml.safe_load((JOB_TEMPLATES / "docker_sidecar.yaml").read_text())


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("FLOW_REGISTRY_URL", v) for v in ("localhost", "localhost:5000/", "r:5000", "gcr.io/dev", "a.b/c_d/e-f/")),
        *(("FLOW_IMAGE_NAME", v) for v in ("flow", "team/flow", "my-flow_2.x")),
        *(("FLOW_IMAGE_TAG", v) for v in ("latest", "V1.0-rc_1", "_", "x" * 128)),
        *(("FLOW_BASE_IMAGE", v) for v in ("python", "r:5000/prefect:1.4.1", f"prefecthq/prefect{DIGEST}")),
    ],
)
def test_good_values_are_taken_as_they_are(variable: str, value: str) -> None:
    settings = Settings.from_environ({variable: value})
    assert getattr(settings, variable[len("FLOW_") :].lower()) == value


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        *(
            ("FLOW_REGISTRY_URL", value, "without a scheme")
            for value in ("", " ", "https://gcr.io/dev/", "gcr.io/Dev/", "gcr.io//dev", "dev/", "gcr.io/dev/\n", "r:x/")
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
python python:3.10-slim python{DIGEST} prefecthq/prefect:1.4.1 localhost/a a__b/c.d/e--f:_
gcr.io/dev/docker-on-k8s-flow:0.1.0 registry:5000/name:tag registry:5000/name:tag{DIGEST} Registry.Example:5000/a
"""
NO_IMAGES = f"""
Python a/B a..b a/ /a a:b:c a:-b :tag -x python: python:{"x" * 129} https://gcr.io/dev/flow -r.io/a registry:5000/
registry:port/name:tag python@sha256:0123 python@md5:{"0" * 64} python{DIGEST.upper()} python{DIGEST}0
"""


@pytest.mark.parametrize("reference", IMAGES.split())
def test_image_references(reference: str) -> None:
    assert is_image(reference)


@pytest.mark.parametrize("reference", ["", " ", "two words", "name\n", " name", *NO_IMAGES.split()])
def test_what_is_no_image_reference(reference: str) -> None:
    assert not is_image(reference)


JOB = "{apiVersion: batch/v1, kind: Job, spec: {template: {spec: {containers: %s}}}}"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "it is not a Kubernetes Job"),
        ("- a\n- list", "it is not a Kubernetes Job"),
        ("{apiVersion: apps/v1, kind: Deployment}", "it is not a Kubernetes Job"),
        ("{apiVersion: batch/v1beta1, kind: Job}", "it is not a Kubernetes Job"),
        ("{apiVersion: batch/v1, kind: Job}", "it has no containers"),
        (JOB % "[]", "it has no containers"),
        (JOB % "null", "it has no containers"),
        (JOB % "[null]", "it has no containers"),
        (JOB % "[flow]", "it has no containers"),
        (JOB % "[{name: it, securityContext: {privileged: true}}]", "'it', is the Docker daemon"),
        (JOB % "[{name: it, image: 'docker:29-dind'}, {name: flow}]", "'it', is the Docker daemon"),
        ("a: [b", "is not YAML"),
        ("a: 2021-13-01", "is not YAML"),
        ("a: 1\n---\nb: 2", "is not YAML"),
        ("\x7fELF\x02\x01\x01\x00", "is not YAML"),
        ("\xff\xfe\x80", "is not YAML"),
    ],
)
def test_a_template_that_is_no_job_for_the_flow(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "template.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(SettingsError) as error:
        load_job_template(str(path))
    message = str(error.value)
    assert message.startswith(f"JOB_TEMPLATE is {str(path)!r}: ")
    assert what in message
    assert "Allowed: a name in job_templates/ (docker_sidecar" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["", ".", "missing", "missing.yaml", "x" * 5000])
def test_a_template_that_is_no_file(name: str) -> None:
    with pytest.raises(SettingsError, match=r"cannot read .*Allowed: a name in job_templates/"):
        load_job_template(name)


@pytest.mark.parametrize("folder", [".", "{}"])
def test_a_template_of_ones_own(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(folder.format(tmp_path), "own.yml")
    path.write_text(JOB % "[{name: flow}, {name: daemon, image: 'docker:dind'}]")
    job = Settings.from_environ({"JOB_TEMPLATE": str(path)}).job_template
    assert [container["name"] for container in job["spec"]["template"]["spec"]["containers"]] == ["flow", "daemon"]
