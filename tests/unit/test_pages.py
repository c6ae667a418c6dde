"""All pages: make has the targets, examples can be parsed, and links lead somewhere.

Other tests run the examples.
"""

import ast
import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import toml
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from prefect.agent.kubernetes import agent as kubernetes_agent
from prefect.cli import run as prefect_run
from prefect.cli.build_register import TerminalError
from prefect.cli.run import load_json_key_values

from flows.parameters import validate_parameters
from flows.settings import PROJECT, load_job_template
from tests.support import pages
from tests.support.templates import daemon_of

LINKED = [
    *pages.PAGES,
    PROJECT / "CHANGELOG.md",
    *PROJECT.glob("deploy/*.md"),
    *PROJECT.glob("scripts/**/*.md"),
    *PROJECT.glob("tests/**/*.md"),
]
PARSERS: dict[str, Callable[[str], object]] = {
    "json": json.loads,
    "python": lambda text: compile(text, "example", "exec"),
    "sh": lambda text: subprocess.run(["bash", "-n"], input=text, text=True, check=True),
    "toml": toml.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
}
COMMANDS = [command for _, text in pages.scripts() for command in pages.split(text)]
PREFECT_RUN = [command for command in COMMANDS if command.startswith("prefect run --project")]
MAKE = sorted({command for command in pages.commands() if command.startswith("make ")})
# Kinds and verbs of kubectl that are not of a namespace.
CLUSTER_WIDE = re.compile(
    r"kubectl (version|kustomize|label node|taint|cordon|patch --local|set serviceaccount --local)"
    r"|(create|delete|label|get) namespaces?\b|-k |--all-namespaces|--kustomize"
)


def page_name(page: Path) -> str:
    return page.relative_to(PROJECT).as_posix()


@pytest.mark.parametrize("command", MAKE)
def test_make_has_the_target(command: str) -> None:
    done = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", pages.blocks(), ids=lambda block: block.name)
def test_code_is_valid(block: pages.Block) -> None:
    if block.language in PARSERS:
        PARSERS[block.language](block.text)
    else:
        assert block.language in ("console", "dockerfile", "mermaid", "text")


@pytest.mark.parametrize(("page", "script"), pages.scripts())
def test_shell_holds_no_comments(page: Path, script: str) -> None:
    """In an interactive zsh, the Mac's shell, a # is a word as any other."""
    assert not pages.COMMENT.search(pages.without_quotes(script)), page_name(page)


@pytest.mark.parametrize(("page", "script"), pages.scripts())
def test_kubectl_names_its_namespace(page: Path, script: str) -> None:
    for command in re.split(r"&&|\|\|?|\n(?!\s)", pages.joined(script)):
        if command.strip().startswith("kubectl") and not CLUSTER_WIDE.search(command):
            assert re.search(r"--namespace[ =]|--filename", command), (
                f"{page_name(page)}: {command}"
            )


@pytest.mark.parametrize("command", PREFECT_RUN)
def test_a_run_may_have_the_parameters(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = pages.parameters(command)
    environment = parameters.get("environment")
    for name in environment if isinstance(environment, list) else []:
        monkeypatch.setenv(name.partition("=")[0], "of the flow's container")
    assert validate_parameters(parameters) is None


def test_examples_of_parameters_are_whole_commands() -> None:
    assert [code for code in pages.inline_code() if code.startswith("--param ")] == []


def test_what_prefect_makes_of_a_parameter() -> None:
    """The table of docs/parameters.md: what is written after --param, and its JSON."""
    rows = re.findall(r"^\| `(\w+=.*?)` \| (.*) \|$", page_text("docs/parameters.md"), re.M)
    assert len(rows) >= 8
    for written, becomes in rows:
        [given] = shlex.split(written)
        name = given.partition("=")[0]
        if becomes.startswith("nothing"):
            with pytest.raises(TerminalError, match=r"Failed to parse JSON for parameter"):
                load_json_key_values([given], "parameter")
        else:
            expected = json.loads(re.findall("`(.*?)`", becomes)[0])
            assert load_json_key_values([given], "parameter") == {name: expected}


def page_text(path: str) -> str:
    return (PROJECT / path).read_text(encoding="utf-8")


def test_daemon_json_must_not_have_what_a_template_sets() -> None:
    """docs/kubernetes.md names each flag of a template: dockerd refuses a second value."""
    named = set(re.findall(r"`([a-z0-9-]+)`", page_text("docs/kubernetes.md")))
    for name in ("docker_sidecar", "native_sidecar", "kept_layers", "gvisor_sidecar"):
        daemon = daemon_of(load_job_template(name))
        command = json.dumps([daemon.get("command"), daemon.get("args")])
        flags = set(re.findall(r"--([a-z0-9-]+)=", command))
        assert "host" in flags
        keys = flags - {"host"} | {"hosts"}
        assert keys <= named, f"{name}: not on the page: {keys - named}"


def test_the_index_leads_to_each_page() -> None:
    index = page_text("docs/README.md")
    for page in PROJECT.glob("docs/*.md"):
        assert f"]({page.name}" in index or page.name == "README.md", page.name


def test_the_changelog_has_this_version() -> None:
    version = toml.loads(page_text("pyproject.toml"))["project"]["version"]
    assert f"## [{version}]" in page_text("CHANGELOG.md")


@cache
def parsed(page: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))


def anchors(page: Path) -> list[str]:
    """The anchors that GitHub gives the headings of a page: the second `Usage` is `usage-1`."""
    slugs: list[str] = []
    found = []
    for before, heading in itertools.pairwise(parsed(page)):
        if before.type == "heading_open":
            text = "".join(part.content for part in heading.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
            slugs.append(slug)
    return found


@pytest.mark.parametrize("page", LINKED, ids=page_name)
def test_text_stands_between_two_tables(page: Path) -> None:
    """Without it they look like one table."""
    for token, next_token in itertools.pairwise(parsed(page)):
        assert (token.type, next_token.type) != ("table_close", "table_open"), token.map


@pytest.mark.parametrize("page", LINKED, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        path, _, anchor = unquote(link).partition("#")
        is_of_another_site = re.match(r"\w+:", path)
        if not is_of_another_site:
            target = (page.parent / path).resolve() if path else page
            assert target.is_relative_to(PROJECT), link
            assert target.exists(), link
            if anchor and target.suffix == ".md":
                assert anchor in anchors(target), link


def links_of(page: Path) -> Iterator[str]:
    """What the links and the pictures of a page point to."""
    for token in parsed(page):
        for part in token.children or []:
            if part.type == "link_open":
                yield str(part.attrs["href"])
            elif part.type == "image":
                yield str(part.attrs["src"])


def said_by(paths: Iterable[Path]) -> Iterator[str]:
    """The texts in some Python files; of an f-string, what stands between its values."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def messages() -> list[str]:
    """The headings of docs/troubleshooting.md that are messages; not those of others' programs."""
    text = page_text("docs/troubleshooting.md")
    return re.findall(r"^### `(.*)`$", text, re.M)


OTHERS = {  # what Docker, Kubernetes, Prefect Server and Python say
    'violates PodSecurity "baseline:latest"',
    "exceeded quota",
    "… nodes are available",
    "exec /usr/bin/tini: exec format error",
    "ModuleNotFoundError: No module named 'flows'",
    "No heartbeat detected from the remote task; marking the run as failed.",
    "Rescheduled by a Lazarus process.",
    "State payload is too large.",
}


@pytest.fixture(scope="module")
def said() -> list[str]:
    """All texts of the project, and of Prefect's Agent and command line."""
    python = [*PROJECT.glob("flows/*.py"), *PROJECT.glob("scripts/**/*.py")]
    python += [Path(kubernetes_agent.__file__), Path(prefect_run.__file__)]
    other = [*PROJECT.glob("deploy/**/*.yaml"), PROJECT / "scripts" / "setup.sh"]
    return [*said_by(python), *(path.read_text(encoding="utf-8") for path in other)]


@pytest.mark.parametrize("message", sorted({*messages()} - OTHERS))
def test_a_message_of_the_page_is_still_said(message: str, said: list[str]) -> None:
    for part in message.split("…"):
        words = part.strip("; ")
        assert any(words in each for each in said), f"nobody says {words!r}"
