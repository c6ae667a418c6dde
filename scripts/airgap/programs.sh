#!/usr/bin/env bash
# Builds the programs that a module here names as its tools, and prints the folder that holds them:
#
#   scripts/airgap/programs.sh docker            # 4 minutes on two cores; a moment when they are there
#   scripts/airgap/programs.sh kubernetes        # 8 minutes
#   scripts/airgap/programs.sh network-policy    # 2 minutes
#   scripts/airgap/programs.sh gvisor            # 2 minutes
#
# Exit status 3: there is no Go to build them with; or with --if-built, they are not there.
#
# The versions are in MODULE/go.mod. To update one: cd MODULE && go get -tool PATH@VERSION && go mod tidy
set -euo pipefail

module=$1
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/docker-sidecar-on-kubernetes/programs
out=$cache/$module-$(cat "$here/$module"/* | sha256sum | cut -c1-12)
work=$cache/$module.building
say() { echo "airgap: [${SECONDS}s] $*" >&2; }
stop() { say "$*"; exit 1; }

if [ -d "$out" ]; then
    echo "$out"
    exit
fi
[ "${2-}" != --if-built ] || exit 3
PATH=$PATH:/usr/local/go/bin
version=$(go env GOVERSION 2>/dev/null || true)
if [ "$(printf '%s\n' go1.26 "${version:-go0}" | sort -V | head -n 1)" != go1.26 ]; then
    say "no image registry answers, and Go 1.26 or newer, to build $module with, is not there (seen: ${version:-no go})"
    exit 3
fi

mkdir -p "$work"
case $module in docker) need=4000 ;; *) need=11000 ;; esac
free=$(df -Pm "$work" | awk 'NR == 2 { print $4 }')
[ "$free" -ge "$need" ] ||
    stop "building $module needs $need MB in $work, which has $free MB; free some or set XDG_CACHE_HOME"

# of their own, to be removed afterwards; what an interrupted build has compiled is used again
export GOFLAGS=-mod=readonly GOTOOLCHAIN=local GOCACHE=$work/cache GOMODCACHE=$work/modules
cd "$here/$module"
say "$module: downloading its Go modules (about half a minute)"
go mod download 2>"$work/log" || stop "$module: go mod download failed: $(tail -n 3 "$work/log")"

build() { # what to build, and options
    go build -v -trimpath -ldflags "-s -w ${flags-}" -o "$work/bin/" "$@" 2>&1 | tee "$work/log" |
        awk '/^[^#]/ && ++n % 300 == 0 { print "airgap:   " n " packages" }' >&2 ||
        stop "$module: go build failed: $(grep -A5 '^#' "$work/log" || tail -n 5 "$work/log")"
}
mkdir -p "$work/bin"
say "$module: compiling (minutes)"
# shellcheck disable=SC1091 # of each module
. ./build.sh
mv "$work/bin" "$out"
chmod -R u+w "$work" && rm -rf "$work" # Go's modules are read-only
say "$module: done, $(du -sh "$out" | cut -f1) in $out"
echo "$out"
