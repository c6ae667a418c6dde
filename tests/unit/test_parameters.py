"""What a run's parameters may be, and what is said of others."""

from typing import Any

import pytest

from flows.parameters import environment_strings, validate_parameters


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hunter2")
    monkeypatch.setenv("PREFECT__CLOUD__API_KEY", "hunter2")
    monkeypatch.delenv("UNSET", raising=False)


LIST = ["API_KEY", "EMPTY=", "A=b=c", "TWICE=1", "TWICE=2", "PREFECT__LOGGING__LEVEL=DEBUG"]
MAPPING = {"A": True, "B": 1, "C": 1.5, "D": "x=y", "E": "", "F": None, "G": False}


def test_an_environment_as_docker_run_takes_it() -> None:
    """Prefect's own variables are refused only where their value is not given."""
    expected = {
        "API_KEY": "hunter2",
        "EMPTY": "",
        "A": "b=c",
        "TWICE": "2",
        "PREFECT__LOGGING__LEVEL": "DEBUG",
    }
    assert environment_strings(LIST) == expected


def test_an_environment_as_json_writes_it() -> None:
    expected = {"A": "true", "B": "1", "C": "1.5", "D": "x=y", "E": "", "F": None, "G": "false"}
    assert environment_strings(MAPPING) == expected


@pytest.mark.parametrize(
    "parameters",
    [
        dict.fromkeys(
            ("command", "environment", "host_config", "extra_docker_kwargs", "time_limit")
        ),
        {"command": ["true"], "environment": MAPPING, "time_limit": 0.5},
        {"command": "[ 1 = 1 ]", "environment": LIST, "host_config": {}, "extra_docker_kwargs": {}},
        {
            "host_config": {
                "privileged": True,
                "binds": ["/workspace:/workspace"],
                "mem_limit": "1g",
                "shm_size": 65536,
            }
        },
        {
            "host_config": {
                "device_requests": [{"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu"]]}]
            }
        },
        {
            "host_config": {
                "auto_remove": True,
                "ulimits": [{"Name": "nofile", "Soft": 1024}],
                "nano_cpus": 10**9,
            }
        },
        {
            "extra_docker_kwargs": {
                "user": 1000,
                "entrypoint": ["sh"],
                "labels": ["a"],
                "name": "app",
            }
        },
        {
            "extra_docker_kwargs": {
                "labels": {"a": "b"},
                "working_dir": "/tmp",
                "platform": "linux/arm64",
            }
        },
    ],
    ids=str,
)
def test_valid_parameters(parameters: dict[str, Any]) -> None:
    assert validate_parameters({"image": "app", **parameters}) is None


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("image", "Prefect:1", "'Prefect:1'; give an image reference"),
        ("image", None, "None; give an image reference"),
        ("command", "sh -c 'echo", '"sh -c \'echo": No closing quotation'),
        ("command", ["sleep", 1], "['sleep', 1]; give a string, a list of words or null"),
        *(
            ("command", value, """--param command='["sh",""")
            for value in (5, {"a": 1}, "['sh','-c','x']", '["sh"]')
        ),
        *(("time_limit", value, f"{value!r}; give the seconds") for value in (0, -1, "1h", True)),
        ("host_config", "1g", """--param host_config='{"mem_limit":"1g"}'"""),
        (
            "host_config",
            {"memory": "1g"},
            "{'memory': '1g'}: got an unexpected keyword argument 'memory'; give a",
        ),
        (
            "host_config",
            {"privileged": True, "mem_limit": "much"},
            "'mem_limit': 'much'}: The specified value",
        ),
        ("host_config", {"binds": 5}, "{'binds': 5}: "),
        ("host_config", {"version": "1.41"}, "'version'"),
        (
            "host_config",
            {"network_mode": "host", "port_bindings": {"80/tcp": 80}},
            "{'80/tcp': 80}}: ",
        ),
        ("extra_docker_kwargs", {"usr": 1000}, "'usr'"),
        ("extra_docker_kwargs", {"entrypoint": "sh -c 'x"}, "No closing quotation"),
        ("extra_docker_kwargs", {"labels": "a"}, "{'labels': 'a'}"),
        *(("extra_docker_kwargs", value, "give a mapping") for value in (["user"], 5)),
        # each is a parameter of its own
        *(
            ("extra_docker_kwargs", {it: None}, it)
            for it in ("image", "command", "environment", "host_config")
        ),
        # the names of variables are said, and never their values
        *(
            ("environment", {"B": value}, "'B'")
            for value in ({"c": "hunter2"}, ["hunter2"], "hunter2\0")
        ),
        ("environment", {"": "hunter2"}, "''"),
        ("environment", {"K=hunter2": "hunter2"}, "'K'"),
        ("environment", {"K\0": "hunter2"}, "K"),
        *(
            ("environment", value, """environment='{"NAME":"value"}'""")
            for value in ("PASSWORD=hunter2", 5)
        ),
        ("environment", ["UNSET"], "UNSET is not set in the flow's environment"),
        (
            "environment",
            ["PREFECT__CLOUD__API_KEY"],
            "PREFECT__CLOUD__API_KEY is not set in the flow's environment",
        ),
        ("environment", ["A=hunter2\0"], "environment['A']"),
        *(
            ("environment", ["A=b", item], "the name ''")
            for item in ("", "=hunter2", 5, {"API_KEY": "hunter2"})
        ),
        # messages are short
        ("image", "X" * 200_000, "characters"),
        ("command", "sh -c 'echo " + "x" * 20_000, "characters"),
        ("command", [*["x"] * 100_000, 1], "characters"),
        ("environment", {"x" * 100_000 + "=": "y"}, "characters"),
        ("environment", {"x" * 100_000: []}, "characters"),
        ("host_config", {"x" * 100_000: 1}, "characters"),
        ("host_config", {"mem_limit": "x" * 100_000}, "characters"),
        ("time_limit", "x" * 100_000, "characters"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_invalid_parameters(name: str, value: Any, says: str) -> None:
    fault = validate_parameters({"image": "app", name: value})
    assert fault is not None
    assert fault.startswith(f"{name} is ")
    assert says in fault
    assert f" as in --param {name}=" in fault
    assert "hunter2" not in fault
    assert len(fault) < 500
