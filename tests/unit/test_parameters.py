"""Parameters that are checked by the Docker SDK, and variables that the flow's own environment gives."""

from __future__ import annotations

from typing import Any

import pytest

from flows.parameters import environment_strings, validate_parameters


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hunter2")
    monkeypatch.setenv("PREFECT__CLOUD__API_KEY", "hunter2")
    monkeypatch.delenv("UNSET", raising=False)


def test_a_list_as_docker_run_takes_it() -> None:
    given = ["API_KEY", "EMPTY=", "A=b=c", "TWICE=1", "TWICE=2", "PREFECT__LOGGING__LEVEL=DEBUG"]
    assert validate_parameters({"image": "app", "environment": given}) is None
    assert environment_strings(given) == {
        "API_KEY": "hunter2",
        "EMPTY": "",
        "A": "b=c",
        "TWICE": "2",
        "PREFECT__LOGGING__LEVEL": "DEBUG",  # a value that was given is not Prefect's
    }


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ("UNSET", "UNSET is not set in the flow's environment"),
        (
            "PREFECT__CLOUD__API_KEY",
            "PREFECT__CLOUD__API_KEY is not set in the flow's environment, or is Prefect's own",
        ),
        ("", "the name ''"),
        ("=hunter2", "the name ''"),
        ("A=hunter2\0", "environment['A']"),
        (5, "the name ''"),
        ({"API_KEY": "hunter2"}, "the name ''"),
    ],
)
def test_items_that_are_refused_without_a_value(item: Any, named: str) -> None:
    fault = validate_parameters({"image": "app", "environment": ["A=b", item]})
    assert fault
    assert named in fault
    assert "hunter2" not in fault


EXTRA = [{}, None, {"user": 1000}, {"entrypoint": ["sh"]}, {"labels": ["a"]}, {"labels": {"a": "b"}}, {"name": "app"}]


@pytest.mark.parametrize("extra", [*EXTRA, {"hostname": "app", "working_dir": "/tmp", "platform": "linux/arm64"}])
def test_dockers_other_options(extra: Any) -> None:
    assert validate_parameters({"image": "app", "extra_docker_kwargs": extra}) is None


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"usr": 1000}, "usr"),
        ({"entrypoint": "sh -c 'x"}, "No closing quotation"),
        ({"labels": "a"}, "labels"),
        (["user"], "give a mapping"),
        (5, "give a mapping"),
        # a parameter of its own
        *(({name: None}, name) for name in ("image", "command", "environment", "host_config")),
    ],
)
def test_options_that_the_sdk_refuses(extra: Any, named: str) -> None:
    fault = validate_parameters({"image": "app", "extra_docker_kwargs": extra})
    assert fault
    assert fault.startswith("extra_docker_kwargs is ")
    assert named in fault
