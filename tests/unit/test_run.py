"""What `make run` and its scripts say when they cannot do what they are asked for."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.settings import PROJECT
from scripts import sidecar


@pytest.fixture(autouse=True)
def _harmless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the code is wrong and goes on, there is no program to start or install a daemon with."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sidecar, "HOME", tmp_path / "cache" / "dockerd")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("IMAGE", "", "run: image is ''; give an image reference (name, "),
        ("IMAGE", "no image", "run: image is 'no image'; give an image reference (name, "),
        ("COMMAND", "sh -c 'echo", """run: command is "sh -c 'echo": No closing quotation; close it"""),
    ],
)
def test_make_run_refuses_at_once(name: str, value: str, says: str, tmp_path: Path, nowhere: int) -> None:
    # nor is there a daemon to use: Docker's SDK minds proxies, even for this machine
    proxy = {"HTTP_PROXY": f"http://127.0.0.1:{nowhere}", "NO_PROXY": "", "no_proxy": ""}
    result = subprocess.run(
        [sys.executable, "-m", "scripts.run"],
        cwd=PROJECT,
        env={**os.environ, **proxy, name: value},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(says)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "cache").exists()  # not even looked for a daemon


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


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_what_was_started_ends_with_a_run_that_is_ended(signum: signal.Signals, tmp_path: Path) -> None:
    script = "from scripts import sidecar as s; import time; s.connect = lambda url=None: None; s.hub_answers = bool; "
    script += "s.up = lambda: print('up', flush=True); "
    script += "s.down = lambda keep: (print('ending', flush=True), time.sleep(1), print('down'))\n"
    script += "with s.running(): time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        assert run.stdout.readline() == "up\n"
        run.send_signal(signum)
        assert run.stdout.readline() == "ending\n"
        if signum == signal.SIGTERM:
            run.send_signal(signum)  # make sends it as well
        assert run.stdout.read() == "down\n"


def test_who_listens_on_a_port(nowhere: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert f"(process {os.getpid()})" in str(sidecar.port_owner(listener.getsockname()[1]))
    assert sidecar.port_owner(nowhere) is None


def listen_at(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a port stand in for 2375."""
    monkeypatch.setattr(sidecar, "PORT", port)
    monkeypatch.setattr(sidecar, "DAEMON", f"tcp://127.0.0.1:{port}")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b"SSH-2.0\r\n", b""])
def test_a_stranger_on_the_port(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stranger(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        listen_at(server.server_address[1], monkeypatch)
        owner = rf"port {sidecar.PORT} is taken by .*\(process {os.getpid()}\), which is no Docker daemon: stop it"
        with pytest.raises(sidecar.SidecarError, match=owner):
            sidecar.up()
        server.shutdown()


def test_a_stranger_who_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listen_at(listener.getsockname()[1], monkeypatch)
        with pytest.raises(sidecar.SidecarError, match=rf"is taken by .*\(process {os.getpid()}\)"):
            sidecar.up()


def test_the_ways_to_a_daemon(monkeypatch: pytest.MonkeyPatch, nowhere: int) -> None:
    listen_at(nowhere, monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(sidecar.SidecarError, match="no Docker engine answers, and this is not root") as error:
        sidecar.up()
    ways = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert [way.split()[1] for way in ways] == ["start", "have", "be"]


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
