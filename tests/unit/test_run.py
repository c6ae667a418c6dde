"""What `make run` and its scripts say when they cannot do what they are asked for."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from flows.settings import PROJECT
from scripts import cluster, engine, run
from scripts.base import SetupError
from tests.unit.conftest import docker_context


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
        ("IMAGE", "no image", "run: image is 'no image'"),
        ("COMMAND", "sh -c 'echo", 'run: command is "sh -c \'echo": No closing quotation'),
        ("COMMAND", '["sh",', "run: command is "),
        ("ENVIRONMENT", "A=1", "run: ENVIRONMENT is not JSON"),
        ("HOST_CONFIG", '{"memory": "1g"}', "run: host_config"),
        ("TIME_LIMIT", "-1", "run: time_limit is -1"),
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


NAMES = ["IMAGE", "COMMAND", "ENVIRONMENT", "HOST_CONFIG", "EXTRA_DOCKER_KWARGS", "TIME_LIMIT"]


@pytest.mark.parametrize("name", [*NAMES, "NAMESPACE", "SERVICE_ACCOUNT", "PROJECT"])
def test_only_what_stands_on_makes_command_line_counts(name: str) -> None:
    """And it is handed on as it is."""
    value = 'sh -c "for i in 1 2; do echo $i $(HOME) $$; done"'
    for command, seen in (["make", f"{name}={value}"], value), (["make"], None), (["make", "-e"], None):
        shown = subprocess.run(
            [*command, "show", f"--eval=show: ; @printenv {name} || echo unset"],
            cwd=PROJECT,
            env={**os.environ, "PATH": os.defpath, name: "production"},
            capture_output=True,
            text=True,
        )
        assert (seen or "unset") in shown.stdout.splitlines(), shown


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_was_started_ends_with_a_run_that_is_ended(signum: signal.Signals, tmp_path: Path) -> None:
    script = "from scripts import engine as e; import time; e.find = e.own = lambda: None; e._started = [1]; "
    script += "e.start = lambda: print('up', flush=True); "
    script += "e.stop = lambda: (print('ending', flush=True), time.sleep(1), print('down'), e._started.clear())\n"
    script += "with e.running(): time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        process.send_signal(signum)
        assert process.stdout.readline() == "ending\n"
        if signum == signal.SIGTERM:
            process.send_signal(signum)  # make sends it as well
        assert process.stdout.read() == "down\n"


def test_no_engine_and_no_way_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SetupError, match="no Docker engine answers"), engine.running():
        pass


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"DOCKER_HOST": "tcp://127.0.0.1:9"}, "no Docker engine answers at DOCKER_HOST=tcp://127.0.0.1:9"),
        ({"DOCKER_HOST": "tcp://127.0.0.1:9", "DOCKER_TLS_VERIFY": "1"}, "TLS"),
        ({"DOCKER_HOST": "tcp://[::1"}, "DOCKER_HOST"),
        ({"DOCKER_CONTEXT": "gone"}, "there is no such context"),
    ],
)
def test_an_engine_that_is_chosen_and_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], says: str
) -> None:
    """As with `docker run`, no other engine takes its place."""
    for name in ("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"DOCKER_CERT_PATH": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=re.escape(says)):
        engine.find()


@pytest.mark.parametrize(
    ("host", "cause"), [("ssh://nobody@127.0.0.1:9", "paramiko"), ("unix:///none.sock", "No such")]
)
def test_a_context_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str, cause: str) -> None:
    """The cause is said, and no other engine is started, also as root."""
    docker_context(monkeypatch, tmp_path, host)
    monkeypatch.setattr(engine, "start", lambda: pytest.fail("an engine is started"))
    with pytest.raises(SetupError, match=f"{host}.*{cause}"), engine.running():
        pass


def test_the_usual_socket_without_permission(tmp_path: Path) -> None:
    """For a user who is not in the group docker."""
    path = tmp_path / "docker.sock"
    script = f"""
import os, socket
from docker.context import ContextAPI
from scripts import engine
ContextAPI.DEFAULT_CONTEXT.endpoints["docker"]["Host"] = "unix://{path}"
listener = socket.socket(socket.AF_UNIX)
listener.bind("{path}")
os.chmod("{path}", 0)
if os.geteuid() == 0:
    os.seteuid(65534)
engine.start = lambda: print("started")
with engine.running():
    pass
"""
    environ = {name: value for name, value in os.environ.items() if name not in ("DOCKER_HOST", "DOCKER_CONTEXT")}
    environ["DOCKER_CONFIG"] = str(tmp_path)
    tmp_path.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, env=environ, capture_output=True, text=True)
    assert "SetupError: no Docker engine answers at " in done.stderr
    assert "Permission denied" in done.stderr.splitlines()[-1]
    assert "started" not in done.stdout


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


def test_a_cluster_of_another_folder_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "KUBECONFIG", tmp_path / "config")
    client = MagicMock()
    for change in (cluster.up, cluster.down):
        with pytest.raises(SetupError, match="was not made from this folder"):
            change(client)
    assert not client.containers.list.called


def test_one_lock_for_all_that_start_or_stop_an_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A `make run` that started the engine is waited for by whoever would use it or stop it."""
    script = "from scripts import engine as e\nwith e.lock(): print('mine')"
    with engine.lock():
        other = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        assert other.stdout
        assert other.stdout.readline() == "setup: waiting for another `make` of this project to end\n"
    assert other.communicate()[0] == "mine\n"


@pytest.mark.parametrize("version", ["3.9.25", "3.12.0"])
def test_setup_names_the_pythons_that_it_cannot_use(version: str, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv").mkdir()
    script = shutil.copy(PROJECT / "scripts" / "setup.sh", tmp_path / "scripts")
    python = tmp_path / "python3"  # this one, which believes to be another
    belief = f"import sys; sys.version_info = ({version.replace('.', ', ')}); exec(sys.argv[1])"
    python.write_text(f'#!/bin/sh\n[ $1 = -c ] || exec echo "Python {version}"\n{sys.executable} -c "{belief}" "$2"\n')
    python.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.defpath}", "PYTHON": "python3 python0"}
    result = subprocess.run([script], env=environ, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Python 3.10 or 3.11 is needed" in result.stderr
    assert f"Seen: python3 (Python {version}); python0 (not there);" in result.stderr
    assert "PYTHON=/path/to/python3.11 make" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".venv", "python3", "scripts"]
