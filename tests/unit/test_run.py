"""What `make run` and its scripts say when they cannot do what they are asked for."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from flows.settings import PROJECT
from scripts import cluster, engine


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
def test_invalid_values_are_refused_at_once(name: str, value: str, says: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "scripts.run"],
        cwd=PROJECT,
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(says)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "cache").exists()  # no engine was looked for


@pytest.mark.parametrize("given", ["make show COMMAND={}", "COMMAND={} make show"])
def test_make_hands_a_command_on_as_it_is(given: str) -> None:
    command = 'sh -c "for i in 1 2; do echo $i $(HOME) $$; done"'
    shown = subprocess.run(
        ["bash", "-c", given.format(shlex.quote(command)) + " --eval='show: ; @printenv COMMAND'"],
        cwd=PROJECT,
        env={**os.environ, "PATH": os.defpath},
        capture_output=True,
        text=True,
    )
    assert command in shown.stdout.splitlines(), shown


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_was_started_ends_with_a_run_that_is_ended(signum: signal.Signals, tmp_path: Path) -> None:
    script = "from scripts import engine as e; import time; e.find = e.own = lambda: None; e._started = [1]; "
    script += "e.start = lambda: print('up', flush=True); "
    script += "e.stop = lambda: (print('ending', flush=True), time.sleep(1), print('down'), e._started.clear())\n"
    script += "with e.running(): time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        assert run.stdout.readline() == "up\n"
        run.send_signal(signum)
        assert run.stdout.readline() == "ending\n"
        if signum == signal.SIGTERM:
            run.send_signal(signum)  # make sends it as well
        assert run.stdout.read() == "down\n"


def test_no_engine_and_no_way_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(engine.SetupError, match="no Docker engine answers"), engine.running():
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
    with pytest.raises(engine.SetupError, match=re.escape(says)):
        engine.find()


def test_a_cluster_of_another_folder_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "KUBECONFIG", tmp_path / "config")
    client = MagicMock()
    for change in (cluster.up, cluster.down):
        with pytest.raises(engine.SetupError, match="was not made from this folder"):
            change(client)
    assert not client.containers.list.called


def test_row_30_one_lock_for_all_that_start_or_stop_an_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A `make run` that started the engine is waited for by whoever would use it or stop it."""
    script = "from scripts import engine as e\nwith e.lock(): print('mine')"
    with engine.lock():
        other = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        assert other.stdout
        assert other.stdout.readline() == "engine: waiting for another `make` of this project to end\n"
    assert other.communicate()[0] == "mine\n"


def test_a_wheel_cannot_be_built(tmp_path: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    build = [uv, "build", "--offline", "--wheel", "--out-dir", tmp_path, PROJECT]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode != 0
    assert "This project is used from its folder" in done.stderr


@pytest.mark.parametrize("version", ["3.8.20", "3.12.0"])
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
    assert "Python 3.9, 3.10 or 3.11 is needed" in result.stderr
    assert f"Seen: python3 (Python {version}); python0 (not there);" in result.stderr
    assert "PYTHON=/path/to/python3.11 make" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".venv", "python3", "scripts"]
