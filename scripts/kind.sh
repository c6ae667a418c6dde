#!/usr/bin/env bash
# Prints the path of a usable `kind`: the one on PATH, or one in ~/.cache. Where neither exists and
# this is Debian, Debian 13's package is unpacked there (it runs on Debian 12 and newer).
set -euo pipefail

if command -v kind; then
    exit
fi

root=$(cd "$(dirname "$0")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/docker-sidecar-on-kubernetes
kind=$cache/bin/kind
if [ ! -x "$kind" ]; then
    if ! { command -v apt-get && command -v dpkg-deb; } >/dev/null; then
        echo "kind.sh: there is no kind on PATH; install it with 'brew install kind' or" \
            "'go install sigs.k8s.io/kind@latest', see https://kind.sigs.k8s.io" >&2
        exit 1
    fi
    echo "kind.sh: no kind on PATH, unpacking Debian 13's package into $cache/bin (about 10 s)" >&2
    work=$(mktemp -d "${TMPDIR:-/tmp}/kind.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    cd "$work"
    "$root/tests/airgap/apt.sh" trixie update >&2
    "$root/tests/airgap/apt.sh" trixie download kind >&2
    dpkg-deb --extract kind_*.deb .
    mkdir -p "$cache/bin"
    cp usr/bin/kind "$kind.$$"
    mv "$kind.$$" "$kind"
fi
echo "$kind"
