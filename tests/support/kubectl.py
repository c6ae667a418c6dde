"""The cluster's node, and its kubectl."""

import shlex

from scripts import cluster
from tests.support.session import SESSION
from tests.support.shell import shell

NAMESPACE = SESSION
# Each node image has a kubectl; a machine may have none.
# With -k it reads files, of the current folder, which are copied to the node.
KUBECTL = f"""#!/bin/sh
set -eu
folder=/
case " $* " in *" -k "*)
  folder=/run/kustomize-$$
  tar -c deploy* job_templates | docker exec --interactive {cluster.NODE} \\
    sh -c "mkdir $folder && tar --extract --directory $folder"
esac
exec docker exec --interactive --workdir $folder {cluster.NODE} \\
  kubectl --kubeconfig=/etc/kubernetes/admin.conf "$@"
"""


def kubectl(command: str, stdin: str | None = None) -> str:
    """The node's kubectl, in the tests' namespace."""
    return shell(f"kubectl --namespace {NAMESPACE} {command}", stdin=stdin)


def on_node(*command: str) -> str:
    """Run a command on the node, and return what it writes."""
    return shell(shlex.join(["docker", "exec", cluster.NODE, *command])).strip()
