#!/usr/bin/env bash
# Renew the lock: hashes, and no addresses, for every Python and platform that pyproject.toml allows.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() {
  .venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 \
    --generate-hashes --no-emit-index-url --custom-compile-command 'make lock' "$@"
}
compile pyproject.toml --output-file requirements.txt
compile pyproject.toml --group dev --constraints requirements.txt --output-file requirements-dev.txt
# what packages are built with that have no wheel
compile --group build --output-file requirements-build.txt
