"""The cluster's node, and its kubectl."""

import shlex

from scripts import cluster
from tests.support.session import SESSION
from tests.support.shell import shell

NAMESPACE = SESSION
# Each node image has a kubectl; a machine may have none.
KUBECTL = f"""#!/bin/sh
exec docker exec --interactive {cluster.NODE} kubectl --kubeconfig=/etc/kubernetes/admin.conf "$@"
"""


def kubectl(command: str, stdin: str | None = None) -> str:
    """The node's kubectl, in the tests' namespace."""
    return shell(f"kubectl --namespace {NAMESPACE} {command}", stdin=stdin)


def on_node(*command: str) -> str:
    """Run a command on the node, and return what it writes."""
    return shell(shlex.join(["docker", "exec", cluster.NODE, *command])).strip()
