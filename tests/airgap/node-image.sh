#!/usr/bin/env bash
# Builds the kind node image in the daemon at DOCKER_HOST and prints its name. The first run compiles
# Kubernetes (about 5 minutes), later ones take seconds. PYTHON: a Python with the docker SDK.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
programs=$("$here/kubernetes.sh")
exec "${PYTHON:-python3}" "$here/images.py" node "$programs"
