"""What a run's parameters may be, and what is said of others."""

import inspect
import json
from typing import Any

import pytest

from flows.messages import nearest
from flows.options import environment_strings
from flows.parameters import PARAMETERS, validate_parameters


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


def test_the_list_names_the_parameters_of_the_flow(request: pytest.FixtureRequest) -> None:
    flow = request.getfixturevalue("flow")
    assert {parameter.name for parameter in PARAMETERS} == {it.name for it in flow.parameters()}


def test_an_example_of_each_parameter_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME", "value")
    for parameter in PARAMETERS:
        for example in parameter.example.split(" or "):
            value = example if parameter.name == "image" else json.loads(example)
            assert validate_parameters({parameter.name: value}) is None


def test_the_nearest_name() -> None:
    names = [parameter.name for parameter in PARAMETERS]
    assert nearest("comand", names) == "did you mean command?"
    assert nearest("TIMELIMIT", names) == "did you mean time_limit?"
    assert nearest("xyz", ["a", "b"]) == "known: a, b"


VALID: list[dict[str, Any]] = [
    dict.fromkeys(("command", "environment", "host_config", "extra_docker_kwargs", "time_limit")),
    {"command": ["true"], "environment": MAPPING, "time_limit": 0.5},
    {"command": "[ 1 = 1 ]", "environment": LIST, "host_config": {}, "extra_docker_kwargs": {}},
    {"command": "", "time_limit": 10**9},
    {"host_config": {"privileged": True, "binds": ["/workspace:/workspace"], "mem_limit": "1g"}},
    {"host_config": {"shm_size": 65536, "auto_remove": True, "nano_cpus": 10**9}},
    {"extra_docker_kwargs": {"user": 1000, "entrypoint": ["sh"], "labels": ["a"], "name": "app"}},
    {"extra_docker_kwargs": {"labels": {"a": "b"}, "working_dir": "/tmp", "platform": "linux"}},
]


@pytest.mark.parametrize("parameters", VALID, ids=str)
def test_valid_parameters(parameters: dict[str, Any]) -> None:
    assert validate_parameters({"image": "app", **parameters}) is None


SECRET = "hunter2"
WRONG: dict[str, list[tuple[Any, str]]] = {
    "image": [
        ("Prefect:1", "is text, and no image reference"),
        (None, "is null"),
        (5, "is a number"),
        (f"user:{SECRET}@registry.example/app:1", "is text, and no image reference"),
        (f"https://user:{SECRET}@registry.example/app:1", "without https://"),
        ("X" * 200_000, "is text"),
    ],
    "command": [
        (f"sh -c 'echo {SECRET}", "has a quotation mark or a \\ without its end"),
        (["sleep", 1], "[1] is a number, not text"),
        (["login", {"password": SECRET}], "[1] is a mapping, not text"),
        (5, "is a number"),
        ({"a": SECRET}, "is a mapping"),
        (f"['sh','-c','{SECRET}']", "is text that starts with ["),
        (f'["sh", "{SECRET}"]', "is text that starts with ["),
        ("sh -c 'echo " + "x" * 20_000, "has a quotation mark"),
        ([*["x"] * 100_000, 1], "[100000] is a number"),
    ],
    "time_limit": [
        (0, "is not over 0"),
        (-1, "is not over 0"),
        (float("nan"), "is not over 0"),
        (10**400, "far too large"),
        ("1h", "is text"),
        (SECRET, "is text"),
        (True, "is true or false"),
        ([60], "is a list"),
        ("x" * 100_000, "is text"),
    ],
    "host_config": [
        (f"{SECRET}", "is text, not a mapping"),
        (f'{{"mem_limit": "{SECRET}"}}', "is text, not a mapping"),
        ({"memory": "1g"}, "has the unknown name 'memory'"),
        ({"mem_limit": SECRET}, ".mem_limit is text that is no size"),
        ({"privileged": True, "shm_size": f"{SECRET}mb"}, ".shm_size is text that is no size"),
        ({"binds": 5}, ".binds is a number"),
        ({"version": "1.41"}, "has the unknown name 'version'"),
        ({"network_mode": "host", "port_bindings": {"80/tcp": 80}}, "that do not fit together"),
        ({"x" * 100_000: 1}, "characters"),
        ({"mem_limit": "x" * 100_000}, "is text that is no size"),
    ],
    "extra_docker_kwargs": [
        ({"usr": 1000}, "has the unknown name 'usr': did you mean user?"),
        ({"entrypoint": f"sh -c '{SECRET}"}, ".entrypoint has a quotation mark"),
        ({"labels": SECRET}, ".labels is text, not a mapping or a list"),
        (["user"], "is a list, not a mapping"),
        (5, "is a number, not a mapping"),
        ({"image": None}, "image is a parameter of its own"),
        ({"command": SECRET}, "command is a parameter of its own"),
        ({"environment": {"TOKEN": SECRET}}, "environment is a parameter of its own"),
        ({"host_config": {"mem_limit": SECRET}}, "host_config is a parameter of its own"),
    ],
    # the names of variables are said, where they are names for sure
    "environment": [
        ({"B": {"c": SECRET}}, "['B'] is a mapping"),
        ({"B": [SECRET]}, "['B'] is a list"),
        ({"B": f"{SECRET}\0"}, "['B'] holds NUL"),
        ({"": SECRET}, "the name ''"),
        ({f"K={SECRET}": SECRET}, "the name 'K'"),
        ({"K\0": SECRET}, "the name 'K"),
        (f"PASSWORD={SECRET}", "is text"),
        (5, "is a number"),
        (["UNSET"], "environment[0] has no =, and is not a variable of the flow's environment"),
        ([f"TOKEN:{SECRET}"], "environment[0] has no ="),
        (["A=b", "PREFECT__CLOUD__API_KEY"], "environment[1] has no ="),
        ([f"A={SECRET}\0"], "['A'] holds NUL"),
        (["A=b", ""], "environment[1] is empty"),
        (["A=b", f"={SECRET}"], "environment[1] is empty, or starts with ="),
        (["A=b", 5], "environment[1] is a number"),
        (["A=b", {"API_KEY": SECRET}], "environment[1] is a mapping"),
        ({"x" * 100_000 + "=": "y"}, "characters"),
        ({"x" * 100_000: []}, "characters"),
    ],
}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [(name, value, says) for name, cases in WRONG.items() for value, says in cases],
    ids=lambda value: str(value)[:50],
)
def test_invalid_parameters(name: str, value: Any, says: str) -> None:
    """The message starts with the name, is short, has no value, and ends with what to give."""
    fault = validate_parameters({"image": "app", name: value})
    assert fault is not None
    assert fault.startswith(name)
    assert says in fault
    assert "; give " in fault
    assert ", e.g. " in fault
    assert SECRET not in fault
    assert len(fault) < 560


def test_a_check_for_each_parameter_raises_by_itself() -> None:
    for parameter in PARAMETERS:
        assert len(inspect.signature(parameter.check).parameters) == 1
