#!/usr/bin/env bash
# Install Debian packages; what apt-get says about it is shown only if it fails.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
if ! said=$({ apt-get -qq update && apt-get -qq install --yes "$@"; } 2>&1); then
  printf '%s\n' "$said" "apt-install.sh: apt-get cannot install $*, see above" >&2
  exit 1
fi
