"""The commands of the pages, run as a user does, but on what is there for the tests."""

import os
from collections.abc import Mapping

from scripts import cluster, registry
from tests.support.kubectl import NAMESPACE
from tests.support.pages import command, commands
from tests.support.session import SESSION
from tests.support.shell import replaced, shell


def readme(start: str, instead: Mapping[str, str] | None = None) -> str:
    """Run the one command of the pages that starts like this, and return what it writes."""
    script = ['unset "${!PREFECT__@}"']
    script += [line for line in commands() if line.startswith("export ")]
    script.append(command(start))
    names = {
        "http://your-server:4200": os.environ["DOCKER_SIDECAR_TESTS_API"],
        "registry.example.com/team/": f"{registry.REGISTRY}/",
        "namespace flows": f"namespace {NAMESPACE}",
        "NAMESPACE=flows": f"NAMESPACE={NAMESPACE}",
    }
    environment = {
        "HOME": os.environ["DOCKER_SIDECAR_TESTS"],
        "KUBECONFIG": str(cluster.KUBECONFIG),
        "FLOW_IMAGE_TAG": SESSION,  # which the node has not pulled
    }
    if instead:
        names |= instead
    return shell(replaced("\n".join(script), names), environment=environment)
