"""What `make run` and its scripts say when they cannot do what they are asked for."""

import json
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
from scripts import cluster, engine, given, run
from scripts.airgap import dockerd
from scripts.base import SetupError
from tests.support.docker_context import docker_context
from tests.support.make import PATH, make
from tests.support.waiting import wait_for


def cache_of(folder: Path) -> Path:
    """Where the scripts keep what they make, in these tests."""
    return folder / "cache" / "docker-sidecar-on-kubernetes"


@pytest.fixture(autouse=True)
def _harmless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If the code is wrong and goes on, there is no program to start a daemon with."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = cache_of(tmp_path)
    monkeypatch.setattr(dockerd, "CACHE", cache)
    monkeypatch.setattr(cluster, "CACHE", cache)
    monkeypatch.setattr(dockerd, "HOME", cache / "dockerd")
    monkeypatch.setattr(engine, "OWN_SOCKET", f"unix://{tmp_path}/none.sock")
    monkeypatch.delenv("GIVEN", raising=False)


def on_the_command_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """As make hands a parameter on; whether it does is another test."""
    written = re.sub(r"([ \t\\])", r"\\\1", value).replace("$", "$$")
    monkeypatch.setenv("GIVEN", f"{name}={written}")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("IMAGE", "no image", "make run IMAGE=alpine:3"),
        ("COMMAND", '["sh",', "make run COMMAND="),
        ("ENVIRONMENT", '{"A": 1', "(it is not JSON: Expecting ',' delimiter"),
        ("ENVIRONMENT", '{"A": [1]}', "make run ENVIRONMENT="),
        ("HOST_CONFIG", '{"nonsense": 1}', "make run HOST_CONFIG="),
        ("EXTRA_DOCKER_KWARGS", "5", "make run EXTRA_DOCKER_KWARGS="),
        ("TIME_LIMIT", "abc", "make run TIME_LIMIT=60"),
        ("TIME_LIMIT", "-1", "make run TIME_LIMIT=60"),
    ],
)
def test_invalid_values_are_refused_at_once(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the message says what to write for make, not for `prefect run`."""
    on_the_command_line(monkeypatch, name, value)
    with pytest.raises(SystemExit, match=rf"^run: {name}\b") as end:
        run.main()
    assert says in str(end.value)
    assert "\n" not in str(end.value)
    assert "--param" not in str(end.value)
    assert not (tmp_path / "cache").exists()  # no engine was looked for


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("COMMAND", "null", None),
        ("COMMAND", '["sh", "-c", "exit 3"]', ["sh", "-c", "exit 3"]),
        ("COMMAND", "true", "true"),
        ("COMMAND", "5", "5"),
        ("COMMAND", "[ -e /etc/passwd ]", "[ -e /etc/passwd ]"),
        ("COMMAND", '"a program" with quotes', '"a program" with quotes'),
        ("COMMAND", '"echo"', '"echo"'),
        ("IMAGE", "5", "5"),
        ("TIME_LIMIT", "60", 60),
        ("TIME_LIMIT", "0.5", 0.5),
        ("ENVIRONMENT", '{"A": "b $c"}', {"A": "b $c"}),
        ("HOST_CONFIG", "null", None),
    ],
)
def test_a_value_is_json_where_the_parameter_takes_that(
    name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_command_line(monkeypatch, name, text)
    assert run.parameters() == {name.lower(): value}


@pytest.fixture
def show(tmp_path: Path) -> list[str]:
    """Arguments of make for a target that prints the variables given, and the exported ones."""
    program = tmp_path / "show.py"
    program.write_text(
        "import json, os\n"
        "from scripts import given\n"
        "found = given._variables(os.environ['GIVEN'])\n"
        "print(json.dumps([found, sorted(os.environ)]))\n"
    )
    makefile = tmp_path / "show.mk"
    makefile.write_text(f"show:\n\t@PYTHONPATH=. $(BIN)/python {program}\n")
    return ["--file=Makefile", f"--file={makefile}", "show"]


VALUES = [
    """sh -c "for i in 1 2; do echo $i $(HOME) $$ ${PATH}; done" """.strip(),
    """it's "quoted" `twice`""",
    "two\nlines\n",
    "a\\b \\ \\\\ \\n \ttab",
    "$(shell touch made-by-make)",
    "$(unfinished",
    "$",
    "# % : := = += @ ; | & < > * ? ~ ! é 名",
    "--",
    "",
    '{"TOKEN":"$ecret"}',
]


def test_an_assignment_with_a_colon_is_one(show: list[str]) -> None:
    done = make(*show, "COMMAND:=a b")
    found, _ = json.loads(done.stdout)
    assert found["COMMAND"] == "a b"


@pytest.mark.parametrize("value", VALUES)
def test_a_value_arrives_unchanged(value: str, show: list[str]) -> None:
    done = make(*show, f"COMMAND={value}", "IMAGE=alpine:3", "JOB_TEMPLATE=native_sidecar")
    assert done.returncode == 0, done.stderr
    found, exported = json.loads(done.stdout)
    assert found["COMMAND"] == value
    assert found["IMAGE"] == "alpine:3"
    assert "JOB_TEMPLATE" in exported
    assert not {"COMMAND", "IMAGE"} & set(exported), "make would expand the $ in them"
    assert not Path(PROJECT, "made-by-make").exists()


@pytest.mark.parametrize("options", [[], ["-e"]])
def test_the_environment_is_not_the_command_line(options: list[str], show: list[str]) -> None:
    """It may have variables of these names for other reasons."""
    names = [*run.NAMES, "NAMESPACE", "GIVEN"]
    done = make(*options, *show, **dict.fromkeys(names, "production"))
    found, _ = json.loads(done.stdout)
    assert list(found) == ["BIN"]


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("IMGE", "IMAGE"),
        ("image", "IMAGE"),
        ("time-limit", "TIME_LIMIT"),
        ("TIMEOUT", "TIME_LIMIT"),
        ("CMD", "COMMAND"),
        ("DOCKER_KWARGS", "EXTRA_DOCKER_KWARGS"),
        ("ENV", "ENVIRONMENT"),
    ],
)
def test_the_nearest_name_is_said(
    written: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_command_line(monkeypatch, written, "a")
    with pytest.raises(given.UnknownParameter, match=f"no parameter {written}.*{nearest}\\?"):
        run.parameters()


@pytest.mark.parametrize(
    ("target", "written", "nearest"),
    [("run", "DOCKER_KWARGS={}", "EXTRA_DOCKER_KWARGS"), ("preflight", "project=a", "PROJECT")],
)
def test_an_unknown_parameter_is_refused(target: str, written: str, nearest: str) -> None:
    """Otherwise another container would run, and succeed."""
    name = written.partition("=")[0]
    done = make(target, written)
    assert done.returncode != 0
    assert f"{target}: `make {target}` has no parameter {name}." in done.stderr
    assert f"Do you mean {nearest}?" in done.stderr


def test_a_setting_may_stand_on_the_command_line() -> None:
    done = make("run", "JOB_TEMPLATE=nonsense", "IMAGE=alpine:3")
    assert "run: JOB_TEMPLATE is 'nonsense'" in done.stderr


def test_with_an_engine_nobody_imports_how_one_is_made() -> None:
    script = """
import sys
from scripts import engine, run
engine.find = lambda: "the user's engine"
with run.running_engine() as client:
    print(client)
print(sorted(name for name in sys.modules if name.startswith("scripts.airgap")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "the user's engine\n[]\n"


def test_an_import_reads_no_file_of_the_project_and_sets_no_variable() -> None:
    script = """
import importlib, os, pathlib, sys
import flows.settings, prefect  # with what Prefect sets
opened, before = [], dict(os.environ)
ours = str(pathlib.Path.cwd())
def hook(event, arguments):
    if event == "open" and str(arguments[0]).startswith(ours):
        opened.append(str(arguments[0]))
sys.addaudithook(hook)
for path in sorted(pathlib.Path("scripts").rglob("*.py")):
    if path.stem != "__main__":
        importlib.import_module(".".join(path.with_suffix("").parts))
print([path for path in opened if not path.endswith((".py", ".pyc")) and ".venv" not in path])
print(os.environ == before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\nTrue\n"


def test_a_dockerd_that_has_no_pid_file_yet_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dockerd, "HOME", tmp_path)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as process:
        monkeypatch.setattr(dockerd, "_started", [process])
        dockerd.stop()
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_what_was_started_ends_with_a_run_that_is_ended(signum: signal.Signals) -> None:
    """A signal may come twice: make sends SIGTERM as well."""
    script = """
import signal, time
from scripts import engine
from scripts.airgap import dockerd
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
def stop():
    print("ending", flush=True)
    print(input(), "down")
    dockerd._started.clear()
engine.find = dockerd.own = lambda: None
dockerd.start = lambda: print("up", flush=True)
dockerd.stop, dockerd._started = stop, [1]
with dockerd.running():
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


NOBODY = "ssh://nobody@127.0.0.1:9"
FORWARD = f"Forward the engine's socket: ssh -fNL /tmp/docker.sock:/var/run/docker.sock {NOBODY}"


@pytest.mark.parametrize(
    ("context", "variables", "seen", "advice"),
    [
        ("", {"DOCKER_HOST": "tcp://127.0.0.1:9"}, "Connection refused", "or unset DOCKER_HOST"),
        (
            "",
            {"DOCKER_HOST": "tcp://127.0.0.1:9", "DOCKER_CERT_PATH": "/none"},
            "TLS",
            "DOCKER_CERT_PATH to a folder with ca.pem, cert.pem and key.pem",
        ),
        ("", {"DOCKER_HOST": "tcp://[::1"}, "DOCKER_HOST=tcp", "unset DOCKER_HOST"),
        ("", {"DOCKER_HOST": NOBODY}, "paramiko", FORWARD),
        (NOBODY, {}, "paramiko", FORWARD),
        (
            "",
            {"DOCKER_HOST": "unix:///run/user/1000/podman/podman.sock"},
            "No such file",
            "systemctl --user start podman.socket",
        ),
        (
            "",
            {"DOCKER_HOST": "unix:///run/podman/podman.sock"},
            "No such file",
            "sudo systemctl start podman.socket",
        ),
        (
            "",
            {"DOCKER_HOST": "unix:///run/user/1000/docker.sock"},
            "No such file",
            "systemctl --user start docker",
        ),
        (
            "unix:///home/me/.docker/desktop/docker.sock",
            {},
            "unix:///home/me/.docker/desktop/docker.sock: No such file",
            "Start Docker Desktop, or choose another engine: docker context use default",
        ),
        (
            "unix:///Users/me/.docker/run/docker.sock",
            {},
            "No such file",
            "Start Docker Desktop",
        ),
        ("unix:///none.sock", {}, "unix:///none.sock: No such", "docker context ls"),
        (
            "unix:///none.sock",
            {"DOCKER_CONTEXT": "gone"},
            "there is no such context",
            "`docker context ls` lists them",
        ),
    ],
)
def test_an_engine_that_is_chosen_and_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    context: str,
    variables: dict[str, str],
    seen: str,
    advice: str,
) -> None:
    """No other engine takes its place, also as root, as with `docker run`."""
    docker_context(monkeypatch, tmp_path, context or "unix:///none.sock")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dockerd, "start", lambda: pytest.fail("an engine is started"))
    with pytest.raises(SetupError, match=r"^no Docker engine answers at ") as raised:
        run.running_engine()
    assert seen in str(raised.value)
    assert advice in str(raised.value)
    assert "('Connection aborted.'" not in str(raised.value)


@pytest.mark.parametrize("podman", [False, True])
def test_without_any_engine(podman: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user who is not root, and has chosen none; perhaps one who has Podman."""
    if podman:
        (tmp_path / "podman").touch(0o755)
    monkeypatch.delenv("DOCKER_HOST")
    usual = f"unix://{tmp_path}/docker.sock"
    monkeypatch.setitem(ContextAPI.DEFAULT_CONTEXT.endpoints["docker"], "Host", usual)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SetupError, match=r"no Docker engine answers\. Start one") as raised:
        run.running_engine().__enter__()
    assert ("podman.socket" in str(raised.value)) == podman


def test_the_usual_socket_without_permission(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For a user outside of the group docker: an error, so that no other engine is started."""
    path, user = tmp_path / "docker.sock", os.geteuid()
    monkeypatch.delenv("DOCKER_HOST")
    monkeypatch.setitem(ContextAPI.DEFAULT_CONTEXT.endpoints["docker"], "Host", f"unix://{path}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0)
        os.seteuid(user or 65534)  # root would need no permission
        try:
            with pytest.raises(SetupError, match="Permission denied") as raised:
                engine.find()
        finally:
            os.seteuid(user)
    assert "sudo usermod -aG docker $USER" in str(raised.value)


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


def test_on_a_mac_the_cluster_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pods' address of this machine is one of a Linux with the engine's networks."""
    monkeypatch.setattr(engine, "find", MagicMock())
    monkeypatch.setattr("sys.platform", "darwin")
    assert cluster.testable() == ["tests/unit", "tests/docker"]
    assert "the cluster is left out" in capsys.readouterr().out


def test_a_cluster_of_another_folder_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "KUBECONFIG", tmp_path / "config")
    client = MagicMock()
    for change in (cluster.start, cluster.delete):
        with pytest.raises(SetupError, match="was not made from this folder"):
            change(client)
    assert not client.containers.list.called


def test_clean_removes_what_it_can_and_says_what_it_cannot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The user's engine does not answer: it may hold a cluster, volumes and containers."""
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/user/1000/podman/podman.sock")
    cache = cache_of(tmp_path) / "programs" / "docker-1"
    cache.mkdir(parents=True)
    (cache_of(tmp_path) / "file").touch()
    with pytest.raises(SystemExit, match=r"podman\.sock: No such file") as end:
        cluster.main("clean")
    assert "volumes there were not removed" in str(end.value)
    assert "run `make clean` again" in str(end.value)
    assert [path.name for path in cache_of(tmp_path).iterdir()] == ["lock"]


def test_clean_without_any_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is left, so it succeeds."""
    monkeypatch.setattr(engine, "find", lambda: None)
    (cache_of(tmp_path) / "programs").mkdir(parents=True)
    cluster.main("clean")
    assert [path.name for path in cache_of(tmp_path).iterdir()] == ["lock"]


def test_clean_of_another_engine_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cluster of another folder stays, and its engine's volumes; all else goes."""
    monkeypatch.setattr(cluster, "KUBECONFIG", tmp_path / "config")
    monkeypatch.setattr(engine, "find", MagicMock)
    (cache_of(tmp_path) / "programs").mkdir(parents=True)
    with pytest.raises(SystemExit, match="was not made from this folder"):
        cluster.main("clean")
    assert [path.name for path in cache_of(tmp_path).iterdir()] == ["lock"]


@pytest.mark.parametrize("status", [0, 1])
def test_make_clean_removes_the_virtual_environment(status: int, tmp_path: Path) -> None:
    """Whether all else could be removed or not, which its exit status says."""
    folder = tmp_path / "clone"
    for name in ("Makefile", "requirements.txt", "requirements-build.txt", "scripts/setup.sh"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        if Path(PROJECT, name).exists():
            shutil.copy(PROJECT / name, folder / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "ready").touch()
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f"#!/bin/sh\nexit {status}\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "clean"], cwd=folder, env={**os.environ, "PATH": PATH}, capture_output=True
    )
    assert (done.returncode == 0) is (status == 0)
    assert not (folder / ".venv").exists()
    assert (folder / "Makefile").exists()


def test_one_lock_for_all_that_start_or_stop_an_engine(capsys: pytest.CaptureFixture[str]) -> None:
    """A `make run` that started the engine is waited for by whoever would use it or stop it."""
    order = []

    def other() -> None:
        with dockerd.lock():
            order.append("other")

    thread = threading.Thread(target=other)
    with dockerd.lock():
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
        f'#!/bin/sh\n[ $1 = -c ] || exec echo "Python {version}"\n'
        f'{sys.executable} -c "{belief}" "$2"\n'
    )
    python.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.defpath}", "PYTHON": "python3 python0"}
    result = subprocess.run([script], env=environ, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Python 3.10 or 3.11 is needed" in result.stderr
    assert f"Seen: python3 (Python {version}); python0 (not there);" in result.stderr
    assert "PYTHON=/path/to/python3.11 make" in result.stderr
    assert "uv python install 3.11" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".venv", "python3", "scripts"]


STUBS = {
    "python": "#!/bin/sh\npwd\n",
    "pip": "#!/bin/sh\ncase $* in *config*) cat pip-config ;; esac\n",
    "uv": "#!/bin/sh\nenv >uv-environment\necho $* >uv-arguments\n",
}


def set_up_with_stubs(folder: Path, pip_config: str, **environment: str) -> dict[str, str]:
    """Run setup.sh where pip has a configuration, and return uv's environment."""
    (folder / "scripts").mkdir()
    script = shutil.copy(PROJECT / "scripts" / "setup.sh", folder / "scripts")
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-build.txt"):
        (folder / name).touch()
    (folder / "stubs").mkdir()
    (folder / "pip-config").write_text(pip_config)
    for name, text in STUBS.items():
        (folder / "stubs" / name).write_text(text)
        (folder / "stubs" / name).chmod(0o755)
    python = folder / "python3"
    python.write_text('#!/bin/sh\n[ "$1" != -m ] || { mkdir .venv && cp -R stubs .venv/bin; }\n')
    python.chmod(0o755)
    variables = {"PATH": f"{folder}:{os.defpath}", "HOME": str(folder), **environment}
    subprocess.run([script], env=variables, check=True, timeout=60, capture_output=True)
    assert "--build-constraints requirements-build.txt" in (folder / "uv-arguments").read_text()
    lines = (folder / "uv-environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_uv_takes_the_index_and_the_certificates_that_pip_has(tmp_path: Path) -> None:
    config = """global.cert='/etc/company.crt'
global.extra-index-url='https://one.example/simple\\nhttps://two.example/simple'
global.index-url='https://ignored.example/simple'
install.index-url='https://pypi.example/simple'
"""
    found = set_up_with_stubs(tmp_path, config)
    assert found["UV_DEFAULT_INDEX"] == "https://pypi.example/simple"
    assert found["UV_INDEX"] == "https://one.example/simple https://two.example/simple"
    assert found["SSL_CERT_FILE"] == "/etc/company.crt"


def test_uv_gets_the_home_folder_that_pip_would_expand(tmp_path: Path) -> None:
    found = set_up_with_stubs(tmp_path, "global.cert='~/company.crt'\n")
    assert found["SSL_CERT_FILE"] == f"{tmp_path}/company.crt"


@pytest.mark.parametrize("chosen", ["python3", "{own}/python3 python3"])
def test_the_python_in_the_virtual_environment_does_not_make_it_anew(
    tmp_path: Path, chosen: str
) -> None:
    """The README puts it on the PATH, and it is deleted first."""
    own = tmp_path / ".venv" / "bin"
    own.mkdir(parents=True)
    (own / "python3").write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    (own / "python3").chmod(0o755)
    path = f"{own}:{tmp_path}:{os.defpath}"
    set_up_with_stubs(tmp_path, "", PATH=path, PYTHON=chosen.format(own=own))
    assert not (tmp_path / "asked").exists()


def test_uvs_own_settings_win(tmp_path: Path) -> None:
    config = ":env:.index-url='https://pip.example/simple'\n"
    found = set_up_with_stubs(tmp_path, config, UV_DEFAULT_INDEX="https://uv.example/simple")
    assert found["UV_DEFAULT_INDEX"] == "https://uv.example/simple"


def test_uv_without_any_setting_of_pip(tmp_path: Path) -> None:
    found = set_up_with_stubs(tmp_path, "")
    assert "UV_DEFAULT_INDEX" not in found
    assert "SSL_CERT_FILE" not in found
