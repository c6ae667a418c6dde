"""What `make run` and its scripts say when they cannot do what they are asked for."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from docker.context import ContextAPI

from flows.settings import PROJECT
from scripts import cluster, engine, run
from scripts.base import SetupError
from tests.support.docker_context import docker_context
from tests.support.waiting import wait_for


@pytest.fixture(autouse=True)
def _harmless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the code is wrong and goes on, there is no program to start or install a daemon with."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(engine, "CACHE", tmp_path / "cache" / "docker-sidecar-on-kubernetes")
    monkeypatch.setattr(engine, "SOCKET", f"unix://{tmp_path}/none.sock")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("IMAGE", "no image", "run: image is text, and no image reference"),
        ("COMMAND", '["sh",', "run: command is "),
        ("ENVIRONMENT", '{"A": 1', "(ENVIRONMENT is not JSON: Expecting ',' delimiter"),
        ("TIME_LIMIT", "1h", "run: time_limit is text; give a number of seconds"),
        ("TIME_LIMIT", "-1", "run: time_limit is not over 0"),
    ],
)
def test_invalid_values_are_refused_at_once(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=re.escape(says)) as end:
        run.main()
    assert "\n" not in str(end.value)
    assert not (tmp_path / "cache").exists()  # no engine was looked for


def test_the_images_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMAND", "null")
    assert run.parameters() == {"command": None}


def test_a_dockerd_that_has_no_pid_file_yet_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine, "HOME", tmp_path)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as process:
        monkeypatch.setattr(engine, "_started", [process])
        engine.stop()
    assert process.returncode == -signal.SIGTERM


NAMES = ["IMAGE", "COMMAND", "ENVIRONMENT", "HOST_CONFIG", "EXTRA_DOCKER_KWARGS", "TIME_LIMIT"]
NAMES += ["NAMESPACE", "SERVICE_ACCOUNT", "PROJECT"]
GIVEN = [f'{name}=sh -c "for i in 1 2; do echo $i $(HOME) $$; done"' for name in NAMES]


@pytest.mark.parametrize(
    ("arguments", "seen"), [(GIVEN, GIVEN), ([], []), (["-e"], [])], ids=["given", "none", "-e"]
)
def test_only_what_stands_on_makes_command_line_counts(
    arguments: list[str], seen: list[str]
) -> None:
    """And it is handed on as it is."""
    exported = {**os.environ, "PATH": os.defpath, **dict.fromkeys(NAMES, "production")}
    command = ["make", *arguments, "show", "--eval=show: ; @env"]
    shown = subprocess.run(
        command, cwd=PROJECT, env=exported, capture_output=True, text=True, check=True
    ).stdout
    assert {line for line in shown.splitlines() if line.partition("=")[0] in NAMES} == set(seen)


@pytest.mark.parametrize(
    ("target", "given", "known"),
    [
        ("run", "IMGE=a", False),
        ("run", "image=a", False),
        ("preflight", "NAMESPCE=a", False),
        ("run", "JOB_TEMPLATE=a", True),
    ],
)
def test_a_misspelt_parameter_is_refused(target: str, given: str, known: bool) -> None:
    """Otherwise another container would run, and succeed."""
    command, environment = ["make", "--dry-run", target, given], {**os.environ, "PATH": os.defpath}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) is known
    assert (f"no parameter {given[:-2]}." in done.stderr) is not known


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_what_was_started_ends_with_a_run_that_is_ended(signum: signal.Signals) -> None:
    """A signal may come twice: make sends SIGTERM as well."""
    script = """
import signal, time
from scripts import engine
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
def stop():
    print("ending", flush=True)
    print(input(), "down")
    engine._started.clear()
engine.find = engine.own = lambda: None
engine.start = lambda: print("up", flush=True)
engine.stop, engine._started = stop, [1]
with engine.running():
    time.sleep(60)
    print("no signal came", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=PROJECT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signum)
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signum)
        assert process.communicate("is\n")[0] == "is down\n"


@pytest.mark.parametrize(
    ("context", "variables", "says"),
    [
        (
            "unix:///none.sock",
            {"DOCKER_HOST": "tcp://127.0.0.1:9"},
            "DOCKER_HOST=tcp://127.0.0.1:9: .*refused",
        ),
        (
            "unix:///none.sock",
            {"DOCKER_HOST": "tcp://127.0.0.1:9", "DOCKER_CERT_PATH": "/none"},
            "TLS",
        ),
        ("unix:///none.sock", {"DOCKER_HOST": "tcp://[::1"}, "DOCKER_HOST"),
        ("unix:///none.sock", {"DOCKER_CONTEXT": "gone"}, "there is no such context"),
        ("unix:///none.sock", {}, "unix:///none.sock.*No such"),
        ("ssh://nobody@127.0.0.1:9", {}, "ssh://nobody@127.0.0.1:9.*paramiko"),
    ],
)
def test_an_engine_that_is_chosen_and_not_there(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    context: str,
    variables: dict[str, str],
    says: str,
) -> None:
    """The cause is said. As with `docker run`, no other engine takes its place, also as root."""
    docker_context(monkeypatch, tmp_path, context)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engine, "start", lambda: pytest.fail("an engine is started"))
    with pytest.raises(SetupError, match=f"no Docker engine answers at .*{says}"), engine.running():
        pass


def test_the_usual_socket_without_permission(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For a user who is not in the group docker. An error, and not None, which would start another engine."""
    path, user = tmp_path / "docker.sock", os.geteuid()
    monkeypatch.delenv("DOCKER_HOST")
    monkeypatch.setitem(ContextAPI.DEFAULT_CONTEXT.endpoints["docker"], "Host", f"unix://{path}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0)
        os.seteuid(user or 65534)  # root would need no permission
        try:
            with pytest.raises(
                SetupError, match=r"no Docker engine answers at .*Permission denied"
            ):
                engine.find()
        finally:
            os.seteuid(user)


def test_without_an_engine_the_unit_tests_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make test`, with one line on what is left out."""
    monkeypatch.setattr(engine, "find", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cluster.testable() == ["tests/unit"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "no Docker engine answers" in said
    assert "left out" in said


def test_a_cluster_of_another_folder_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "KUBECONFIG", tmp_path / "config")
    client = MagicMock()
    for change in (cluster.up, cluster.down):
        with pytest.raises(SetupError, match="was not made from this folder"):
            change(client)
    assert not client.containers.list.called


def test_one_lock_for_all_that_start_or_stop_an_engine(capsys: pytest.CaptureFixture[str]) -> None:
    """A `make run` that started the engine is waited for by whoever would use it or stop it."""
    order = []

    def other() -> None:
        with engine.lock():
            order.append("other")

    thread = threading.Thread(target=other)
    with engine.lock():
        thread.start()
        said = wait_for(lambda: capsys.readouterr().out, "the other one waits")
        order.append("this")
    thread.join()
    assert "waiting for another `make` of this project to end" in said
    assert order == ["this", "other"]


@pytest.mark.parametrize("version", ["3.9.25", "3.12.0"])
def test_setup_names_the_pythons_that_it_cannot_use(version: str, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv").mkdir()
    script = shutil.copy(PROJECT / "scripts" / "setup.sh", tmp_path / "scripts")
    python = tmp_path / "python3"  # this one, which believes to be another
    belief = f"import sys; sys.version_info = ({version.replace('.', ', ')}); exec(sys.argv[1])"
    python.write_text(
        f'#!/bin/sh\n[ $1 = -c ] || exec echo "Python {version}"\n{sys.executable} -c "{belief}" "$2"\n'
    )
    python.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.defpath}", "PYTHON": "python3 python0"}
    result = subprocess.run([script], env=environ, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Python 3.10 or 3.11 is needed" in result.stderr
    assert f"Seen: python3 (Python {version}); python0 (not there);" in result.stderr
    assert "PYTHON=/path/to/python3.11 make" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".venv", "python3", "scripts"]
